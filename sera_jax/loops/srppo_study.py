"""What Self-Rewarding PPO and its controls share, and in what an arm of it may differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax.config import PpoGroup, RewardGroup, SamplingGroup, TrainGroup
from sera_jax.data.items import Item, PairItem
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.sampling import Candidates
from sera_jax.training.rewards import TokenReward, coherent_reward


@dataclasses.dataclass(frozen=True)
class SrppoStudy:
    """What PPO and its controls are given.

    Attributes:
        base, sft: the two frozen models whose log-ratio is the reward; `sft` is also where the policy starts.
        demonstrations: what SFT imitated; their prompts are the SFT prompts. prompts: new ones, without responses.
        evaluate: held-out facts of a policy, for the report; called with the number of the evaluation, from 1.
        gold: reward of (prompt item, response tokens), NaN where there is none; only reported.
        texts: of (prompt item, response tokens), for the rollouts saved every `rollout_iterations` iterations.
        pairs, heldout_pairs: what a reward model is trained on and judged by, where an arm has one; reward_model: how.
    """

    run: Runtime
    base: Policy
    sft: Policy
    reward: RewardGroup
    ppo: PpoGroup
    train: TrainGroup
    sampling: SamplingGroup
    demonstrations: Sequence[Item]
    prompts: Sequence[Item]
    evaluate: Callable[[Policy, int], dict[str, Any]]
    gold: Callable[[Item, np.ndarray], float] | None
    texts: Callable[[Item, np.ndarray], dict[str, Any]]
    rollout_iterations: int
    reward_model: TrainGroup
    pairs: Sequence[PairItem]
    heldout_pairs: Sequence[PairItem]


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model and its unit: PPO is paid shift + scale x score."""

    model: Policy
    shift: float
    scale: float

    def paid(self, scores: np.ndarray) -> np.ndarray:
        """What scores f32[...] are worth, f32[...]."""
        return np.float32(self.shift) + np.float32(self.scale) * scores


@dataclasses.dataclass(frozen=True)
class PpoArm:
    """The method, or a control that differs from it in one thing.

    Attributes:
        name: of its phases and its lines in the log.
        baseline: what returns are compared with: `critic`, or `batch_mean` (REINFORCE).
        reward: what tokens are paid (`training.rewards`), by the settings of the config.
        given: a number for each response, f32[prompts][N], where `reward` reads one: from (study, rollouts, iteration).
        reward_model: whose scores are that number, in place of `given`.
    """

    name: str
    baseline: str = "critic"
    reward: Callable[[RewardGroup], TokenReward] = coherent_reward
    given: Callable[[SrppoStudy, Sequence[Candidates], int], Sequence[np.ndarray]] | None = None
    reward_model: RewardModel | None = None
