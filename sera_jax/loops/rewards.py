"""What ranks candidates: a reward is a function from one prompt's Candidates to a number for each, larger is better.

Handed to the loops, not built into them. Configs name `implicit` and its arguments; any other function of that kind
will do, for instance `of_texts` of a rule of one's own or of a reward model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sera_jax.data.items import Item
from sera_jax.losses.preference import ResolvedLoss
from sera_jax.sampling import Candidates

Reward = Callable[[Candidates], np.ndarray]  # f32[N]


def implicit(loss: ResolvedLoss, *, likelihood_weight: float = 0.0, reduction: str = "loss") -> Reward:
    """log pi - (1 - w) log pi_ref, nats or nats a token; w is the likelihood weight.

    w = 0 is the loss's own implicit reward without its scale, which SeRA ranks by; w = 1 is the likelihood under the
    policy (ours, as is all between). A loss without reference ranks by log pi at any weight.

    Args:
        reduction: over an answer's tokens: `sum`, `mean`, or `loss`, that of the loss.
    """
    mean = (loss.logp if reduction == "loss" else reduction) == "mean"

    def reward(candidates: Candidates) -> np.ndarray:
        assert candidates.logp is not None, "scored before it is ranked"
        value = np.float32(candidates.logp)
        if loss.uses_reference:
            value = value - np.float32(1.0 - likelihood_weight) * np.float32(candidates.ref_logp)
        return value / np.maximum(candidates.lengths, 1).astype(np.float32) if mean else value

    return reward


def coherent(candidates: Candidates) -> np.ndarray:
    """log pi_sft - log pi_base, nats; `logp` is the SFT model's, `ref_logp` the base's (Zhang et al. 2025)."""
    assert candidates.logp is not None and candidates.ref_logp is not None, "scored before it is ranked"
    return candidates.logp - candidates.ref_logp


def of_texts(judge: Callable[[str, str], float], texts: Callable[[Item, np.ndarray], tuple[str, str]]) -> Reward:
    """A reward by a function of texts.

    Args:
        judge: from (prompt, response) to the reward.
        texts: from (prompt item, response tokens) to both as text.
    """
    return lambda candidates: np.array([judge(*texts(candidates.prompt, t)) for t in candidates.tokens], np.float32)
