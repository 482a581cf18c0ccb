"""Attention over packed rows and over a decoding cache. Pure functions of arrays.

Heads stand before tokens: on a CPU that order runs the two attention matmuls several times faster than
tokens before heads, and other back ends do not mind.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128  # query rows handled at a time; keys outside [block start - window, block end) are never touched
_MASKED = -1e30  # finite, so that a fully masked (padding) query stays finite


def row_mask(segment_q: jax.Array, branch_q: jax.Array, segment_k: jax.Array, branch_k: jax.Array) -> jax.Array:
    """bool[R, Tq, Tk]: same segment, and the key is in the prompt or in the query's own branch.

    Causality is not part of it. Padding (segment 0) sees padding only.
    """
    same = segment_q[:, :, None] == segment_k[:, None, :]
    visible = (branch_k[:, None, :] == 0) | (branch_q[:, :, None] == branch_k[:, None, :])
    return same & visible


def packed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, branch: jax.Array, *, window: int | None = None
) -> jax.Array:
    """Causal attention of packed rows (DESIGN: a key is seen iff same segment, not later, prompt or own branch).

    Works block by block over queries, so keys after a block or more than `window` tokens before it cost nothing.

    Args:
        q: [R, H, T, d], already rotated, not scaled.
        k, v: [R, G, T, d] with G dividing H.
        segment, branch: i32[R, T].
        window: no item is longer than this many tokens (static); None: as long as the row.

    Returns:
        [R, H, T, d] in q's dtype; softmax in float32.
    """
    rows, heads, length, depth = q.shape
    groups = k.shape[1]
    repeat = heads // groups
    window = length if window is None else min(window, length)
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        low = max(0, start - window + 1)
        width, keys = stop - start, stop - low
        block_q = q[:, :, start:stop].reshape(rows, groups, repeat * width, depth)
        scores = jnp.einsum("rgtd,rgsd->rgts", block_q, k[:, :, low:stop], preferred_element_type=jnp.float32)
        scores = scores.reshape(rows, groups, repeat, width, keys) * depth**-0.5
        mask = row_mask(segment[:, start:stop], branch[:, start:stop], segment[:, low:stop], branch[:, low:stop])
        mask &= (jnp.arange(low, stop)[None, :] <= jnp.arange(start, stop)[:, None])[None]
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1).astype(v.dtype)
        weights = weights.reshape(rows, groups, repeat * width, keys)
        out = jnp.einsum("rgts,rgsd->rgtd", weights, v[:, :, low:stop])
        blocks.append(out.reshape(rows, heads, width, depth))
    return jnp.concatenate(blocks, axis=2) if len(blocks) > 1 else blocks[0]
