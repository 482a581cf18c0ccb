"""What is minimised: packed rows in, a sum of per-example losses and its metrics out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sera_jax.core import Mean, PairBatch, Rows
from sera_jax.losses.preference import PairInputs, ResolvedLoss
from sera_jax.losses.reward_model import bradley_terry
from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import row_scores
from sera_jax.models.decoder import Params, hidden_states, unembedding
from sera_jax.ops.logprob import chunk_columns, slot_lengths, sum_by_slot, token_logps
from sera_jax.training.step import Metrics, Objective


def row_token_logps(
    cfg: ModelConfig, params: Params, rows: Rows, *, window: int, chunk_tokens: int, shards: int
) -> jax.Array:
    """Log-probability of every scored token of packed rows, f32[R, M].

    Args:
        window: no item is longer than this many tokens.
        chunk_tokens: logits of about this many tokens are alive at a time on each device; 0: see `chunk_columns`.
        shards: devices that the rows are spread over.
    """
    chunk = chunk_columns(rows.source.shape[0], cfg.vocab_size, chunk_tokens, shards)
    hidden = hidden_states(cfg, params, rows, window=window)
    return token_logps(hidden, unembedding(cfg, params, rows=rows.source.shape[0]), rows, chunk=chunk)


def align_objective(cfg: ModelConfig, loss: ResolvedLoss, *, window: int, chunk_tokens: int, shards: int) -> Objective:
    """Direct alignment on pairs: the loss of each pair from its two summed log-probs and the stored reference's."""

    def objective(params: Params, batch: PairBatch) -> tuple[jax.Array, jax.Array, Metrics]:
        rows, weight = batch.rows, batch.weight
        logps = row_token_logps(cfg, params, rows, window=window, chunk_tokens=chunk_tokens, shards=shards)
        logp, length = sum_by_slot(logps, rows), slot_lengths(rows)  # [R, K]

        def of_pair(values: jax.Array, slot: jax.Array) -> jax.Array:  # [R, K] -> [R, Q]
            return jnp.take_along_axis(values, slot, axis=1)

        pair = PairInputs(
            chosen_logp=of_pair(logp, batch.chosen_slot),
            rejected_logp=of_pair(logp, batch.rejected_slot),
            chosen_length=of_pair(length, batch.chosen_slot),
            rejected_length=of_pair(length, batch.rejected_slot),
            ref_chosen_logp=of_pair(batch.ref_logp, batch.chosen_slot),
            ref_rejected_logp=of_pair(batch.ref_logp, batch.rejected_slot),
        )
        losses = loss.loss(pair)
        reward = loss.reward(logp, length, batch.ref_logp)
        chosen, rejected = of_pair(reward, batch.chosen_slot), of_pair(reward, batch.rejected_slot)
        metrics = {
            "loss": Mean.of(losses, weight),
            **_of_rewards(chosen, rejected, weight),
            "logps/chosen": Mean.of(pair.chosen_logp, weight),
            "logps/rejected": Mean.of(pair.rejected_logp, weight),
            "nll_loss": Mean.of(-pair.chosen_logp, weight).over(pair.chosen_length, weight),
            "length/chosen": Mean.of(pair.chosen_length, weight),
            "length/rejected": Mean.of(pair.rejected_length, weight),
        }
        return metrics["loss"].total, metrics["loss"].weight, metrics

    return objective


def sft_objective(cfg: ModelConfig, *, window: int, chunk_tokens: int, shards: int) -> Objective:
    """Negative log-likelihood of response tokens; every token of the batch counts the same."""

    def objective(params: Params, batch: tuple[Rows, jax.Array]) -> tuple[jax.Array, jax.Array, Metrics]:
        rows, slot_weight = batch  # f32[R, K]
        logps = row_token_logps(cfg, params, rows, window=window, chunk_tokens=chunk_tokens, shards=shards)
        used = rows.slot < rows.num_slots
        slot = jnp.minimum(rows.slot, rows.num_slots - 1)
        weight = jnp.where(used, jnp.take_along_axis(slot_weight, slot, axis=1), 0.0)
        nll = Mean.of(-logps, weight)
        return nll.total, nll.weight, {"loss": nll}

    return objective


def reward_objective(cfg: ModelConfig, *, window: int) -> Objective:
    """A reward model (`cfg`: models.critic.critic_config) on pairs: the loss of each from the scores of its sides."""

    def objective(params: Params, batch: PairBatch) -> tuple[jax.Array, jax.Array, Metrics]:
        scores = row_scores(cfg, params, batch.rows, window=window)
        chosen, rejected = (
            jnp.take_along_axis(scores, slot, axis=1) for slot in (batch.chosen_slot, batch.rejected_slot)
        )
        loss = Mean.of(bradley_terry(chosen=chosen, rejected=rejected), batch.weight)
        return loss.total, loss.weight, {"loss": loss, **_of_rewards(chosen, rejected, batch.weight)}

    return objective


def _of_rewards(chosen: jax.Array, rejected: jax.Array, weight: jax.Array) -> Metrics:
    right = (chosen > rejected) + 0.5 * (chosen == rejected)
    return {
        "rewards/chosen": Mean.of(chosen, weight),
        "rewards/rejected": Mean.of(rejected, weight),
        "rewards/margins": Mean.of(chosen - rejected, weight),
        "rewards/accuracies": Mean.of(right, weight),
    }
