"""Log-probabilities of response tokens without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sera_jax.core import Array, Rows, at_most
from sera_jax.ops import backends

Unembed = Callable[[jax.Array], jax.Array]  # a decoder's: hidden states [..., D] -> logits f32[..., V]
# Of the float32 logits that are alive at a time, where no number of tokens is asked for. What fits one chunk is not
# computed again for the backward pass, so on a CPU it is as much as a small update holds anyway; an accelerator reads
# the whole head for every chunk, and of large vocabularies needs hundreds of tokens to pay for it.
LOGITS_BYTES = 2**27
LOGITS_BYTES_ON_ACCELERATORS = 2**29
MOST_TOKENS = 2048  # of an accelerator: its matmuls gain nothing from more


def default_tokens(vocab_size: int, devices: str) -> int:
    """Tokens whose logits are alive at a time on each device, one of `backends.devices`, where none are asked for."""
    if devices == "cpu":
        return LOGITS_BYTES // (4 * vocab_size)
    return min(MOST_TOKENS, LOGITS_BYTES_ON_ACCELERATORS // (4 * vocab_size))


def chunk_columns(rows: int, vocab_size: int, tokens: int, shards: int) -> int:
    """Columns of M at a time, so that the logits of about `tokens` tokens are alive on each device; 8 at least.

    Args:
        rows: R, spread over `shards` devices.
        tokens: 0: `default_tokens` of the devices at hand.
    """
    tokens = tokens or default_tokens(vocab_size, backends.devices())
    return max(8, tokens * shards // rows)


def token_logps(hidden: jax.Array, unembed: Unembed, rows: Rows, *, chunk: int) -> jax.Array:
    """Log-probability of every scored token, f32[R, M]; 0 at unused places.

    The vocabulary projection is done at most `chunk` columns of M at a time, in steps of equal width, and where there
    are several recomputed in the backward pass, so the largest live array is [R, chunk, V].

    Args:
        hidden: [R, T, D] final hidden states.
        unembed: from hidden states [R, m, D] to their logits f32[R, m, V].
        rows: the packed rows; `source` says which hidden state predicts `target`.
        chunk: most columns of M at a time; static.
    """

    def logp(logits: jax.Array, target: jax.Array) -> tuple[jax.Array]:
        return (_logp(logits, target),)

    return _by_columns(logp, hidden, unembed, rows, chunk=chunk)[0]


def token_logps_and_entropies(
    hidden: jax.Array, unembed: Unembed, rows: Rows, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`token_logps`, and the entropy (nats) of the distribution that each scored token was drawn from; f32[R, M] both.

    Arguments as in `token_logps`.
    """

    def both(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        every = jax.nn.log_softmax(logits, axis=-1)
        return _logp(logits, target), -jnp.sum(jnp.exp(every) * every, axis=-1)

    logps, entropies = _by_columns(both, hidden, unembed, rows, chunk=chunk)
    return logps, entropies


def _logp(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Of logits f32[R, m, V] and targets i32[R, m]."""
    at_target = jnp.take_along_axis(logits, target[:, :, None], axis=2)[:, :, 0]
    return at_most(at_target - jax.nn.logsumexp(logits, axis=-1), 0.0)


def _by_columns(
    of_logits: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]],
    hidden: jax.Array,
    unembed: Unembed,
    rows: Rows,
    *,
    chunk: int,
) -> tuple[jax.Array, ...]:
    """`of_logits` (f32[R, m, V], i32[R, m]) -> f32[R, m] each, over all of M; 0 at unused places."""
    width = rows.source.shape[1]
    used = rows.slot < rows.num_slots

    def columns(source: jax.Array, target: jax.Array) -> tuple[jax.Array, ...]:
        picked = jnp.take_along_axis(hidden, source[:, :, None], axis=1)  # [R, m, D]
        return of_logits(unembed(picked), target)

    if chunk >= width:
        return tuple(jnp.where(used, x, 0.0) for x in columns(rows.source, rows.target))

    # equal steps: with a full chunk and a nearly empty one, filling would cost up to as much as the work
    steps = -(-width // chunk)
    even = -(-width // steps)
    pad = steps * even - width

    def split(x: jax.Array) -> jax.Array:  # [R, M] -> [steps, R, even]
        return jnp.pad(x, ((0, 0), (0, pad))).reshape(x.shape[0], steps, even).swapaxes(0, 1)

    def joined(x: jax.Array) -> jax.Array:  # [steps, R, even] -> [R, M]
        whole = x.swapaxes(0, 1).reshape(rows.source.shape[0], steps * even)[:, :width]
        return jnp.where(used, whole, 0.0)

    body = jax.checkpoint(lambda xs: columns(*xs))
    return tuple(joined(x) for x in jax.lax.map(body, (split(rows.source), split(rows.target))))


def sum_slots(values: Array, slot: Array, num_slots: int) -> jax.Array:
    """Sum values f32[..., M] over each response slot: f32[..., K]; what unused columns hold is not read.

    Args:
        values: f32[..., M], one number per scored column.
        slot: i32[..., M] response slot of the column; `num_slots` where unused.
        num_slots: K; static.
    """

    def add(row: jax.Array, row_slot: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(row, row_slot, num_segments=num_slots + 1)[:num_slots]

    return jnp.vectorize(add, signature="(m),(m)->(k)")(values, slot)


def sum_by_slot(values: jax.Array, rows: Rows) -> jax.Array:
    """Sum values f32[R, M] over each response slot: f32[R, K]."""
    return sum_slots(values, rows.slot, rows.num_slots)


def slot_lengths(rows: Rows) -> jax.Array:
    """Scored tokens of each response slot: f32[R, K]; 0 for an empty slot."""
    return sum_by_slot((rows.slot < rows.num_slots).astype(jnp.float32), rows)
