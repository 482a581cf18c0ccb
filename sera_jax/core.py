"""Types that every layer shares: packed rows, means, named random streams.

Axis letters, the same everywhere:

    R rows            T tokens of a row      M scored positions of a row
    K response slots  Q pairs of a row       B a flat batch (responses or pairs)
    D hidden size     V vocabulary           H query heads, G key/value heads
    L layers          S decode slots         N candidates per prompt
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


def at_most(x: Array, limit: float) -> jax.Array:
    """f32[...], x where it is not above the limit, and NaN where x is: on a CPU XLA's minimum and maximum make a number
    of it where there are some thousands."""
    return jnp.where(x > limit, limit, x)


@struct.dataclass
class Rows:
    """Items (a prompt and its responses) laid into rows of fixed length.

    A query sees a key iff both lie in the same segment, the key is not after the query, and the key is in
    the prompt (branch 0) or in the query's own branch. Positions restart after the prompt for every branch,
    so one copy of the prompt serves all its responses.

    Attributes:
        tokens: i32[R, T] token ids; 0 where `segment` is 0.
        positions: i32[R, T] position of the token within prompt + its own response.
        segment: i32[R, T] 0 is padding, s >= 1 the s-th item of the row.
        branch: i32[R, T] 0 is the prompt, b >= 1 the item's b-th response.
        source: i32[R, M] index into T of the hidden state that predicts `target`.
        target: i32[R, M] a response token.
        slot: i32[R, M] response slot of the row that the target belongs to; `num_slots` where unused.
        num_slots: K, response slots of a row (static).
    """

    tokens: Array
    positions: Array
    segment: Array
    branch: Array
    source: Array
    target: Array
    slot: Array
    num_slots: int = struct.field(pytree_node=False)


@struct.dataclass
class PairBatch:
    """Rows and the preference pairs that lie in them; a pair never straddles rows.

    Attributes:
        rows: the packed rows.
        chosen_slot, rejected_slot: i32[R, Q] response slots of the row.
        weight: f32[R, Q] weight of the pair's loss; 0 where the place is filling.
        ref_logp: f32[R, K] summed reference log-probability of each slot's response (0 without reference).
    """

    rows: Rows
    chosen_slot: Array
    rejected_slot: Array
    weight: Array
    ref_logp: Array


@struct.dataclass
class Mean:
    """A metric until it is written: a total and its weight, so that microbatches and hosts add exactly."""

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> Mean:
        """Weighted mean of per-example values; entries of weight 0 are ignored even when not finite."""
        values = jnp.where(weights > 0, values, 0.0)
        return cls(jnp.sum(values * weights, dtype=jnp.float32), jnp.sum(weights, dtype=jnp.float32))

    def over(self, lengths: Array, weights: Array) -> Mean:
        """The same total per unit of length: a mean over tokens where `of` was a mean over responses."""
        return Mean(self.total, jnp.sum(lengths * weights, dtype=jnp.float32))

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> float:
        """The mean as a float; nan when nothing was counted."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")


class Stream(enum.IntEnum):
    """Named random streams. A draw is keyed by its stream and indices, never by call order."""

    INIT = 1
    SHUFFLE = 2
    SAMPLE = 3
    NOISE = 4
    SELECT = 5
    WORLD = 6
    SPLIT = 7
    BOOTSTRAP_CI = 8
    PROMPTS = 9
    REWARD = 10
    ADAPTERS = 11
    DROPOUT = 12


def key_for(seed: int, stream: Stream, *indices: int) -> jax.Array:
    """A jax PRNG key for the draw named by (seed, stream, indices)."""
    key = jax.random.fold_in(jax.random.key(seed), int(stream))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def rng_for(seed: int, stream: Stream, *indices: int) -> np.random.Generator:
    """A numpy generator for the host-side draw named by (seed, stream, indices); indices are >= 0."""
    return np.random.default_rng(np.random.SeedSequence([seed, int(stream), *indices]))
