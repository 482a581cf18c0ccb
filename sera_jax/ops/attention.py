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

    # Recomputed in the backward pass: kept, the weights of all layers are most of a step's memory, and on a CPU storing
    # and fetching them takes longer than computing them again.
    @jax.checkpoint
    def attend(block_q: jax.Array, block_k: jax.Array, block_v: jax.Array, mask: jax.Array) -> jax.Array:
        width, keys = mask.shape[1:]
        block_q = block_q.reshape(rows, groups, repeat * width, depth)
        scores = jnp.einsum("rgtd,rgsd->rgts", block_q, block_k, preferred_element_type=jnp.float32)
        scores = scores.reshape(rows, groups, repeat, width, keys) * depth**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, _MASKED), axis=-1).astype(v.dtype)
        weights = weights.reshape(rows, groups, repeat * width, keys)
        out = jnp.einsum("rgts,rgsd->rgtd", weights, block_v)
        return out.reshape(rows, heads, width, depth)

    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        low = max(0, start - window + 1)
        mask = row_mask(segment[:, start:stop], branch[:, start:stop], segment[:, low:stop], branch[:, low:stop])
        mask &= (jnp.arange(low, stop)[None, :] <= jnp.arange(start, stop)[:, None])[None]
        blocks.append(attend(q[:, :, start:stop], k[:, :, low:stop], v[:, :, low:stop], mask))
    return jnp.concatenate(blocks, axis=2) if len(blocks) > 1 else blocks[0]
