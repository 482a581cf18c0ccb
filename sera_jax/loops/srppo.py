"""Self-Rewarding PPO (Zhang et al., COLM 2025): PPO from demonstrations alone.

    stage 1:  sft    = supervised fine-tuning of the pretrained base on the demonstrations        (loops/sft.py)
    stage 2:  r(x,y) = log pi_sft(y|x) - log pi_base(y|x)          the coherent reward, paid at the end of a response
    stage 3:  repeat   rollouts   = sample(policy, prompts)        prompts need no demonstrations
                       reward     = r - kl_coef KL(policy || sft)  all four models score the same packed rows
                       advantages = GAE(reward, critic)
                       policy, critic = clipped updates on the rollouts

Stage 3 is `iterate`; `srppo` repeats it and looks at the policy now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sera_jax.config import PpoGroup
from sera_jax.core import Stream, rng_for
from sera_jax.loops.log import write_round
from sera_jax.loops.ppo import Learner
from sera_jax.loops.ppo_segment import Segment, train_segment
from sera_jax.loops.runtime import Policy
from sera_jax.loops.srppo_study import PpoArm, SrppoStudy
from sera_jax.sampling import Candidates
from sera_jax.training.ppo_steps import PpoState
from sera_jax.training.rewards import given, noise


def iterate(learner: Learner, state: PpoState, iteration: int) -> tuple[PpoState, dict[str, Any]]:
    """One iteration of stage 3; the new state and its metrics."""
    rollouts = learner.sample(state, iteration)
    scored = learner.score(state, rollouts)
    state, experience, metrics = learner.reward(state, rollouts, scored, iteration)
    learner.save_texts(rollouts, scored, iteration)
    state, losses = learner.update(state, experience, iteration)
    return state, metrics | losses


def srppo(study: SrppoStudy, arm: PpoArm) -> tuple[Policy, list[dict[str, Any]]]:
    """Stage 3 for one arm: the method, or one of its controls.

    Returns:
        The last policy, and the held-out facts of every evaluation; the last also says `passes_tokens`, what training
        cost in tokens times passes through a model (a backward pass counts as two).

    Raises:
        ValueError: the rewards are 0 everywhere, or the policy went past one of PpoGroup's limits.
        NonFinite: a loss, gradient or reward was not finite.
        Preempted: when asked to stop; a checkpoint was saved.
    """
    learner = Learner(study, arm)
    policy, facts = study.sft, []
    for segment in segments(study.ppo):
        policy, spent = train_segment(learner, iterate, segment, policy)
        found = study.evaluate(policy, segment.round)
        facts.append({"arm": arm.name, "round": segment.round, "iteration": segment.last, **found, **spent})
        write_round(study.run, facts[-1], segment.last)
    return policy, facts


def segments(ppo: PpoGroup) -> list[Segment]:
    """The iterations from one evaluation to the next."""
    every = ppo.eval_iterations or ppo.iterations
    firsts = enumerate(range(1, ppo.iterations + 1, every), 1)
    return [Segment(first, min(first + every - 1, ppo.iterations), round_) for round_, first in firsts]


def _standard_normal(study: SrppoStudy, rollouts: Sequence[Candidates], iteration: int) -> np.ndarray:
    rng = rng_for(study.run.seed, Stream.REWARD, iteration)
    return rng.standard_normal((len(rollouts), study.ppo.num_samples))


SRPPO_ARM = PpoArm("srppo")
RANDOM_REWARD = PpoArm("random_reward", reward=noise, given=_standard_normal)
REINFORCE = PpoArm("reinforce", baseline="batch_mean")
REWARD_MODEL_ARM = PpoArm("ppo_reward_model", reward=given)  # with its reward model once that is trained
