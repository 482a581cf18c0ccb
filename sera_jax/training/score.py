"""Score responses under one policy: the scorer that every phase shares."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from sera_jax.core import Rows
from sera_jax.mesh import host_to_global, replicated, row_shards, rows_sharding
from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import row_scores, row_values
from sera_jax.models.decoder import Params
from sera_jax.ops.logprob import sum_by_slot
from sera_jax.training.objectives import row_token_logps


def make_score(
    cfg: ModelConfig, mesh: Mesh, *, window: int, chunk_tokens: int, per_token: bool = False
) -> Callable[[Params, Rows], jax.Array]:
    """A jitted (params, rows) -> summed log-prob of each response slot, f32[R, K], on every device.

    With `per_token`: the log-prob of each scored token, f32[R, M], spread over the devices as the rows are.
    """
    shards = row_shards(mesh)

    def score(params: Params, rows: Rows) -> jax.Array:
        logps = row_token_logps(cfg, params, rows, window=window, chunk_tokens=chunk_tokens, shards=shards)
        return logps if per_token else sum_by_slot(logps, rows)

    return jax.jit(score, out_shardings=rows_sharding(mesh) if per_token else replicated(mesh))


def make_values(cfg: ModelConfig, mesh: Mesh, *, window: int) -> Callable[[Params, Rows], jax.Array]:
    """A jitted (critic's params, rows) -> value of the state before each scored token, f32[R, M], spread as rows."""

    def values(params: Params, rows: Rows) -> jax.Array:
        return row_values(cfg, params, rows, window=window)

    return jax.jit(values, out_shardings=rows_sharding(mesh))


def make_rewards(cfg: ModelConfig, mesh: Mesh, *, window: int) -> Callable[[Params, Rows], jax.Array]:
    """A jitted (reward model's params, rows) -> score of each response slot, f32[R, K], on every device."""

    def rewards(params: Params, rows: Rows) -> jax.Array:
        return row_scores(cfg, params, rows, window=window)

    return jax.jit(rewards, out_shardings=replicated(mesh))


def place_rows(rows: Rows, mesh: Mesh) -> Rows:
    """Host rows as device arrays spread over the data axes."""
    return host_to_global(rows, rows_sharding(mesh))
