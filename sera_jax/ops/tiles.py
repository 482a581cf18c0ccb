"""Attention in plain XLA that computes only the tiles of the mask in which some query sees some key.

Of a packed row the mask is mostly empty: items do not see one another, nor do the answers to a prompt. Which tiles are
full hangs on what was packed, so there is a loop of as many turns as there are such tiles, with a running softmax
(Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, FlashAttention, arXiv:2205.14135). No such loop can be
differentiated, so the backward pass is written out: it takes the softmax's normaliser of each query from the forward
pass, and everything else of a tile it computes again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sera_jax.ops.attention import KEPT, MASKED, scores_of

# Queries, and keys, of a tile: with fewer the matmuls are slow, with more most of what they compute is masked.
TILE = 64


class _Tiles(NamedTuple):
    """The tiles that are not empty, row after row: those of a block of queries follow one another, and each has some.

    Attributes:
        full: i32[], how many they are; of the rest of each array nothing is read.
        queries, keys: i32[n], the numbers of each one's block of queries and of keys, counted through all rows.
        seen: bool[n, TILE, TILE] of all tiles, and `number` i32[n], which of those each one is.
    """

    full: jax.Array
    queries: jax.Array
    keys: jax.Array
    number: jax.Array
    seen: jax.Array


def _tiles_of(seen: jax.Array) -> _Tiles:
    """Of bool[R, T, T]."""
    rows, length, _ = seen.shape
    across = length // TILE
    tiles = seen.reshape(rows * across, TILE, across, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)
    full = tiles.any((1, 2))
    number = jnp.flatnonzero(full, size=full.size, fill_value=0).astype(jnp.int32)
    queries = number // across
    return _Tiles(full.sum(dtype=jnp.int32), queries, queries // across * across + number % across, number, tiles)


def _blocks(x: jax.Array, groups: int) -> jax.Array:
    """[R, H, T, d] -> [R * T / TILE, G, H / G * TILE, d]: heads of a group in one matmul."""
    rows, heads, length, depth = x.shape
    x = x.reshape(rows, groups, heads // groups, -1, TILE, depth).transpose(0, 3, 1, 2, 4, 5)
    return x.reshape(rows * length // TILE, groups, -1, depth)


def _rows(x: jax.Array, rows: int) -> jax.Array:
    """The inverse of `_blocks`."""
    count, groups, _, depth = x.shape
    x = x.reshape(rows, count // rows, groups, -1, TILE, depth).transpose(0, 2, 3, 1, 4, 5)
    return x.reshape(rows, -1, count // rows * TILE, depth)


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _put(x: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)


def _scores(q: jax.Array, k: jax.Array, seen: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    """Of a tile: q [G, M, d], k [G, TILE, d], seen bool[TILE, TILE] -> f32[G, M, TILE]."""
    products = jnp.einsum("gtd,gsd->gts", q, k, preferred_element_type=jnp.float32)
    by_head = products.reshape(q.shape[0], -1, TILE, TILE)
    return scores_of(by_head, seen, scale=scale, soft_cap=soft_cap).reshape(products.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float, soft_cap: float | None
) -> jax.Array:
    return _forward(q, k, v, seen, scale, soft_cap)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, scale: float, soft_cap: float | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    groups, tiles = k.shape[1], _tiles_of(seen)
    queries, keys, values = (_blocks(x, groups) for x in (q, k, v))

    def tile(turn: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The softmax of a block's queries, with one more block of keys.

        What the tiles of a block have so far is carried by itself: the highest score is read again after it was
        replaced, so an array of those of all blocks would be copied in every turn.
        """
        mixed, normaliser, *of_block = carry
        i, j = tiles.queries[turn], tiles.keys[turn]
        another = (turn == 0) | (i != tiles.queries[turn - 1])
        so_far, before, total = (jnp.where(another, none, x) for none, x in zip((0.0, MASKED, 0.0), of_block))
        scores = _scores(_at(queries, i), _at(keys, j), _at(tiles.seen, tiles.number[turn]), scale, soft_cap)
        highest = jnp.maximum(before, scores.max(-1))
        weights, fade = jnp.exp(scores - highest[..., None]), jnp.exp(before - highest)
        more = jnp.einsum("gts,gsd->gtd", weights.astype(v.dtype), _at(values, j), preferred_element_type=jnp.float32)
        so_far = so_far * fade[..., None] + more
        total = total * fade + weights.sum(-1)
        of_all = _put(mixed, so_far / total[..., None], i), _put(normaliser, highest + jnp.log(total), i)
        return *of_all, so_far, highest, total

    each = queries.shape[:-1]
    start = tuple(
        jnp.zeros(shape, jnp.float32) for shape in (queries.shape, each, queries.shape[1:], each[1:], each[1:])
    )
    mixed, normaliser, *_ = jax.lax.fori_loop(0, tiles.full, tile, start)
    out = checkpoint_name(_rows(mixed.astype(q.dtype), q.shape[0]), KEPT)
    normaliser = checkpoint_name(normaliser, KEPT)
    return out, (q, k, v, seen, out, normaliser)


def _backward(
    scale: float, soft_cap: float | None, kept: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    q, k, v, seen, out, normaliser = kept
    groups, tiles = k.shape[1], _tiles_of(seen)
    queries, keys, values, d_mixed, mixed = (_blocks(x, groups) for x in (q, k, v, d_out, out))
    share = jnp.sum(d_mixed.astype(jnp.float32) * mixed, axis=-1)  # what all keys of a query have in common

    def tile(turn: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dq, dk, dv = carry
        i, j = tiles.queries[turn], tiles.keys[turn]
        of_tile = functools.partial(_scores, seen=_at(tiles.seen, tiles.number[turn]), scale=scale, soft_cap=soft_cap)
        # float32, or every tile's part of the sums below would be rounded to q's dtype
        scores, pull_back = jax.vjp(of_tile, *(_at(x, at).astype(jnp.float32) for x, at in ((queries, i), (keys, j))))
        weights, d_own = jnp.exp(scores - _at(normaliser, i)[..., None]), _at(d_mixed, i)
        products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_weights = products("gtd,gsd->gts", d_own, _at(values, j))
        d_queries, d_keys = pull_back(weights * (d_weights - _at(share, i)[..., None]))
        d_values = products("gts,gtd->gsd", weights.astype(v.dtype), d_own)
        return (
            _put(dq, _at(dq, i) + d_queries, i),
            _put(dk, _at(dk, j) + d_keys, j),
            _put(dv, _at(dv, j) + d_values, j),
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (queries, keys, values))
    sums = jax.lax.fori_loop(0, tiles.full, tile, start)
    dq, dk, dv = (_rows(x, q.shape[0]).astype(like.dtype) for x, like in zip(sums, (q, k, v), strict=True))
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def tiled(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *, scale: float, soft_cap: float | None
) -> jax.Array:
    """A `kernels.Kernel` on any device, of rows of a multiple of `TILE` tokens."""
    return _attend(q, k, v, seen, scale, soft_cap)
