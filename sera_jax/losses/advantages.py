"""Returns and advantages of response tokens in packed rows.

Arrays are f32[..., R, M], one number per scored column, in the layout of `core.Rows`; the axes before M are arbitrary.
A response ends at its last token, whether it ended by itself or was cut: what comes after is worth 0. No function lets
one response, or what an unused column holds, reach another response.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sera_jax.core import Array


def follows(slot: Array, *, num_slots: int) -> jax.Array:
    """Whether the next column holds the next token of the same response, bool[..., M].

    False at the last token of a response and at unused columns.

    Args:
        slot: i32[..., M] response slot of the column; `num_slots` where unused. A response's columns are contiguous.
        num_slots: K.
    """
    slot = jnp.asarray(slot)
    after = jnp.concatenate([slot[..., 1:], jnp.full_like(slot[..., :1], num_slots)], axis=-1)
    return (slot == after) & (slot < num_slots)


def starts(slot: Array, *, num_slots: int) -> jax.Array:
    """Whether the column holds the first token of a response, bool[..., M]; False at unused columns."""
    slot = jnp.asarray(slot)
    before = jnp.concatenate([jnp.full_like(slot[..., :1], num_slots), slot[..., :-1]], axis=-1)
    return (slot != before) & (slot < num_slots)


def _sum_of_later(terms: jax.Array, follows: Array, decay: Array | float) -> jax.Array:
    """x_t + decay x_(t+1) + decay^2 x_(t+2) + ... to the end of the response, f32[..., M]."""

    def step(later: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        term, more = now
        total = term + jnp.where(more, decay * later, 0.0)
        return total, total

    columns = (jnp.moveaxis(terms, -1, 0), jnp.moveaxis(jnp.asarray(follows), -1, 0))
    _, totals = jax.lax.scan(step, jnp.zeros(terms.shape[:-1], jnp.float32), columns, reverse=True)
    return jnp.moveaxis(totals, 0, -1)


def gae(*, rewards: Array, values: Array, follows: Array, gamma: Array | float, lam: Array | float) -> jax.Array:
    """Generalised advantage estimate of each token, f32[..., M], in the units of the rewards.

    A_t = sum over l of (gamma lam)^l d_(t+l), d_t = r_t + gamma V_(t+1) - V_t, with V = 0 after the last token.

    Args:
        rewards: f32[..., M] what each token is paid.
        values: f32[..., M] the critic's value of the state in which the token was chosen.
        follows: bool[..., M] from `follows`.
        gamma, lam: in [0, 1].

    An unused column gets its own reward less its own value: 0 where both are 0, as the layout has them.

    Source: Schulman et al. 2016, eq. 16.
    """
    values = jnp.float32(values)
    after = jnp.concatenate([values[..., 1:], jnp.zeros_like(values[..., :1])], axis=-1)
    errors = jnp.float32(rewards) + gamma * jnp.where(follows, after, 0.0) - values
    return _sum_of_later(errors, follows, gamma * lam)


def rewards_to_go(*, rewards: Array, follows: Array, gamma: Array | float) -> jax.Array:
    """Discounted return from each token to the end of its response, f32[..., M].

    Args:
        rewards: f32[..., M]; 0 at unused columns, which get their own reward back.
        follows: bool[..., M] from `follows`.
        gamma: in [0, 1].
    """
    return _sum_of_later(jnp.float32(rewards), follows, gamma)


def masked_mean(x: Array, mask: Array) -> jax.Array:
    """Mean of the masked entries of the whole array, f32[]; 0 where there are none. Other entries may be nan."""
    x = jnp.float32(x)
    count = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    rough = jnp.sum(jnp.where(mask, x, 0.0)) / count
    # The second sum takes away what the first lost to rounding: equal entries have exactly their own mean, and so a
    # variance of exactly 0.
    return rough + jnp.sum(jnp.where(mask, x - rough, 0.0)) / count


def masked_variance(x: Array, mask: Array) -> jax.Array:
    """Variance (over n, not n - 1) of the masked entries of the whole array, f32[]; 0 where there are none."""
    return masked_mean(jnp.square(jnp.float32(x) - masked_mean(x, mask)), mask)


def whiten(x: Array, mask: Array, *, shift_mean: bool = True, epsilon: float = 1e-8) -> jax.Array:
    """Scale the masked entries of the whole array to mean 0 and variance 1, f32 of the shape of x; 0 elsewhere.

    Args:
        x: f32[...].
        mask: bool[...] the entries that count.
        shift_mean: False keeps their mean.
        epsilon: added to the variance; equal entries, or a single one, come out as their distance to the mean, 0.
    """
    x, mean = jnp.float32(x), masked_mean(x, mask)
    white = (x - mean) * jax.lax.rsqrt(masked_variance(x, mask) + epsilon)
    return jnp.where(mask, white if shift_mean else white + mean, 0.0)


def batch_baseline(*, returns: Array, slot: Array, num_slots: int) -> jax.Array:
    """REINFORCE's baseline: the mean over responses of the return at the first token, f32[]; 0 without responses.

    Every response counts once, whatever its length. A response's own return is in the mean, so with n responses the
    expected gradient is (n - 1) / n of that with a baseline from elsewhere.

    Args:
        returns: f32[..., M] from `rewards_to_go`.
        slot, num_slots: the layout, as for `follows`.

    Source: Williams 1992.
    """
    return masked_mean(returns, starts(slot, num_slots=num_slots))


def explained_variance(*, values: Array, returns: Array, mask: Array) -> jax.Array:
    """1 - Var(returns - values) / Var(returns) over the masked entries, f32[].

    1 for a perfect critic, 0 for a constant one, negative for one that is worse than a constant. 0 where the returns
    do not vary: then there is nothing to explain.
    """
    total = masked_variance(returns, mask)
    missed = masked_variance(jnp.float32(returns) - jnp.float32(values), mask)
    return jnp.where(total > 0.0, 1.0 - missed / jnp.where(total > 0.0, total, 1.0), 0.0)
