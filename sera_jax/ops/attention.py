"""Attention: one definition of who sees whom and of what a score is, and what computes it in plain XLA.

Heads stand before tokens: on a CPU that order runs the two attention matmuls several times faster than
tokens before heads, and other back ends do not mind.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sera_jax.core import Array

BLOCK = 128  # queries handled at a time
BAND = 8  # blocks of a longer row that share a loop, and so a number of keys
KEPT = "attention"  # the name (`checkpoint_name`) of what attention gave, which `remat=dots` keeps
MASKED = -1e30  # finite, so that a fully masked (padding) query stays finite


class Places(NamedTuple):
    """Where tokens stand, i32[R, T] each or what broadcasts to it: what says who sees whom.

    Attributes:
        segment, branch, positions: as in `core.Rows`.
        column: of the row or of the cache; what stands in a later one comes after.
    """

    segment: jax.Array
    branch: jax.Array
    positions: jax.Array
    column: jax.Array

    @classmethod
    def in_rows(cls, segment: Array, branch: Array, positions: Array) -> Places:
        """Of whole rows, i32[R, T] each."""
        column = jnp.arange(segment.shape[1], dtype=jnp.int32)[None]
        return cls(jnp.asarray(segment), jnp.asarray(branch), jnp.asarray(positions), column)


class Attention(Protocol):
    """What every back end computes.

    Args:
        q: [R, H, T, d], rotated, not scaled.
        k, v: [R, G, T, d] with G dividing H.
        queries, keys: their places. The back ends of `ops.backends.ATTENTION` take rows that attend to themselves: the
            tokens of an item stand together, none before one that it sees.
        scale: of the products of queries and keys; None: d ** -0.5.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None: they stay.
        sliding_window: a model's own: a key this many positions or more before the query is not seen; None: all are.
        longest_item: no item takes more tokens of a row than this (static); None: any may fill it. It changes no
            number: it lets a back end skip keys that no query sees.

    Returns:
        [R, H, T, d] in q's dtype; softmax in float32.
    """

    def __call__(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        queries: Places,
        keys: Places,
        *,
        scale: float | None = None,
        soft_cap: float | None = None,
        sliding_window: int | None = None,
        longest_item: int | None = None,
    ) -> jax.Array: ...


def visible(queries: Places, keys: Places, *, sliding_window: int | None = None) -> jax.Array:
    """bool[R, Tq, Tk]: the key is of the query's segment, in the prompt or in its own branch, and not after it.

    Padding (segment 0) sees padding only.
    """
    segment, branch, position, column = (x[:, :, None] for x in queries)
    key_segment, key_branch, key_position, key_column = (x[:, None, :] for x in keys)
    seen = (segment == key_segment) & ((key_branch == 0) | (branch == key_branch)) & (key_column <= column)
    return seen if sliding_window is None else seen & (position - key_position < sliding_window)


def scores_of(products: jax.Array, seen: jax.Array, *, scale: float, soft_cap: float | None) -> jax.Array:
    """Scores of products of queries and keys, f32[...] both; `seen` broadcasts to them."""
    scores = products * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.where(seen, scores, MASKED)


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Places,
    keys: Places,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    longest_item: int | None = None,
    one_loop: bool = False,
) -> jax.Array:
    """`Attention` in plain XLA, `BLOCK` queries at a time; most keys that no query of a block sees are never touched.

    Blocks of a band run in a loop: their scores are alive one block at a time, and the program grows with the bands.

    Args:
        one_loop: all whole blocks in one band: the smallest program, which holds least, for up to twice the work.
    """
    rows, heads, length, depth = q.shape
    groups = k.shape[1]
    scale = depth**-0.5 if scale is None else scale
    longest = length if longest_item is None else min(longest_item, length)

    # Recomputed in the backward pass: kept, the weights of all layers are most of a step's memory, and on a CPU storing
    # and fetching them takes longer than computing them again.
    @jax.checkpoint
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
        width, across = seen.shape[1:]
        q = q.reshape(rows, groups, -1, depth)
        products = jnp.einsum("rgtd,rgsd->rgts", q, k, preferred_element_type=jnp.float32)
        products = products.reshape(rows, groups, -1, width, across)
        scores = scores_of(products, seen[:, None, None], scale=scale, soft_cap=soft_cap)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(rows, groups, -1, across)
        return jnp.einsum("rgts,rgsd->rgtd", weights, v).reshape(rows, heads, width, depth)

    def band(start: int, stop: int) -> jax.Array:
        """Mixed values of the queries [start, stop): one block, or several of `BLOCK` queries."""
        block = min(BLOCK, stop - start)
        low = max(0, start - longest + 1)  # the first key that any of these queries may see
        across = min(stop - low, longest - 1 + block)  # keys that each block is given: its own and those before it
        if one_loop and 2 * across > stop - low:
            across = stop - low  # slices cost memory: they must leave out half of the keys
        k_near, v_near, keys_near = k[:, :, low:stop], v[:, :, low:stop], Places(*(x[:, low:stop] for x in keys))
        q_own, queries_own = q[:, :, start:stop], Places(*(x[:, start:stop] for x in queries))

        def one(first: jax.Array | int, q: jax.Array, queries: Places) -> jax.Array:
            def cut(x: jax.Array, axis: int) -> jax.Array:
                if across == stop - low:
                    return x
                return jax.lax.dynamic_slice_in_dim(x, jnp.maximum(first + block - across - low, 0), across, axis)

            seen = visible(queries, Places(*(cut(x, 1) for x in keys_near)), sliding_window=sliding_window)
            return attend(q, cut(k_near, 2), cut(v_near, 2), seen)

        if stop - start == block:
            return one(start, q_own, queries_own)

        def split(x: jax.Array, axis: int) -> jax.Array:
            return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)

        blocks = (jnp.arange(start, stop, block), split(q_own, 2), Places(*(split(x, 1) for x in queries_own)))
        out = jax.lax.map(lambda xs: one(*xs), blocks)
        return jnp.moveaxis(out, 0, 2).reshape(rows, heads, stop - start, depth)

    parts = _bands(length, 0 if one_loop else longest)
    bands = [band(start, stop) for start, stop in parts]
    return checkpoint_name(jnp.concatenate(bands, axis=2) if len(bands) > 1 else bands[0], KEPT)


def _bands(length: int, longest: int) -> list[tuple[int, int]]:
    """Parts [start, stop) of a row whose blocks are handled alike.

    The blocks of a band are given as many keys as its last one. In a row of at most `BAND` blocks that would cost more
    than the loop is worth: they stand alone. In a longer one `BAND` blocks go together. Beyond the longest item every
    block has the same number of keys, and all go together. An incomplete last block stands alone.
    """
    bands, start, whole = [], 0, length - length % BLOCK
    together = BLOCK * (1 if length <= BAND * BLOCK else BAND)
    while start < length:
        if start >= whole:
            stop = length
        elif start >= longest:
            stop = whole
        else:
            stop = min(start + together, whole)
        bands.append((start, stop))
        start = stop
    return bands


def cached_attention(
    q: jax.Array,
    cached_keys: jax.Array,
    cached_values: jax.Array,
    queries: Places,
    keys: Places,
    *,
    orders: tuple[str, str],
    scale: float | None = None,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> jax.Array:
    """`Attention` of one query per slot over a decoding cache of C columns.

    Args:
        q: [S, H, 1, d].
        cached_keys, cached_values: slots s, key/value heads g, columns c and depth d, in the order of their axes that
            `orders` names, such as "sgdc" for keys [S, G, d, C].
        queries, keys: i32[S, 1] and i32[S, C], or what broadcasts to them.
    """
    slots, heads, _, depth = q.shape
    of_keys, of_values = orders
    grouped = q.reshape(slots, cached_keys.shape[of_keys.index("g")], -1, depth)
    products = jnp.einsum(f"sgrd,{of_keys}->sgrc", grouped, cached_keys, preferred_element_type=jnp.float32)
    seen = visible(queries, keys, sliding_window=sliding_window)[:, None]
    scale = depth**-0.5 if scale is None else scale
    scores = scores_of(products, seen, scale=scale, soft_cap=soft_cap)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    mixed = jnp.einsum(
        f"sgrc,{of_values}->sgrd",
        weights.astype(cached_values.dtype),
        cached_values,
        preferred_element_type=jnp.float32,
    )
    mixed /= jnp.sum(weights, axis=-1, keepdims=True)  # divided last: d numbers per query instead of C
    return mixed.astype(q.dtype).reshape(slots, heads, 1, depth)
