"""From the scores of an iteration's rollouts to rewards and advantages: one jitted program, float32, on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sera_jax.config import PpoGroup
from sera_jax.losses import advantages, coherent, ppo
from sera_jax.mesh import ROW_AXES, replicated
from sera_jax.training.ppo import Experience
from sera_jax.training.rewards import Scored, TokenReward, by_response, response_lengths


@struct.dataclass
class Control:
    """What iterations hand on besides parameters: i32[] iterations done, i32[4] the shape of their minibatches
    (`data.rollouts.Shape`), the KL coefficient, the moments of the scores and of the tokens' returns so far, and what
    training cost: f32[] tokens times passes through a model (a backward pass counts as two)."""

    iteration: jax.Array
    shape: jax.Array
    kl_coef: jax.Array
    moments: coherent.Moments
    returns: coherent.Moments
    passes_tokens: jax.Array


@dataclasses.dataclass(frozen=True)
class Passes:
    """Model passes that an iteration costs every token; a backward pass counts as two."""

    sampling: int = 0
    scoring: int = 0
    training: int = 0


def initial_control(settings: PpoGroup) -> Control:
    shape = jnp.zeros(4, jnp.int32)
    none = coherent.no_moments()
    return Control(jnp.int32(0), shape, jnp.float32(settings.kl_coef), none, none, jnp.float32(0))


Experienced = tuple[list[Experience], Control, dict[str, jax.Array]]


def make_experience(
    reward: TokenReward,
    settings: PpoGroup,
    mesh: Mesh,
    *,
    microbatches: Callable[[int, int], int] = lambda rows, row_tokens: 1,
    passes: Passes = Passes(),
    warmup_passes: Passes = Passes(),
    baseline: str = "critic",
) -> Callable[[list[Scored], Control], Experienced]:
    """A jitted (parts, control) -> (the experience of each part, the next iteration's control, metrics).

    Args:
        reward: what the tokens are paid (`rewards`).
        microbatches: from R and T to A; the leaves of the experience are [A, R / A, ...], as `step.make_step` takes
            them.
        passes, warmup_passes: what an iteration costs, after and in the critic's warm-up.
        baseline: `critic` (GAE), or `batch_mean` (REINFORCE: returns less their mean over the batch).
    """

    def make(parts: list[Scored], control: Control) -> Experienced:
        batch = jax.tree.map(lambda *x: jnp.stack(x), *parts)  # [n, R, ...]
        rewards, moments, metrics = reward(batch, control.moments)
        kl = ppo.kl_estimate(logp=batch.logp, ref_logp=batch.sft_logp, estimator=settings.kl_estimator)
        penalty = control.kl_coef * kl if settings.kl_in == "reward" else jnp.zeros_like(kl)
        metrics |= _metrics(batch, rewards, penalty)
        shape = batch.slots()
        used = batch.rows.slot < batch.rows.num_slots
        follows = advantages.follows(**shape)
        returns_so_far, scale = control.returns, jnp.float32(1.0)
        if baseline == "critic":
            assert batch.value is not None
            value = batch.value
            advantage = advantages.gae(
                rewards=rewards - penalty, values=value, follows=follows, gamma=settings.gamma, lam=settings.lam
            )
            returns = advantage + value
            explained = advantages.explained_variance(values=value, returns=returns, mask=used)
            metrics["critic/vf_explained_var"] = explained
            returns_so_far = coherent.update_moments(returns_so_far, returns, used)
            scale = returns_so_far.rms() if settings.value_scale == "returns" else scale
            metrics["critic/value_scale"] = scale
        else:
            returns = advantages.rewards_to_go(rewards=rewards - penalty, follows=follows, gamma=settings.gamma)
            advantage = jnp.where(used, returns - advantages.batch_baseline(returns=returns, **shape), 0.0)
            value = jnp.zeros_like(returns)
        if settings.whiten_advantages:
            advantage = advantages.whiten(advantage, used)
        experience = Experience(
            rows=batch.rows,
            old_logp=batch.logp,
            sft_logp=batch.sft_logp,
            advantage=advantage,
            old_value=value,
            returns=returns,
            kl_coef=jnp.broadcast_to(control.kl_coef, used.shape[:2]),
            value_scale=jnp.broadcast_to(scale, used.shape[:2]),
        )
        metrics["ppo/kl_coef"] = control.kl_coef
        warming = control.iteration < settings.critic_warmup_iterations
        kl_coef = jnp.where(warming, control.kl_coef, _next_kl_coef(control.kl_coef, metrics, settings))
        filled = (batch.rows.segment > 0).astype(jnp.float32)
        tokens = jnp.sum(filled)
        metrics["rollout/padding_fraction"] = 1 - tokens / filled.size
        sizes = (*batch.rows.tokens.shape[1:], batch.rows.source.shape[2], batch.rows.num_slots)
        names = [field.name for field in dataclasses.fields(Passes)]
        cost = {n: jnp.where(warming, getattr(warmup_passes, n), getattr(passes, n)) * tokens for n in names}
        metrics |= {f"cost/{name}": value for name, value in cost.items()}
        spent = control.passes_tokens + sum(cost.values())
        sizes = jnp.array(sizes, jnp.int32)
        after = Control(control.iteration + 1, sizes, kl_coef, moments, returns_so_far, spent)
        split = microbatches(*batch.rows.tokens.shape[1:])
        return [_split(experience, i, split) for i in range(len(parts))], after, metrics

    by_rows = NamedSharding(mesh, PartitionSpec(None, ROW_AXES))
    return jax.jit(make, out_shardings=(by_rows, replicated(mesh), replicated(mesh)))


def _split(experience: Experience, part: int, microbatches: int) -> Experience:
    """One part of leaves [n, R, ...] as [A, R / A, ...]."""
    return jax.tree.map(lambda x: x[part].reshape(microbatches, -1, *x.shape[2:]), experience)


def _next_kl_coef(kl_coef: jax.Array, metrics: dict[str, jax.Array], settings: PpoGroup) -> jax.Array:
    if settings.kl_controller == "fixed":
        return kl_coef
    return ppo.adaptive_kl_coef(
        kl_coef,
        kl=metrics["objective/kl"],
        target=settings.kl_target,
        horizon=settings.kl_horizon,
        responses=metrics["rollout/responses"],
    )


def _metrics(batch: Scored, rewards: jax.Array, penalty: jax.Array) -> dict[str, jax.Array]:
    """What was paid, what the policy drifted, how answers end; means over responses unless the name says otherwise."""
    lengths = response_lengths(batch)
    real = lengths > 0
    used = batch.rows.slot < batch.rows.num_slots

    def per_response(values: jax.Array) -> jax.Array:
        return advantages.masked_mean(by_response(values, batch), real)

    gap = jnp.where(used, jnp.abs(batch.sampled_logp - batch.logp), 0.0)
    count, ended = jnp.sum(real), jnp.sum(batch.finished & real)
    pair = dict(logp=batch.logp, ref_logp=batch.sft_logp)
    longest = jnp.max(lengths)
    return {
        "objective/kl": per_response(ppo.kl_estimate(**pair, estimator="k1")),
        "objective/kl_k3": per_response(ppo.kl_estimate(**pair, estimator="k3")),
        "objective/entropy": per_response(-batch.logp),
        "objective/scores": per_response(rewards),
        "objective/non_score_reward": per_response(-penalty),
        "objective/rlhf_reward": per_response(rewards - penalty),
        "val/num_eos_tokens": ended.astype(jnp.float32),
        "val/contain_eos_token": ended / jnp.maximum(count, 1),
        "ppo/missing_eos": (count - ended).astype(jnp.float32),
        "completions/mean_length": advantages.masked_mean(lengths, real),
        "completions/min_length": jnp.min(jnp.where(real, lengths, longest)),
        "completions/max_length": longest,
        "completions/clipped_ratio": 1 - ended / jnp.maximum(count, 1),
        "completions/mean_terminated_length": advantages.masked_mean(lengths, real & batch.finished),
        "rollout/decode_score_gap": advantages.masked_mean(gap, used),
        "rollout/decode_score_gap_max": jnp.max(gap),
        "rollout/responses": count.astype(jnp.float32),
        "rollout/tokens": jnp.sum(lengths),
    }
