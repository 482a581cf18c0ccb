"""What ranks candidates: a reward is a function from one prompt's Candidates to a number for each, larger is better.

Handed to the loops, not built into them. The rankings that a config names are in `RANKINGS`; any other function of
that kind will do, for instance `of_texts` of a rule of one's own or of a reward model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sera_jax.data.items import Item
from sera_jax.losses.preference import ResolvedLoss
from sera_jax.sampling import Candidates

Reward = Callable[[Candidates], np.ndarray]  # f32[N]


def implicit(loss: ResolvedLoss) -> Reward:
    """The loss's own implicit reward, without its scale: for DPO, log pi - log pi_ref. What SeRA ranks by."""

    def reward(candidates: Candidates) -> np.ndarray:
        assert candidates.logp is not None, "scored before it is ranked"
        return loss.score(candidates.logp, candidates.lengths, candidates.ref_logp)

    return reward


def likelihood(loss: ResolvedLoss) -> Reward:
    """The mean log-prob of an answer's tokens under the policy itself, whatever the loss."""

    def reward(candidates: Candidates) -> np.ndarray:
        assert candidates.logp is not None, "scored before it is ranked"
        return np.float32(candidates.logp) / np.maximum(candidates.lengths, 1).astype(np.float32)

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


RANKINGS: dict[str, Callable[[ResolvedLoss], Reward]] = {"implicit": implicit, "likelihood": likelihood}
