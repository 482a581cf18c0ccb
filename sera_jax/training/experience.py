"""From the scores of an iteration's rollouts to rewards and advantages: one jitted program, float32, on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sera_jax.config import PpoGroup, RewardGroup
from sera_jax.core import Array, Rows
from sera_jax.losses import advantages, coherent, ppo
from sera_jax.mesh import ROW_AXES, replicated
from sera_jax.ops.logprob import sum_slots
from sera_jax.training.ppo import Experience


@struct.dataclass
class Scored:
    """One part (a minibatch) of an iteration's rollouts, scored. Token arrays f32[R, M], response arrays [R, K].

    Attributes:
        rows: the rollouts.
        logp, sft_logp, base_logp: of each token, by the scorer.
        sampled_logp: of each token, as the sampler gave it.
        value: the critic's; None without one.
        finished: bool[R, K] the response ended by itself.
        noise: standard normal draws f32[R, K], for the control whose reward is random.
    """

    rows: Rows
    logp: Array
    sft_logp: Array
    base_logp: Array
    sampled_logp: Array
    value: Array | None
    finished: Array
    noise: Array


@struct.dataclass
class Control:
    """What iterations hand on besides parameters: i32[] iterations done, i32[3] the shape of their minibatches
    (`data.rollouts.Shape`), the KL coefficient, the moments of the scores so far, and what training cost: f32[] tokens
    times passes through a model (a backward pass counts as two)."""

    iteration: jax.Array
    shape: jax.Array
    kl_coef: jax.Array
    moments: coherent.Moments
    passes_tokens: jax.Array


def initial_control(settings: PpoGroup) -> Control:
    shape = jnp.zeros(3, jnp.int32)
    return Control(jnp.int32(0), shape, jnp.float32(settings.kl_coef), coherent.no_moments(), jnp.float32(0))


Experienced = tuple[list[Experience], Control, dict[str, jax.Array]]


def make_experience(
    reward: RewardGroup,
    settings: PpoGroup,
    mesh: Mesh,
    *,
    microbatches: Callable[[int, int], int] = lambda rows, row_tokens: 1,
    passes: int = 0,
    warmup_passes: int = 0,
    baseline: str = "critic",
    random_reward: bool = False,
) -> Callable[[list[Scored], Control], Experienced]:
    """A jitted (parts, control) -> (the experience of each part, the next iteration's control, metrics).

    Args:
        microbatches: from R and T to A; the leaves of the experience are [A, R / A, ...], as `step.make_step` takes
            them.
        passes, warmup_passes: model passes that an iteration costs every token, after and in the critic's warm-up.
        baseline: `critic` (GAE), or `batch_mean` (REINFORCE: returns less their mean over the batch).
        random_reward: pay normal noise of the scores' mean and variance in place of the scores.
    """

    def make(parts: list[Scored], control: Control) -> Experienced:
        batch = jax.tree.map(lambda *x: jnp.stack(x), *parts)  # [n, R, ...]
        rewards, moments, metrics = _rewards(batch, control, reward, random_reward)
        kl = ppo.kl_estimate(logp=batch.logp, ref_logp=batch.sft_logp, estimator=settings.kl_estimator)
        penalty = control.kl_coef * kl if settings.kl_in == "reward" else jnp.zeros_like(kl)
        metrics |= _metrics(batch, rewards, penalty)
        shape = _slots(batch)
        used = batch.rows.slot < batch.rows.num_slots
        follows = advantages.follows(**shape)
        if baseline == "critic":
            assert batch.value is not None
            value = batch.value
            advantage = advantages.gae(
                rewards=rewards - penalty, values=value, follows=follows, gamma=settings.gamma, lam=settings.lam
            )
            returns = advantage + value
            explained = advantages.explained_variance(values=value, returns=returns, mask=used)
            metrics["critic/vf_explained_var"] = explained
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
        )
        metrics["ppo/kl_coef"] = control.kl_coef
        warming = control.iteration < settings.critic_warmup_iterations
        kl_coef = jnp.where(warming, control.kl_coef, _next_kl_coef(control.kl_coef, metrics, settings))
        filled = (batch.rows.segment > 0).astype(jnp.float32)
        tokens = jnp.sum(filled)
        metrics["rollout/padding_fraction"] = 1 - tokens / filled.size
        sizes = (batch.rows.tokens.shape[1], batch.rows.source.shape[2], batch.rows.num_slots)
        spent = control.passes_tokens + jnp.where(warming, warmup_passes, passes) * tokens
        after = Control(control.iteration + 1, jnp.array(sizes, jnp.int32), kl_coef, moments, spent)
        split = microbatches(*batch.rows.tokens.shape[1:])
        return [_split(experience, i, split) for i in range(len(parts))], after, metrics

    by_rows = NamedSharding(mesh, PartitionSpec(None, ROW_AXES))
    return jax.jit(make, out_shardings=(by_rows, replicated(mesh), replicated(mesh)))


def _split(experience: Experience, part: int, microbatches: int) -> Experience:
    """One part of leaves [n, R, ...] as [A, R / A, ...]."""
    return jax.tree.map(lambda x: x[part].reshape(microbatches, -1, *x.shape[2:]), experience)


def _slots(batch: Scored) -> dict[str, Any]:
    return dict(slot=batch.rows.slot, num_slots=batch.rows.num_slots)


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


def _rewards(
    batch: Scored, control: Control, reward: RewardGroup, random_reward: bool
) -> tuple[jax.Array, coherent.Moments, dict[str, jax.Array]]:
    """What each token is paid, f32[n, R, M], the moments of the scores so far, and what the log says of the reward."""
    shape = _slots(batch)
    how: dict[str, Any] = {
        name: getattr(reward, name) for name in ("count_eos", "length_normalize", "missing_eos", "missing_eos_penalty")
    }
    logratios = coherent.token_logratios(sft_logp=batch.sft_logp, base_logp=batch.base_logp)
    scores = coherent.scores(logratios, finished=batch.finished, **shape, **how)
    lengths = _response_lengths(batch)
    real = lengths > 0
    moments = coherent.update_moments(control.moments, scores, real)
    placement = reward.placement
    if random_reward:
        spread = jnp.sqrt(advantages.masked_variance(scores, real))
        scores = jnp.where(real, advantages.masked_mean(scores, real) + spread * batch.noise, 0.0)
        placement = "eos"  # noise has no share of a token
    rewards = coherent.place(
        logratios=logratios,
        scores=scores,
        finished=batch.finished,
        placement=placement,
        mean=moments.mean if reward.whiten else 0.0,
        std=moments.std() if reward.whiten else 1.0,
        clip=reward.clip,
        **shape,
        **how,
    )
    total = _by_response(logratios, batch)  # the paper's sum, whatever is paid
    mean = advantages.masked_mean(total, real)
    metrics = {
        "coherent_reward/mean": mean,
        "coherent_reward/std": jnp.sqrt(advantages.masked_variance(total, real)),
        "coherent_reward/per_token": jnp.sum(total) / jnp.maximum(jnp.sum(lengths), 1.0),
        "coherent_reward/length_corr": _correlation(total, lengths, real),
        "coherent_reward/largest": jnp.max(jnp.abs(logratios)),
    }
    return rewards, moments, metrics


def _metrics(batch: Scored, rewards: jax.Array, penalty: jax.Array) -> dict[str, jax.Array]:
    """What was paid, what the policy drifted, how answers end; means over responses unless the name says otherwise."""
    lengths = _response_lengths(batch)
    real = lengths > 0
    used = batch.rows.slot < batch.rows.num_slots

    def per_response(values: jax.Array) -> jax.Array:
        return advantages.masked_mean(_by_response(values, batch), real)

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


def _by_response(values: jax.Array, batch: Scored) -> jax.Array:
    """Sums of f32[n, R, M] over each response, f32[n, R, K]."""
    return sum_slots(values, **_slots(batch))


def _response_lengths(batch: Scored) -> jax.Array:
    return _by_response((batch.rows.slot < batch.rows.num_slots).astype(jnp.float32), batch)


def _correlation(x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    """Pearson's, over the masked entries; 0 where one of the two does not vary."""
    x, y = (jnp.where(mask, v - advantages.masked_mean(v, mask), 0.0) for v in (x, y))
    scale = jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))
    return jnp.where(scale > 0, jnp.sum(x * y) / jnp.where(scale > 0, scale, 1.0), 0.0)
