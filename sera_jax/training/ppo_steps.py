"""Every compiled program of a PPO iteration, made once for all of them, and the state that iterations hand on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from sera_jax.config import PpoGroup, TrainGroup
from sera_jax.mesh import replicated, row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import critic_config, critic_params, with_value_head
from sera_jax.models.decoder import Params
from sera_jax.models.trained import ALL, Trained
from sera_jax.training.experience import Control, Passes, initial_control, make_experience
from sera_jax.training.optimizer import init_optimizer, make_optimizer
from sera_jax.training.ppo import head_objective, joint_objective, policy_objective, value_objective
from sera_jax.training.rewards import TokenReward
from sera_jax.training.score import make_score, make_values
from sera_jax.training.step import Metrics, TrainState, abstract_state, init_state, make_step, microbatches_for

# Of every token, under the policy, the SFT model, and the base or a reward model; a critic adds one. Where a reward
# model pays, the base is scored with for the log alone, which is not counted.
_SCORED_BY = 3
TRAIN_PASSES = 3  # forward and backward


@struct.dataclass
class PpoState:
    """What an iteration leaves to the next.

    Attributes:
        policy: with `critic="head"` its parameters hold the value head.
        critic: None with a head on the policy, and without a critic.
    """

    policy: TrainState
    critic: TrainState | None
    control: Control


@dataclasses.dataclass(frozen=True)
class PpoPrograms:
    """The jitted functions of an iteration, and the shapes of its state.

    Attributes:
        score: (params, rows) -> token log-probs f32[R, M]: one program for policy, SFT model and base.
        values: (critic's params, rows) -> f32[R, M]; None without a critic.
        experience: see `make_experience`.
        policy_step: the update of the policy; with a head on the policy, of both. critic_step: of a critic of its own,
            or, in the warm-up of a head, of the head; None without a critic. Both take, third, the parameters that are
            frozen, where some are.
        window: no rollout with its prompt is longer than this.
        updates: that the policy's learning-rate schedule spans.
        start: (SFT params, with adapters where those move) -> a state before the first iteration, with buffers of its
            own.
        abstract: its shapes and shardings.
    """

    score: Callable[..., jax.Array]
    values: Callable[..., jax.Array] | None
    experience: Callable[..., Any]
    policy_step: Callable[..., tuple[TrainState, Metrics]]
    critic_step: Callable[..., tuple[TrainState, Metrics]] | None
    window: int
    updates: int
    start: Callable[[Params], PpoState]
    abstract: PpoState


def make_programs(
    cfg: ModelConfig,
    mesh: Mesh,
    *,
    ppo: PpoGroup,
    reward: TokenReward,
    train: TrainGroup,
    window: int,
    baseline: str = "critic",
    trained: Trained = ALL,
    like: PpoPrograms | None = None,
) -> PpoPrograms:
    """The programs of one arm.

    Args:
        train: optimiser settings; schedules span the updates that policy and critic make in `ppo.iterations`.
        window: no rollout with its prompt is longer than this.
        reward, baseline: as in `make_experience`.
        trained: what moves, of the policy and of a critic.
        like: those of another arm, made from the same other arguments; what both compute is compiled once.
    """
    shards = row_shards(mesh)
    head = baseline == "critic" and ppo.critic == "head"
    separate = baseline == "critic" and ppo.critic == "model"
    per_iteration = ppo.num_ppo_epochs * ppo.num_mini_batches
    critic_updates = ppo.iterations * per_iteration
    updates = critic_updates if head else critic_updates - ppo.critic_warmup_iterations * per_iteration
    optimizer = make_optimizer(train, updates)
    critic_cfg = critic_config(cfg)
    shape = dict(window=window, chunk_tokens=train.logits_chunk_tokens)
    policy_how: dict[str, Any] = shape | dict(
        shards=shards,
        cliprange=ppo.cliprange,
        entropy_coef=ppo.entropy_coef,
        kl_estimator=ppo.kl_estimator if ppo.kl_in == "loss" else None,
    )
    value_how: dict[str, Any] = dict(window=window, cliprange_value=ppo.cliprange_value)

    master = dict(master_weights=train.master_weights)
    policy = abstract_state(cfg, optimizer, mesh, _of_policy(trained, head), **master)
    critic = critic_step = critic_optimizer = None
    if separate:
        rate = ppo.critic_learning_rate or train.learning_rate
        critic_optimizer = make_optimizer(dataclasses.replace(train, learning_rate=rate), critic_updates)
        critic = abstract_state(critic_cfg, critic_optimizer, mesh, _of_critic(trained), **master)
        critic_step = make_step(value_objective(critic_cfg, **value_how), critic_optimizer, critic, mesh)
    elif head:
        critic_step = make_step(head_objective(cfg, **value_how), optimizer, policy, mesh)
    if head:
        objective = joint_objective(cfg, vf_coef=ppo.vf_coef, cliprange_value=ppo.cliprange_value, **policy_how)
    else:
        objective = policy_objective(cfg, **policy_how)
    abstract = _abstract(policy, critic, ppo, mesh)

    def passes(trained: int) -> Passes:
        return Passes(1, _SCORED_BY + (head or separate), TRAIN_PASSES * ppo.num_ppo_epochs * trained)

    made = PpoPrograms(
        score=make_score(cfg, mesh, per_token=True, **shape),
        values=make_values(critic_cfg if separate else cfg, mesh, window=window) if head or separate else None,
        experience=make_experience(
            reward,
            ppo,
            mesh,
            microbatches=lambda rows, row_tokens: microbatches_for(
                cfg, rows, row_tokens, shards, asked=train.gradient_accumulation_steps
            ),
            passes=passes(1 + separate),
            warmup_passes=passes(head or separate),
            baseline=baseline,
        ),
        policy_step=make_step(objective, optimizer, policy, mesh, functools.partial(_is_near, ppo)),
        critic_step=critic_step,
        window=window,
        updates=updates,
        start=_make_start(abstract, ppo, optimizer, critic_optimizer, head, trained, **master),
        abstract=abstract,
    )
    return made if like is None else _sharing(made, like)


def _sharing(made: PpoPrograms, like: PpoPrograms) -> PpoPrograms:
    """`made` with the functions of `like` wherever both compute the same; nothing is compiled before it is called."""
    shared: dict[str, Any] = {"score": like.score}
    if made.values is not None and like.values is not None:
        shared |= {"values": like.values, "critic_step": like.critic_step}
    if jax.tree.structure(made.abstract.policy) == jax.tree.structure(like.abstract.policy):
        shared["policy_step"] = like.policy_step
    return dataclasses.replace(made, **shared)


def _of_policy(trained: Trained, head: bool) -> Callable[[Params], Params]:
    """From the SFT model's parameters to those of the policy that move."""
    return lambda params: trained.part(with_value_head(params) if head else params)


def _of_critic(trained: Trained) -> Callable[[Params], Params]:
    """The same of a critic of its own."""
    return lambda params: trained.part(critic_params(params))


def _make_start(
    abstract: PpoState,
    ppo: PpoGroup,
    optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation | None,
    head: bool,
    trained: Trained,
    *,
    master_weights: bool,
) -> Callable[[Params], PpoState]:
    def begin(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        return init_state(params, init_optimizer(optimizer, params, master_weights=master_weights))

    def start(params: Params) -> PpoState:
        critic = None if critic_optimizer is None else begin(_of_critic(trained)(params), critic_optimizer)
        return PpoState(begin(_of_policy(trained, head)(params), optimizer), critic, initial_control(ppo))

    return jax.jit(start, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))


def _abstract(policy: TrainState, critic: TrainState | None, ppo: PpoGroup, mesh: Mesh) -> PpoState:
    control = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(lambda: initial_control(ppo)),
    )
    return PpoState(policy, critic, control)


def _is_near(ppo: PpoGroup, metrics: Metrics) -> jax.Array:
    """Whether the policy is still near the one that sampled, so that an update may be made."""
    near = _mean(metrics["val/ratio"]) <= ppo.ratio_limit
    if ppo.target_kl is not None:
        near &= _mean(metrics["policy/approxkl_avg"]) <= ppo.target_kl
    return near


def _mean(metric: Any) -> jax.Array:
    return metric.total / jnp.maximum(metric.weight, 1e-30)
