"""Useful floating-point operations in closed form: of the model's own matmuls and of the keys that a query may see.
What is computed again for the backward pass (`model.remat`), and what is masked, is not useful."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sera_jax.core import Rows
from sera_jax.models.config import ModelConfig

BACKWARD = 2  # times the forward pass


class Tokens(NamedTuple):
    """What a forward pass is given: tokens, keys that their queries see together, tokens whose log-prob is asked."""

    number: float
    keys: float
    scored: float = 0

    def times(self, number: float) -> Tokens:
        return Tokens(*(number * value for value in self))


def of_rows(rows: Rows) -> Tokens:
    """Of packed rows (numpy): a token sees all before it of its prompt and its own answer, and itself."""
    real = np.asarray(rows.segment) > 0
    keys = float((np.asarray(rows.positions)[real] + 1).sum())
    return Tokens(float(real.sum()), keys, float((np.asarray(rows.slot) < rows.num_slots).sum()))


def of_prompts(count: int, tokens: int) -> Tokens:
    """Of so many prompts of so many tokens, of which nothing is scored."""
    return Tokens(count * tokens, count * tokens * (tokens + 1) / 2)


def forward(cfg: ModelConfig, tokens: Tokens, *, vocabulary: bool = True) -> float:
    """Of a forward pass; without `vocabulary`, of a model that has a scalar head in its place."""
    heads = cfg.num_attention_heads * cfg.head_dim
    of_head = cfg.vocab_size if vocabulary else 1
    return (
        2 * tokens.number * cfg.num_hidden_layers * cfg.layer_parameters
        + 4 * tokens.keys * cfg.num_hidden_layers * heads  # q.k and the weighted sum of v
        + 2 * tokens.scored * cfg.hidden_size * of_head
    )


def update(cfg: ModelConfig, tokens: Tokens, *, vocabulary: bool = True, adapters: bool = False) -> float:
    """Of a forward and a backward pass; of `adapters`, whose own are left out, the backward pass makes no gradient of a
    kernel, which is half of it."""
    return (1 + (BACKWARD / 2 if adapters else BACKWARD)) * forward(cfg, tokens, vocabulary=vocabulary)
