"""Choosing the next token from logits: greedy, temperature, top-k, top-p. No sort, no noise over the vocabulary.

A draw is an inverse CDF over two levels (which block of the vocabulary, then which token of it), each with its own
uniform. Top-p is exact without finding its threshold: draw from all tokens; if the tokens strictly more likely than
the one drawn already hold `top_p` of the mass, it lies outside the nucleus, and so does everything no likelier than
it, hence draw again among the likelier ones. Every draw is the wanted distribution given that it falls inside the
nucleus, whichever draw is the first to do so; so the accepted one has exactly the nucleus distribution. One or two
passes over the logits are usual, where a bisection for the threshold takes thirty.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from sera_jax.core import at_most

# Beyond these, logits divided by the temperature leave float32; at them, the likeliest tokens have all the mass, or all
# tokens have the same.
COLDEST, HOTTEST = 1e-30, 1e30


def choose(
    *,
    logits: jax.Array,
    keys: jax.Array,
    index: jax.Array,
    temperature: float,
    top_p: float,
    top_k: int,
    min_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """The next token of every slot and its log-probability.

    Args:
        logits: f32[S, V].
        keys: typed PRNG keys [S], one per sample; the draw uses fold_in(key, index).
        index: i32[S] tokens that the sample has already.
        temperature, top_p, top_k, min_new_tokens, stop_ids: as in `SamplingParams`; static.

    Returns:
        token i32[S]; logp f32[S] at temperature 1 and without filters.
    """
    vocabulary = logits.shape[-1]
    allowed = jnp.bool_(True)
    if min_new_tokens:
        is_stop = jnp.zeros(vocabulary, bool).at[jnp.array(stop_ids)].set(True)
        allowed = ~(is_stop & (index < min_new_tokens)[:, None])
    if temperature == 0:
        token = jnp.argmax(jnp.where(allowed, logits, -jnp.inf), axis=-1).astype(jnp.int32)
    else:
        scaled = jnp.where(allowed, logits / min(max(temperature, COLDEST), HOTTEST), -jnp.inf)
        if 0 < top_k < vocabulary:
            scaled = jnp.where(scaled >= kth_largest(scaled, top_k)[:, None], scaled, -jnp.inf)
        weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
        token = draw(weights=weights, keys=jax.vmap(jax.random.fold_in)(keys, index), top_p=top_p)
    at_token = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, at_most(at_token - jax.nn.logsumexp(logits, axis=-1), 0.0)


def kth_largest(values: jax.Array, k: int) -> jax.Array:
    """The k-th largest of each row of f32[S, V], as f32[S], exactly, by bisection on the bits of the floats."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    low = jnp.full(values.shape[0], jnp.iinfo(jnp.int32).min, jnp.int32)
    high = jnp.full(values.shape[0], jnp.iinfo(jnp.int32).max, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the answer lies in [low, high]
        middle = (low >> 1) + (high >> 1) + ((low & 1) | (high & 1))  # rounded up, without overflow
        enough = jnp.sum(ordered >= middle[:, None], axis=-1) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jax.lax.bitcast_convert_type(jnp.where(low < 0, low ^ 0x7FFFFFFF, low), jnp.float32)


def draw(*, weights: jax.Array, keys: jax.Array, top_p: float) -> jax.Array:
    """A token i32[S] drawn in proportion to weights f32[S, V] >= 0 (not normalised), within the top-p nucleus.

    The nucleus is every token such that the tokens strictly heavier than it hold less than `top_p` of the row's mass.

    Args:
        keys: typed PRNG keys [S]; the n-th attempt of a row uses fold_in(key, n).
        top_p: static; 1 keeps all.
    """
    slots, vocabulary = weights.shape
    width = 2 ** round(math.log2(math.sqrt(vocabulary)))
    weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % width)))
    blocks = weights.reshape(slots, -1, width)

    def pick(sums: jax.Array, floor: jax.Array, attempt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draw among the weights above `floor`, whose sums by block are given: the token and its weight."""
        bits = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, attempt), (2,)))(keys)
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24  # [S, 2] in [0, 1)
        block = _invert(sums, uniform[:, 0])
        inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [S, width]
        column = _invert(jnp.where(inside > floor[:, None], inside, 0.0), uniform[:, 1])
        weight = jnp.take_along_axis(inside, column[:, None], axis=1)[:, 0]
        return block * width + column, weight

    sums = jnp.sum(blocks, axis=-1)
    floor = jnp.zeros(slots, weights.dtype)
    if top_p >= 1:
        return pick(sums, floor, jnp.int32(0))[0]
    limit = top_p * jnp.sum(sums, axis=-1)

    def again(state: tuple[jax.Array, ...]) -> jax.Array:
        return ~jnp.all(state[-1])

    def attempt(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        number, token, sums, floor, accepted = state
        drawn, weight = pick(sums, floor, number)
        heavier = jnp.sum(jnp.where(blocks > weight[:, None, None], blocks, 0.0), axis=-1)
        mass = jnp.sum(heavier, axis=-1)
        # Written so that NaN weights end the loop, and so does a limit that is 0 in float32, at the heaviest token.
        inside = ~(mass >= limit) | (mass == 0)
        return number + 1, jnp.where(accepted, token, drawn), heavier, weight, accepted | inside

    first = (jnp.int32(0), jnp.zeros(slots, jnp.int32), sums, floor, jnp.zeros(slots, bool))
    return jax.lax.while_loop(again, attempt, first)[1]


def _invert(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first column of weights [S, W] at which the running sum exceeds uniform [S] times the total."""
    ones = jnp.triu(jnp.ones((weights.shape[1],) * 2, weights.dtype))
    running = jnp.dot(weights, ones, precision=jax.lax.Precision.HIGHEST)  # W is small: a matmul beats a scan
    hit = (running > (uniform * running[:, -1])[:, None]) & (weights > 0)
    # Rounding can leave no hit on a column of positive weight; then the heaviest column stands for the last one.
    return jnp.where(jnp.any(hit, axis=1), jnp.argmax(hit, axis=1), jnp.argmax(weights, axis=1)).astype(jnp.int32)
