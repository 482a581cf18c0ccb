"""What Self-Rewarding PPO is compared with: more of the same SFT, and the SFT model with the reward as a re-ranker."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sera_jax.config import SamplingGroup, TrainGroup
from sera_jax.data.items import Item
from sera_jax.loops.rewards import coherent
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sft import sft
from sera_jax.loops.srppo_study import SrppoStudy
from sera_jax.sampling import Candidates, Sample
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
) -> list[Sample]:
    """For each prompt the SFT model's answer of the largest coherent reward among `ppo.best_of`.

    Answers that ended by themselves go first; among equals the first sampled.
    """
    run = study.run
    candidates = run.sample(f"{name}/candidates", study.sft, prompts, study.ppo.best_of, settings, round_=0)
    by_sft, by_base = (
        run.score_candidates(f"{name}/candidates_by_{which}", policy, candidates)
        for which, policy in (("sft", study.sft), ("base", study.base))
    )
    scored = [
        dataclasses.replace(group, logp=sft_logp, ref_logp=base_logp)
        for group, sft_logp, base_logp in zip(candidates, by_sft, by_base, strict=True)
    ]
    return [_best(group, coherent(group)) for group in scored]


def _best(candidates: Candidates, rewards: np.ndarray) -> Sample:
    ranked = zip(candidates.finished, rewards, range(0, -len(rewards), -1), candidates.samples, strict=True)
    return max(ranked, key=lambda row: row[:3])[3]


def _updates(study: SrppoStudy, group: TrainGroup) -> int:
    """What SFT itself makes."""
    return group.max_steps or group.num_train_epochs * -(-len(study.demonstrations) // group.batch_size)


def _sft(study: SrppoStudy, group: TrainGroup, name: str, updates: int) -> Policy:
    return sft(study.run, name, study.base, study.demonstrations, dataclasses.replace(group, max_steps=updates))
