"""Log-probabilities of response tokens without ever holding the logits of a whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sera_jax.core import Rows


def token_logps(
    hidden: jax.Array, head: jax.Array, rows: Rows, *, chunk: int, logits_dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Log-probability of every scored token, f32[R, M]; 0 at unused places.

    The vocabulary projection is done at most `chunk` columns of M at a time, in steps of equal width, and recomputed in
    the backward pass, so the largest live array is [R, chunk, V].

    Args:
        hidden: [R, T, D] final hidden states.
        head: [D, V] output projection.
        rows: the packed rows; `source` says which hidden state predicts `target`.
        chunk: most columns of M at a time; static.
        logits_dtype: dtype of the logits; log-sum-exp is float32 whatever it is.
    """
    width = rows.source.shape[1]
    used = rows.slot < rows.num_slots

    def columns(source: jax.Array, target: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(hidden, source[:, :, None], axis=1)  # [R, m, D]
        logits = jnp.einsum("rmd,dv->rmv", picked, head, preferred_element_type=logits_dtype).astype(jnp.float32)
        at_target = jnp.take_along_axis(logits, target[:, :, None], axis=2)[:, :, 0]
        return jnp.minimum(at_target - jax.nn.logsumexp(logits, axis=-1), 0.0)

    if chunk >= width:
        return jnp.where(used, columns(rows.source, rows.target), 0.0)

    # equal steps: with a full chunk and a nearly empty one, filling would cost up to as much as the work
    steps = -(-width // chunk)
    even = -(-width // steps)
    pad = steps * even - width

    def split(x: jax.Array) -> jax.Array:  # [R, M] -> [steps, R, even]
        return jnp.pad(x, ((0, 0), (0, pad))).reshape(x.shape[0], steps, even).swapaxes(0, 1)

    body = jax.checkpoint(lambda xs: columns(*xs))
    out = jax.lax.map(body, (split(rows.source), split(rows.target)))  # [steps, R, even]
    out = out.swapaxes(0, 1).reshape(rows.source.shape[0], steps * even)[:, :width]
    return jnp.where(used, out, 0.0)


def sum_by_slot(values: jax.Array, rows: Rows) -> jax.Array:
    """Sum values f32[R, M] over each response slot: f32[R, K]."""
    add = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=rows.num_slots + 1))
    return add(values, rows.slot)[:, : rows.num_slots]


def slot_lengths(rows: Rows) -> jax.Array:
    """Scored tokens of each response slot: f32[R, K]; 0 for an empty slot."""
    return sum_by_slot((rows.slot < rows.num_slots).astype(jnp.float32), rows)
