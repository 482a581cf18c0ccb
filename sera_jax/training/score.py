"""Score responses under one policy: the scorer that every phase shares."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from sera_jax.core import Rows
from sera_jax.mesh import host_to_global, replicated, row_shards, rows_sharding
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params
from sera_jax.ops.logprob import sum_by_slot
from sera_jax.training.objectives import row_token_logps


def make_score(
    cfg: ModelConfig, mesh: Mesh, *, window: int, chunk_tokens: int, per_token: bool = False
) -> Callable[[Params, Rows], jax.Array]:
    """A jitted (params, rows) -> summed log-prob of each response slot, f32[R, K]; f32[R, M] when `per_token`."""
    shards = row_shards(mesh)

    def score(params: Params, rows: Rows) -> jax.Array:
        logps = row_token_logps(cfg, params, rows, window=window, chunk_tokens=chunk_tokens, shards=shards)
        return logps if per_token else sum_by_slot(logps, rows)

    return jax.jit(score, out_shardings=replicated(mesh))


def place_rows(rows: Rows, mesh: Mesh) -> Rows:
    """Host rows as device arrays spread over the data axes."""
    return host_to_global(rows, rows_sharding(mesh))
