"""What PPO minimises on packed rollouts: the clipped policy loss, the clipped value loss, or both on one trunk."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sera_jax.core import Array, Mean, Rows
from sera_jax.losses import ppo
from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import HEAD, read_values, row_values
from sera_jax.models.decoder import Params, hidden_states, unembedding
from sera_jax.ops.logprob import chunk_columns, token_logps_and_entropies
from sera_jax.training.step import Metrics, Objective


@struct.dataclass
class Experience:
    """Rollouts in packed rows and what an update needs of them.

    Attributes:
        rows: the rollouts.
        old_logp, sft_logp: f32[R, M] token log-probs under the policy that sampled, and under the SFT model.
        advantage, old_value, returns: f32[R, M].
        kl_coef, value_scale: f32[R] weight of the KL in the loss, and the unit of the value loss; the same in every
            row. Arrays so that they may change without a compilation, with a row axis so that they split into
            microbatches as the rest does.
    """

    rows: Rows
    old_logp: Array
    sft_logp: Array
    advantage: Array
    old_value: Array
    returns: Array
    kl_coef: Array
    value_scale: Array


def policy_objective(
    cfg: ModelConfig,
    *,
    window: int,
    chunk_tokens: int,
    shards: int,
    cliprange: float,
    entropy_coef: float,
    kl_estimator: str | None,
) -> Objective:
    """PPO's clipped loss, averaged over the real tokens of the batch.

    Args:
        window, chunk_tokens, shards: as in `objectives.row_token_logps`.
        entropy_coef: weight of an entropy bonus.
        kl_estimator: of the KL to the SFT model that is added to the loss; None where the reward carries it.
    """

    def objective(params: Params, batch: Experience) -> tuple[jax.Array, jax.Array, Metrics]:
        hidden = hidden_states(cfg, params, batch.rows, window=window)
        chunk = chunk_columns(batch.rows.source.shape[0], cfg.vocab_size, chunk_tokens, shards)
        metrics = _policy_metrics(cfg, params, hidden, batch, chunk, cliprange, entropy_coef, kl_estimator)
        return metrics["loss"].total, metrics["loss"].weight, metrics

    return objective


def value_objective(cfg: ModelConfig, *, window: int, cliprange_value: float | None) -> Objective:
    """The clipped value loss of a critic of its own (`cfg`: models.critic.critic_config), averaged over real tokens."""

    def objective(params: Params, batch: Experience) -> tuple[jax.Array, jax.Array, Metrics]:
        values = row_values(cfg, params, batch.rows, window=window)
        metrics = _value_metrics(values, batch, cliprange_value)
        loss = metrics["loss/value_avg"]
        return loss.total, loss.weight, metrics | {"loss": loss}

    return objective


def joint_objective(
    cfg: ModelConfig,
    *,
    window: int,
    chunk_tokens: int,
    shards: int,
    cliprange: float,
    cliprange_value: float | None,
    vf_coef: float,
    entropy_coef: float,
    kl_estimator: str | None,
) -> Objective:
    """The policy loss plus `vf_coef` times the value loss of a head on the policy; one forward pass for both."""

    def objective(params: Params, batch: Experience) -> tuple[jax.Array, jax.Array, Metrics]:
        hidden = hidden_states(cfg, params, batch.rows, window=window)
        chunk = chunk_columns(batch.rows.source.shape[0], cfg.vocab_size, chunk_tokens, shards)
        metrics = _policy_metrics(cfg, params, hidden, batch, chunk, cliprange, entropy_coef, kl_estimator)
        metrics |= _value_metrics(read_values(hidden, params[HEAD], batch.rows), batch, cliprange_value)
        policy, value = metrics["loss"], metrics["loss/value_avg"]
        metrics["loss"] = Mean(policy.total + vf_coef * value.total, policy.weight)
        return metrics["loss"].total, metrics["loss"].weight, metrics

    return objective


def head_objective(cfg: ModelConfig, *, window: int, cliprange_value: float | None) -> Objective:
    """The value loss of a head on the policy, with a gradient for the head alone: the critic's warm-up."""

    def objective(params: Params, batch: Experience) -> tuple[jax.Array, jax.Array, Metrics]:
        hidden = jax.lax.stop_gradient(hidden_states(cfg, params, batch.rows, window=window))
        metrics = _value_metrics(read_values(hidden, params[HEAD], batch.rows), batch, cliprange_value)
        loss = metrics["loss/value_avg"]
        return loss.total, loss.weight, metrics | {"loss": loss}

    return objective


def _policy_metrics(
    cfg: ModelConfig,
    params: Params,
    hidden: jax.Array,
    batch: Experience,
    chunk: int,
    cliprange: float,
    entropy_coef: float,
    kl_estimator: str | None,
) -> Metrics:
    rows = batch.rows
    unembed = unembedding(cfg, params, rows=rows.source.shape[0])
    logp, entropy = token_logps_and_entropies(hidden, unembed, rows, chunk=chunk)
    entropy = entropy if entropy_coef else jax.lax.stop_gradient(entropy)
    ratio = ppo.ratio(logp=logp, old_logp=batch.old_logp)
    policy = ppo.policy_loss(logp=logp, old_logp=batch.old_logp, advantage=batch.advantage, cliprange=cliprange)
    loss = policy - entropy_coef * entropy
    if kl_estimator is not None:
        loss += batch.kl_coef[:, None] * ppo.kl_estimate(logp=logp, ref_logp=batch.sft_logp, estimator=kl_estimator)
    clipped = ppo.policy_clipped(logp=logp, old_logp=batch.old_logp, advantage=batch.advantage, cliprange=cliprange)
    per_token = {
        "loss": loss,
        "loss/policy_avg": policy,
        "policy/approxkl_avg": ppo.approx_kl(logp=logp, old_logp=batch.old_logp),
        "policy/clipfrac_avg": clipped.astype(jnp.float32),
        "policy/entropy_avg": entropy,
        "val/ratio": ratio,
        "val/ratio_squared": ratio**2,
    }
    used = (rows.slot < rows.num_slots).astype(jnp.float32)
    return {name: Mean.of(values, used) for name, values in per_token.items()}


def _value_metrics(values: jax.Array, batch: Experience, cliprange_value: float | None) -> Metrics:
    ranges: dict[str, Any] = dict(
        old_value=batch.old_value,
        returns=batch.returns,
        cliprange_value=cliprange_value,
        scale=batch.value_scale[:, None],
    )
    used = (batch.rows.slot < batch.rows.num_slots).astype(jnp.float32)
    return {
        "loss/value_avg": Mean.of(ppo.value_loss(value=values, **ranges), used),
        "val/clipfrac_avg": Mean.of(ppo.value_clipped(value=values, **ranges).astype(jnp.float32), used),
    }
