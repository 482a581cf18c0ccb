"""The programs of Self-Rewarding PPO ahead of time. An iteration's state (policy and critic with their moments) and the
two frozen models stay in memory from its rollouts to its updates; SFT and evaluation have the devices for
themselves. Where a part of the policy and the critic is trained, both lie over a model that is held once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sera_jax.aot import flops
from sera_jax.aot.programs import (
    Made,
    Program,
    activations,
    frozen_of,
    full_items,
    gradients,
    held,
    on_mesh,
    params_on,
    scoring,
    training,
    without,
)
from sera_jax.aot.sampler import Use, sampler
from sera_jax.core import Rows
from sera_jax.data.rollouts import lay_rollouts
from sera_jax.experiment.planned import Planned, answering, sampling_programs, scored_answers, starting_programs
from sera_jax.loops.ppo import Learner
from sera_jax.loops.ppo_segment import SPARE_BYTES
from sera_jax.loops.reward_model import OWN_ANSWERS, reward_model_training
from sera_jax.loops.sera_study import updates_of
from sera_jax.loops.srppo_study import PpoArm, SrppoStudy
from sera_jax.mesh import rows_sharding
from sera_jax.models.critic import without_output, without_value_head
from sera_jax.models.decoder import Params
from sera_jax.models.parts import merge
from sera_jax.training.ppo_steps import PpoState
from sera_jax.training.rewards import Scored
from sera_jax.training.step import TrainState, microbatches_for


@dataclasses.dataclass(frozen=True)
class _Arm:
    """The programs of one PPO arm, and what it holds: shapes on the mesh by what they are.

    Attributes:
        still: what does not move of the policy.
    """

    planned: Planned
    learner: Learner
    parts: list[Rows]
    host_rows: Rows
    reward_model: Any
    still: Params

    @property
    def run(self) -> Any:
        return self.planned.given.runtime

    @property
    def state(self) -> PpoState:
        return self.learner.programs.abstract

    @property
    def policy(self) -> Params:
        return merge(without_value_head(self.state.policy.params), self.still)

    @property
    def critic(self) -> Params:
        """The critic, or the policy with the head on it."""
        if self.state.critic is None:
            return merge(self.state.policy.params, self.still)
        return merge(self.state.critic.params, without_output(self.still))

    def holds(self, *arguments: Any) -> dict[str, Any]:
        """All that is alive in an iteration but the arguments of the program at hand; what two models share counts as
        that of the first."""
        state, (base, sft) = self.state, self.planned.models
        own: dict[str, Any] = {
            "policy": state.policy.params,
            "policy's moments": state.policy.opt_state,
            "critic": None if state.critic is None else state.critic.params,
            "critic's moments": None if state.critic is None else state.critic.opt_state,
            "base model": base,
            "SFT model": sft,
            "reward model": self.reward_model,
        }
        found, known = {}, [*arguments]
        for name, tree in own.items():
            found[name] = without(tree, known)
            known.append(tree)
        if held(state, self.run.mesh.size) <= SPARE_BYTES:
            found["spare state"] = jax.tree.leaves(state)
        return {name: leaves for name, leaves in found.items() if leaves}


def srppo_programs(
    planned: Planned, study: SrppoStudy, arms: Mapping[str, PpoArm], *, more_sft: Mapping[str, float], pays: str
) -> list[Program]:
    """In the order of the run.

    Args:
        arms: those of the config that PPO trains. more_sft: by arm, how many SFT updates it makes.
        pays: the arm that a reward model pays.
    """
    config, sizes = planned.given.config, planned.sizes
    run = planned.given.runtime
    out = starting_programs(planned, more_sft=sum(more_sft.values()))
    reward_params = None
    if pays in arms:
        trained = reward_model_training(study)
        updates = updates_of(study.reward_model, sizes.pairs)
        out += training(run, trained, study.reward_model, "reward_model", updates=updates)
        reward_params = out[-1].arguments({})[0].params
    kinds: dict[tuple, list[str]] = {}  # arms whose programs take the same
    for name, arm in arms.items():
        kinds.setdefault((arm.baseline, name == pays), []).append(name)
    for (_, paid), names in kinds.items():
        out += _iteration(planned, study, arms[names[0]], len(names), reward_params if paid else None)
    answers = config.ppo.best_of * sizes.eval_prompts
    how = dataclasses.replace(answering(planned)[1], temperature=config.sampling.temperature)
    own = min(OWN_ANSWERS, config.ppo.iterations * (config.train.batch_size // config.ppo.num_samples))
    out += sampling_programs(
        planned,
        [
            answering(planned),
            ("best of n", how, sizes.eval_prompts, answers, planned.count("candidates")),
            ("answers of the SFT model", config.sampling, own, own, planned.count("answers")),
        ],
    )
    answer = planned.answered(1, how.max_new_tokens)
    scored = (
        planned.count("heldout_demonstrations") * sizes.heldout
        + scored_answers(planned)
        + planned.count("candidates_by_.*") * answers
        + planned.count("answers_by_.*") * own
    )
    return [*out, scoring(run, "score answers", answer, count=scored)]


def _iteration(planned: Planned, study: SrppoStudy, arm: PpoArm, arms: int, reward_model: Any) -> list[Program]:
    """Of the iterations of `arms` arms of this kind."""
    run, config = planned.given.runtime, planned.given.config
    learner, ppo = Learner(study, arm), config.ppo
    per_iteration = learner.schedule.per_iteration
    rollouts = full_items(
        per_iteration, len(planned.prompt.prompt), *[config.sampling.max_new_tokens] * ppo.num_samples
    )
    packed = lay_rollouts(rollouts, ppo.num_mini_batches, learner.layout, seed=0, iteration=1)
    parts = [on_mesh(part.rows, rows_sharding(run.mesh)) for part in packed]
    still = frozen_of(learner.trained, planned.models[1])
    of = _Arm(planned, learner, parts, packed[0].rows, reward_model, still)
    programs, iterations = learner.programs, ppo.iterations * arms
    use = Use(
        f"{arm.name}: rollouts",
        run.sampling_params(learner.sampling),
        per_iteration,
        config.train.batch_size,
        iterations,
    )
    out = [
        Program(f"{arm.name}: first state", programs.start, lambda made: (params_on(run),), arms),
        *sampler(
            run,
            [use],
            slots=learner.sampling.slots,
            longest=learner.longest_prompt,
            params=of.policy,
            beside=of.holds(of.policy),
        ),
    ]
    return out + _scoring(of, iterations) + _updates(of, iterations)


def _scoring(of: _Arm, iterations: int) -> list[Program]:
    """Log-probs by three models, values, and what is made of them."""
    run, programs, name = of.run, of.learner.programs, of.learner.arm.name
    tokens, calls = flops.of_rows(of.host_rows), iterations * len(of.parts)
    working = activations(run, of.host_rows, 1) / run.cfg.num_hidden_layers
    levers = ("train.logits_chunk_tokens", "data.row_tokens")
    score, values = f"{name}: score", f"{name}: values"

    def scorer(what: str, jitted: Any, params: Params, times: int, vocabulary: bool = True) -> Program:
        return Program(
            what,
            jitted,
            lambda made: (params, of.parts[0]),
            times * calls,
            flops.forward(run.cfg, tokens, vocabulary=vocabulary),
            beside=lambda made: of.holds(params),
            working=working,
            levers=levers,
        )

    if run.lora is None:
        out = [scorer(score, programs.score, of.policy, 3)]
    else:  # the base has no adapters, so it is scored by a program of its own
        by_base = scorer(f"{name}: score by the base", programs.score, of.planned.models[0], 1)
        out = [scorer(score, programs.score, of.policy, 2), by_base]
    if programs.values is not None:
        out.append(scorer(values, programs.values, of.critic, 1, vocabulary=False))

    def experience(made: Made) -> tuple:
        return _scored(of, made[score], made.get(values)), programs.abstract.control

    out.append(
        Program(
            f"{name}: rewards and advantages",
            programs.experience,
            experience,
            iterations,
            beside=lambda made: of.holds(),
        )
    )
    return out


def _scored(of: _Arm, logp: Any, value: Any) -> list[Any]:
    """The scored minibatches, as shapes."""

    def of_response(kind: Any) -> jax.ShapeDtypeStruct:
        rows = of.parts[0]
        return jax.ShapeDtypeStruct((rows.slot.shape[0], rows.num_slots), kind, sharding=rows_sharding(of.run.mesh))

    one = dict(logp=logp, sft_logp=logp, base_logp=logp, sampled_logp=logp, value=value)
    responses = dict(finished=of_response(jnp.bool_), given=of_response(jnp.float32))
    return [Scored(rows=rows, **one, **responses) for rows in of.parts]


def _updates(of: _Arm, iterations: int) -> list[Program]:
    """Of the critic and of the policy."""
    run, programs, name = of.run, of.learner.programs, of.learner.arm.name
    config, state = of.planned.given.config, of.state
    ppo, group = config.ppo, config.train
    tokens, each = flops.of_rows(of.host_rows), ppo.num_ppo_epochs * ppo.num_mini_batches
    rewards = f"{name}: rewards and advantages"

    def update(what: str, step: Any, trained: TrainState, still: Params, updates: float, vocabulary: bool) -> Program:
        def arguments(made: Made) -> tuple:
            return trained, made[rewards][0][0], *([still] if still else [])

        (rows, length), asked = of.host_rows.tokens.shape, group.gradient_accumulation_steps
        parts = microbatches_for(run.cfg, rows, length, run.layout.shards, asked=asked)
        return Program(
            f"{name}: {what} update",
            step,
            arguments,
            updates,
            flops.update(run.cfg, tokens, vocabulary=vocabulary, adapters=run.lora is not None),
            beside=lambda made: {**of.holds(trained, still), "experience": made[rewards][0][1:]},
            working=gradients(run, trained.params, parts) + activations(run, of.host_rows, parts),
            levers=("train.gradient_accumulation_steps", "train.logits_chunk_tokens", "data.row_tokens"),
        )

    out = []
    warming = min(ppo.critic_warmup_iterations * iterations // ppo.iterations, iterations)
    if programs.critic_step is not None and state.critic is not None:
        still = without_output(of.still)
        out.append(update("critic", programs.critic_step, state.critic, still, iterations * each, False))
    elif programs.critic_step is not None and warming:
        out.append(update("value head", programs.critic_step, state.policy, of.still, warming * each, False))
    policy = update("policy", programs.policy_step, state.policy, of.still, (iterations - warming) * each, True)
    return [*out, policy]
