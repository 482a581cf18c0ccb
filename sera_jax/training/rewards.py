"""What PPO is paid: functions from an iteration's scored rollouts to a reward for every token, on the device.

PPO is handed one of them (`make_experience`). The coherent reward is the method; `noise` is its control; `given` pays
numbers that the host made for each response: a reward model, or a user's function over texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sera_jax.config import RewardGroup
from sera_jax.core import Array, Rows
from sera_jax.losses import advantages, coherent
from sera_jax.ops.logprob import sum_slots

# (rollouts [n, R, ...], moments of the scores so far) -> (what each token is paid f32[n, R, M], the moments with these
# scores, what the log says of the reward)
TokenReward = Callable[["Scored", coherent.Moments], tuple[jax.Array, coherent.Moments, dict[str, jax.Array]]]


@struct.dataclass
class Scored:
    """One part (a minibatch) of an iteration's rollouts, scored. Token arrays f32[R, M], response arrays [R, K].

    Attributes:
        rows: the rollouts.
        logp, sft_logp, base_logp: of each token, by the scorer.
        sampled_logp: of each token, as the sampler gave it.
        value: the critic's; None without one.
        finished: bool[R, K] the response ended by itself.
        given: f32[R, K] a number for each response, made on the host; read by `noise` and `given`.
    """

    rows: Rows
    logp: Array
    sft_logp: Array
    base_logp: Array
    sampled_logp: Array
    value: Array | None
    finished: Array
    given: Array

    def slots(self) -> dict[str, Any]:
        """Which response each token belongs to, as the functions of `losses` take it."""
        return dict(slot=self.rows.slot, num_slots=self.rows.num_slots)


def coherent_reward(settings: RewardGroup) -> TokenReward:
    """log pi_sft - log pi_base, paid as `settings` says (Zhang et al. 2025)."""
    return _token_reward(settings, settings.placement, lambda batch, own: (own, own))


def noise(settings: RewardGroup) -> TokenReward:
    """The control: noise (`given`, standard normal) of the coherent scores' mean and variance, paid at the end: noise
    has no share of a token."""

    def scores(batch: Scored, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        real = response_lengths(batch) > 0
        spread = jnp.sqrt(advantages.masked_variance(own, real))
        return own, jnp.where(real, advantages.masked_mean(own, real) + spread * batch.given, 0.0)

    return _token_reward(settings, "eos", scores, ends_count=False)


def given(settings: RewardGroup) -> TokenReward:
    """The numbers that came with the responses, paid at the end. A response that was cut is dealt with as a coherent
    reward is, by `missing_eos`."""
    counts_when_cut, penalised = coherent.MISSING_EOS[settings.missing_eos]
    penalty = settings.missing_eos_penalty if penalised else 0.0

    def scores(batch: Scored, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        when_cut = jnp.where(counts_when_cut, batch.given, 0.0) - penalty
        paid = jnp.where(response_lengths(batch) > 0, jnp.where(batch.finished, batch.given, when_cut), 0.0)
        return paid, paid

    return _token_reward(settings, "eos", scores)


def _token_reward(
    settings: RewardGroup,
    placement: str,
    scores: Callable[[Scored, jax.Array], tuple[jax.Array, jax.Array]],
    ends_count: bool = True,
) -> TokenReward:
    """A reward by what responses score: `scores` goes from (rollouts, coherent rewards f32[n, R, K]) to the numbers
    whose running moments whiten, and those that are paid. `ends_count`: a response that was cut is paid otherwise than
    one that ended."""
    names = ("count_eos", "length_normalize", "missing_eos", "missing_eos_penalty")
    how = {name: getattr(settings, name) for name in names}

    def reward(batch: Scored, moments: coherent.Moments) -> tuple[jax.Array, coherent.Moments, dict[str, jax.Array]]:
        logratios = coherent.token_logratios(sft_logp=batch.sft_logp, base_logp=batch.base_logp)
        shares = coherent.shares(logratios, finished=batch.finished, **batch.slots(), **how)
        basis, paid = scores(batch, by_response(shares, batch))
        moments = coherent.update_moments(moments, basis, response_lengths(batch) > 0)
        rewards = coherent.place(
            shares=shares,
            scores=paid,
            placement=placement,
            mean=moments.mean if settings.whiten else 0.0,
            std=moments.std() if settings.whiten else 1.0,
            clip=settings.clip,
            **batch.slots(),
        )
        metrics = _coherent_metrics(batch, logratios)
        if ends_count:
            ended = batch.finished & (response_lengths(batch) > 0)
            metrics["objective/finished_scores"] = advantages.masked_mean(paid, ended)
        return rewards, moments, metrics

    return reward


def by_response(values: jax.Array, batch: Scored) -> jax.Array:
    """Sums of f32[n, R, M] over each response, f32[n, R, K]."""
    return sum_slots(values, **batch.slots())


def response_lengths(batch: Scored) -> jax.Array:
    """Scored tokens of each response, f32[n, R, K]."""
    return by_response((batch.rows.slot < batch.rows.num_slots).astype(jnp.float32), batch)


def _coherent_metrics(batch: Scored, logratios: jax.Array) -> dict[str, jax.Array]:
    """Of the paper's sum, whatever is paid."""
    lengths = response_lengths(batch)
    real = lengths > 0
    total = by_response(logratios, batch)
    return {
        "coherent_reward/mean": advantages.masked_mean(total, real),
        "coherent_reward/std": jnp.sqrt(advantages.masked_variance(total, real)),
        "coherent_reward/per_token": jnp.sum(total) / jnp.maximum(jnp.sum(lengths), 1.0),
        "coherent_reward/length_corr": _correlation(total, lengths, real),
        "coherent_reward/largest": jnp.max(jnp.abs(logratios)),
    }


def _correlation(x: jax.Array, y: jax.Array, mask: jax.Array) -> jax.Array:
    """Pearson's, over the masked entries; 0 where one of the two does not vary."""
    x, y = (jnp.where(mask, v - advantages.masked_mean(v, mask), 0.0) for v in (x, y))
    scale = jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))
    return jnp.where(scale > 0, jnp.sum(x * y) / jnp.where(scale > 0, scale, 1.0), 0.0)
