"""A decoder with a scalar head: a critic, which says for every scored token what return the state before it promises,
or a reward model, which says of every response what it is worth once it is read.

Its parameters are those of the decoder and, beside them, `value_head` [D]. A model of its own has no vocabulary
projection; a head on the policy shares the policy's parameters.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sera_jax.core import Rows
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params, hidden_states
from sera_jax.models.parts import merge, split
from sera_jax.ops.logprob import sum_slots

HEAD = "value_head"


def critic_config(cfg: ModelConfig) -> ModelConfig:
    """The shape of a critic that is a model of its own: without the output projection of untied embeddings."""
    return dataclasses.replace(cfg, tie_word_embeddings=True)


def with_value_head(params: Params) -> Params:
    """The parameters with a value head of zeros, so that a new critic says 0 everywhere; other leaves are shared."""
    scale = params["final_norm"]["scale"]
    return merge(params, {HEAD: jnp.zeros(scale.shape, scale.dtype)})


def without_value_head(params: Params) -> Params:
    """The decoder's own parameters."""
    return split(params, HEAD)[1]


def without_output(params: Params) -> Params:
    """The decoder's parameters without the output projection of untied embeddings."""
    return split(params, "head")[1]


def critic_params(params: Params) -> Params:
    """A critic started from a policy's parameters: its decoder without the output projection, and a head of zeros."""
    return with_value_head(without_output(params))


def read_values(hidden: jax.Array, value_head: jax.Array, rows: Rows) -> jax.Array:
    """Value of the state that each scored token is chosen in, f32[R, M]; 0 at unused places.

    Args:
        hidden: [R, T, D] final hidden states; value_head: [D].
    """
    values = _read(hidden, value_head)
    return jnp.where(rows.slot < rows.num_slots, jnp.take_along_axis(values, rows.source, axis=1), 0.0)


def read_scores(hidden: jax.Array, value_head: jax.Array, rows: Rows) -> jax.Array:
    """What each response is worth, f32[R, K], read at its own last token; 0 for an empty slot. Arguments as above."""
    after = [jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1))) for x in (rows.segment, rows.branch)]
    ends = (rows.branch > 0) & ((after[0] != rows.segment) | (after[1] != rows.branch))
    slot = jnp.where(ends, jnp.cumsum(ends, axis=1) - 1, rows.num_slots)  # responses lie in the order of their slots
    return sum_slots(_read(hidden, value_head), slot, rows.num_slots)


def row_values(cfg: ModelConfig, params: Params, rows: Rows, *, window: int) -> jax.Array:
    """`read_values` of the critic's own hidden states. Arguments as in `decoder.hidden_states`."""
    return read_values(hidden_states(cfg, params, rows, window=window), params[HEAD], rows)


def row_scores(cfg: ModelConfig, params: Params, rows: Rows, *, window: int) -> jax.Array:
    """`read_scores` of a reward model's own hidden states. Arguments as in `decoder.hidden_states`."""
    return read_scores(hidden_states(cfg, params, rows, window=window), params[HEAD], rows)


def _read(hidden: jax.Array, value_head: jax.Array) -> jax.Array:
    """The head's number at every token, f32[R, T]."""
    return jnp.einsum("rtd,d->rt", hidden, value_head.astype(hidden.dtype), preferred_element_type=jnp.float32)
