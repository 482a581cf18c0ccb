"""What the coherent reward is compared with: a reward model, trained on preference pairs, whose score PPO is paid.

    model  = the SFT model with a scalar head, trained on -log sigmoid(r(chosen) - r(rejected))      (Bradley and Terry)
    r(x,y) = its number at the last token of the response
    paid   = r, shifted and scaled to the coherent reward's mean and variance over the SFT model's own answers, at the
             end of a response

Ziegler et al. 2019 normalise to mean 0 and variance 1 over such answers. The coherent reward's moments are ours: a KL
coefficient, or a penalty for a missing end, then means the same to both.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from sera_jax.core import Stream
from sera_jax.data.batches import PairLoader
from sera_jax.data.items import PairItem
from sera_jax.data.stored import items_of
from sera_jax.evaluation.heldout import accuracy
from sera_jax.loops.optimise import Target, Training, Updates, optimise
from sera_jax.loops.ppo import prompt_schedule
from sera_jax.loops.restartable import Span
from sera_jax.loops.rewards import coherent
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sera_study import pairs_digest
from sera_jax.loops.srppo_study import RewardModel, SrppoStudy
from sera_jax.models.critic import critic_config
from sera_jax.sampling import Candidates
from sera_jax.training.objectives import reward_objective

NAME = "reward_model"
OWN_ANSWERS = 1000  # of the SFT model, at most: enough for a mean and a variance


def reward_model(study: SrppoStudy) -> RewardModel:
    """The reward model, ready to pay.

    Raises:
        ValueError: it gives all answers the same score. Else as `optimise`.
    """
    model = train_reward_model(study)
    answers, scores = own_answers(study, model)
    ended = np.concatenate([c.finished for c in answers])
    counted = ended if ended.sum() > 1 else np.ones_like(ended)
    goal = np.concatenate([_coherent_score(study, c) for c in answers])[counted].astype(np.float64)
    found = np.concatenate(scores)[counted].astype(np.float64)
    if not found.std() > 0:
        raise ValueError(
            f"the reward model gives all {len(found)} answers of the SFT model the same score, so PPO would "
            f"learn nothing; train it longer, raise config.reward_model.learning_rate "
            f"({study.reward_model.learning_rate}) or give more pairs, under a new --config.workdir"
        )
    scale = goal.std() / found.std()
    return RewardModel(model, float(goal.mean() - scale * found.mean()), float(scale))


def train_reward_model(study: SrppoStudy) -> Policy:
    """The SFT model with a scalar head, trained on `study.pairs`; a phase."""
    return optimise(study.run, reward_model_training(study))


def reward_model_training(study: SrppoStudy) -> Training:
    """What `train_reward_model` does, not yet done."""
    run, group = study.run, study.reward_model
    loader = PairLoader(
        study.pairs,
        run.layout.accumulated(group.gradient_accumulation_steps),
        batch_size=group.batch_size,
        seed=run.seed,
        stream_indices=(Stream.REWARD,),
    )
    window = run.layout.window(items_of(study.pairs))
    updates = group.max_steps or group.num_train_epochs * loader.steps_per_epoch
    return Training(
        name=NAME,
        start=study.sft,
        batches=lambda state, update: loader.batch(update - 1),
        epoch_updates=loader.steps_per_epoch,
        depends={"pairs": pairs_digest(study.pairs), "seed": run.seed, "row_tokens": run.layout.row_tokens},
        target=Target(
            computes=NAME,
            window=window,
            make=lambda: reward_objective(critic_config(run.cfg), window=window),
            scalar=True,
        ),
        group=group,
        trained=run.trained(group),
        updates=Updates(updates, planned=updates),
        span=Span(NAME),
    )


def own_answers(study: SrppoStudy, model: Policy) -> tuple[list[Candidates], list[np.ndarray]]:
    """Answers of the SFT model to the first prompts of PPO's schedule, drawn as rollouts are and scored by itself and
    the base; and the reward model's scores of them, f32[1] each."""
    run, schedule = study.run, prompt_schedule(study)
    count = min(OWN_ANSWERS, study.ppo.iterations * schedule.per_iteration)
    prompts = itertools.chain.from_iterable(map(schedule.prompts, itertools.count(1)))
    name = f"{NAME}/answers"
    answers = run.sample(name, study.sft, list(itertools.islice(prompts, count)), 1, study.sampling, round_=0)
    by_sft, by_base, scores = (
        run.score_candidates(f"{name}_by_{which}", policy, answers)
        for which, policy in (("sft", study.sft), ("base", study.base), (NAME, model))
    )
    both = zip(answers, by_sft, by_base, strict=True)
    return [dataclasses.replace(c, logp=sft, ref_logp=base) for c, sft, base in both], scores


def pair_accuracy(study: SrppoStudy, model: Policy) -> dict[str, float]:
    """Share of the held-out pairs whose chosen side has the larger score, a tie counting half; without any, of the
    training pairs."""
    held_out = bool(study.heldout_pairs)
    pairs: Sequence[PairItem] = study.heldout_pairs or study.pairs
    with study.run.ledger.account():  # an evaluation, on no arm's account
        scores = study.run.score(f"{NAME}/{'heldout' if held_out else 'pool'}", model, [pair.item for pair in pairs])
    margins = np.array([s[w] - s[l] for pair, s in zip(pairs, scores, strict=True) for w, l in pair.pairs])
    name = "reward_model_accuracy" if held_out else "reward_model_train_accuracy"
    return {name: accuracy(margins, np.ones_like(margins))}


def reward_model_phases(held_out: bool) -> list[str]:
    """All phases of the above; `held_out`: there are held-out pairs."""
    answers = f"{NAME}/answers"
    scored = [f"{answers}_by_{which}" for which in ("sft", "base", NAME)]
    return [NAME, answers, *scored, f"{NAME}/{'heldout' if held_out else 'pool'}"]


def _coherent_score(study: SrppoStudy, candidates: Candidates) -> np.ndarray:
    """The coherent reward of answers that ended, by `reward.length_normalize`; the end token counts."""
    value = coherent(candidates)
    return value / np.maximum(candidates.lengths, 1) if study.reward.length_normalize else value
