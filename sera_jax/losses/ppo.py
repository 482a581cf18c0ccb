"""PPO's losses and estimates, one number per token.

Arrays are f32[...] of one shape, nats where they are log-probs; every function works entry by entry, so the caller
masks unused columns and takes the mean. `old_` is what the rollout's policy or critic said, `ref_` what the reference
says; they, advantages and returns are data, and the caller lets no gradient through them.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sera_jax.core import Array

# Ziegler et al. 2019, sec. 2.2: the largest relative error that one correction of the KL coefficient acts on.
MAX_KL_ERROR = 0.2


def ratio(*, logp: Array, old_logp: Array) -> jax.Array:
    """pi(token) / pi_old(token), f32[...]."""
    return jnp.exp(jnp.float32(logp) - jnp.float32(old_logp))


def _policy_branches(logp: Array, old_logp: Array, advantage: Array, cliprange: float) -> tuple[jax.Array, jax.Array]:
    """The negated objective with the ratio as it is, and with the ratio cut to 1 +- cliprange."""
    moved, advantage = ratio(logp=logp, old_logp=old_logp), jnp.float32(advantage)
    return -advantage * moved, -advantage * jnp.clip(moved, 1.0 - cliprange, 1.0 + cliprange)


def policy_loss(*, logp: Array, old_logp: Array, advantage: Array, cliprange: float) -> jax.Array:
    """PPO's clipped objective, negated, f32[...]: max(-A r, -A clip(r, 1 - c, 1 + c)).

    Args:
        logp, old_logp: f32[...] log-prob of the token under the policy and under the rollout's policy.
        advantage: f32[...].
        cliprange: c; at most 1.

    Source: Schulman et al. 2017, eq. 7.
    """
    plain, clipped = _policy_branches(logp, old_logp, advantage, cliprange)
    return jnp.where(clipped > plain, clipped, plain)  # NaN where plain is: see `core.at_most`


def policy_clipped(*, logp: Array, old_logp: Array, advantage: Array, cliprange: float) -> jax.Array:
    """Where the clip decides `policy_loss`, bool[...]: the token's gradient is 0 there."""
    plain, clipped = _policy_branches(logp, old_logp, advantage, cliprange)
    return clipped > plain


def _value_branches(
    value: Array, old_value: Array, returns: Array, cliprange_value: float | None, scale: Array | float
) -> tuple[jax.Array, jax.Array]:
    """The squared error of the value as it is, and of the value cut to old_value +- cliprange_value, all / scale."""
    value, old_value, returns = (jnp.float32(x) / scale for x in (value, old_value, returns))
    plain = jnp.square(value - returns)
    if cliprange_value is None:
        return plain, plain
    near = jnp.clip(value, old_value - cliprange_value, old_value + cliprange_value)
    return plain, jnp.square(near - returns)


def value_loss(
    *, value: Array, old_value: Array, returns: Array, cliprange_value: float | None, scale: Array | float = 1.0
) -> jax.Array:
    """Half the larger squared error of the value and of the value cut to its old one +- cliprange_value, f32[...].

    Args:
        value, old_value: f32[...] of the critic now and at the rollout.
        returns: f32[...] what the critic regresses on.
        cliprange_value: in units of the scale; None: the value is not cut.
        scale: f32[...] or a number, positive: the unit that value, old value and returns are measured in. All four
            times c leave the loss as it is.

    Source: the value clipping of OpenAI's PPO, which the paper does not state; described by Engstrom et al. 2020.
    """
    plain, clipped = _value_branches(value, old_value, returns, cliprange_value, scale)
    return 0.5 * jnp.where(clipped > plain, clipped, plain)


def value_clipped(
    *, value: Array, old_value: Array, returns: Array, cliprange_value: float | None, scale: Array | float = 1.0
) -> jax.Array:
    """Where the clip decides `value_loss`, bool[...]: the token's gradient is 0 there."""
    plain, clipped = _value_branches(value, old_value, returns, cliprange_value, scale)
    return clipped > plain


# Each of logratio = log pi - log ref at a token drawn from pi.
KL_ESTIMATORS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "k1": lambda logratio: logratio,
    "k2": lambda logratio: 0.5 * jnp.square(logratio),
    "k3": lambda logratio: jnp.expm1(-logratio) + logratio,
}


def kl_estimate(*, logp: Array, ref_logp: Array, estimator: str) -> jax.Array:
    """Estimate of KL(pi || ref) from a token drawn from pi, nats, f32[...].

    k1 and k3 are unbiased, k2 is not; k2 and k3 are never negative. As a term of a loss on tokens drawn from pi the
    estimates have other slopes than as a number: k1 none in expectation, k2 that of KL(pi || ref), k3 that of
    KL(ref || pi).

    Args:
        logp, ref_logp: f32[...] log-prob of the token under the policy and under the reference.
        estimator: a name in KL_ESTIMATORS: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, with d = logp - ref_logp.

    Raises:
        ValueError: the estimator's name is unknown.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"KL estimator is {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[estimator](jnp.float32(logp) - jnp.float32(ref_logp))


def approx_kl(*, logp: Array, old_logp: Array) -> jax.Array:
    """How far an update has moved from the rollout's policy, nats, f32[...]: (logp - old_logp)^2 / 2.

    It is k2 with the rollout's policy, and what other tools log as policy/approxkl.
    """
    return 0.5 * jnp.square(jnp.float32(logp) - jnp.float32(old_logp))


def adaptive_kl_coef(
    kl_coef: Array | float, *, kl: Array | float, target: float, horizon: float, responses: Array | float
) -> jax.Array:
    """The KL coefficient after an iteration, f32[]: larger where the KL was above its target, smaller below.

    kl_coef (1 + e responses / horizon), with e = kl / target - 1 cut to +-0.2. It stays positive as long as
    responses < 5 horizon.

    Args:
        kl_coef: the coefficient of the iteration.
        kl: mean KL to the reference in it, nats per response.
        target: nats per response, positive.
        horizon: responses over which an error of 1 would double the coefficient, were it not cut.
        responses: how many the iteration had.

    Source: Ziegler et al. 2019, sec. 2.2, with K_beta = responses / horizon.
    """
    error = jnp.clip(jnp.float32(kl) / target - 1.0, -MAX_KL_ERROR, MAX_KL_ERROR)
    return jnp.float32(kl_coef) * (1.0 + error * responses / horizon)
