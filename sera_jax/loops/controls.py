"""What Self-Rewarding PPO is compared with: more of the same SFT, and the SFT model with the reward as a re-ranker."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sera_jax.config import SamplingGroup, TrainGroup
from sera_jax.data.items import Item
from sera_jax.data.packing import split_items
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sft import sft
from sera_jax.loops.srppo_study import SrppoStudy
from sera_jax.training.ppo_steps import TRAIN_PASSES


def sft_longer(study: SrppoStudy, group: TrainGroup, name: str = "sft_longer") -> Policy:
    """SFT of the base on the same demonstrations for `ppo.sft_longer_factor` times the updates, one longer schedule."""
    return _sft(study, group, name, study.ppo.sft_longer_factor * _updates(study, group))


def sft_equal_compute(study: SrppoStudy, group: TrainGroup, passes_tokens: float) -> Policy:
    """SFT of the base for as many updates as SFT and PPO together cost.

    Args:
        passes_tokens: of PPO: tokens times passes through a model; a token of SFT costs three.
    """
    tokens = float(np.mean([item.tokens for item in study.demonstrations]))
    more = round(passes_tokens / (TRAIN_PASSES * group.batch_size * tokens))
    return _sft(study, group, "sft_equal_compute", _updates(study, group) + more)


def best_of_n(
    study: SrppoStudy, prompts: Sequence[Item], settings: SamplingGroup, name: str = "best_of_n"
) -> list[tuple[np.ndarray, bool]]:
    """For each prompt the SFT model's answer of the largest coherent reward among `ppo.best_of`: (tokens, ended).

    Answers that ended by themselves go first; among equals the first sampled.
    """
    if not prompts:
        return []
    run, count = study.run, study.ppo.best_of
    groups = run.sample(f"{name}/candidates", study.sft, prompts, count, settings, round_=0)
    items = [
        dataclasses.replace(prompt, responses=tuple(s.tokens for s in group))
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    pieces = split_items(items, run.row_tokens, run.share_prompt)
    sft_logp, base_logp = (
        np.concatenate(run.score(f"{name}/candidates_by_{which}", policy, pieces))
        for which, policy in (("sft", study.sft), ("base", study.base))
    )
    rewards = (sft_logp - base_logp).reshape(len(prompts), count)
    best = [
        max(range(count), key=lambda k: (group[k].finished, reward[k], -k))
        for group, reward in zip(groups, rewards, strict=True)
    ]
    return [(group[k].tokens, group[k].finished) for group, k in zip(groups, best, strict=True)]


def _updates(study: SrppoStudy, group: TrainGroup) -> int:
    """What SFT itself makes."""
    return group.max_steps or group.num_train_epochs * -(-len(study.demonstrations) // group.batch_size)


def _sft(study: SrppoStudy, group: TrainGroup, name: str, updates: int) -> Policy:
    return sft(
        study.run,
        name,
        study.base,
        study.demonstrations,
        dataclasses.replace(group, max_steps=updates),
        max_row_shapes=study.max_row_shapes,
        logging_steps=study.logging_steps,
    )
