"""What Self-Rewarding PPO and its controls share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax.config import PpoGroup, RewardGroup, SamplingGroup, TrainGroup
from sera_jax.data.items import Item
from sera_jax.loops.runtime import Policy, Runtime


@dataclasses.dataclass(frozen=True)
class SrppoStudy:
    """What PPO and its controls are given.

    Attributes:
        base, sft: the two frozen models whose log-ratio is the reward; `sft` is also where the policy starts.
        demonstrations: what SFT imitated; their prompts are the SFT prompts. prompts: new ones, without responses.
        evaluate: held-out facts of a policy, for the report; called with the number of the evaluation, from 1.
        judge: gold reward of (prompt item, response tokens), where a world has one; only reported.
        show: texts of (prompt item, response tokens), for the saved rollouts.
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
    judge: Callable[[Item, np.ndarray], float] | None
    show: Callable[[Item, np.ndarray], dict[str, Any]]
    logging_steps: int
    rollout_iterations: int
    max_row_shapes: int
