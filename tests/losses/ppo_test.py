"""PPO's losses against the paper's cases, and what the KL estimates and the KL controller must do."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.losses import ppo
from tests import ppo_oracles
from tests.tolerances import TOLERANCES

RATIOS = [0.05, 0.5, 0.79, 0.81, 0.95, 1.0, 1.05, 1.19, 1.21, 1.5, 4.0]
ADVANTAGES = [-2.0, -0.3, 0.0, 0.3, 2.0]


def assert_close(got, want, kind="closed_form"):
    np.testing.assert_allclose(got, want, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


def f32(values):
    return np.array(values, np.float32)


def slopes(fn, at):
    """(values, derivatives) of an entry-by-entry function."""
    values, pull = jax.vjp(fn, jnp.asarray(at))
    return values, pull(jnp.ones_like(values))[0]


@pytest.mark.parametrize("cliprange", [0.2, 0.03])
def test_the_policy_loss_and_its_slope_are_the_papers(cliprange):
    cases = np.array(list(itertools.product(RATIOS, ADVANTAGES)))
    ratio, advantage = cases.T
    old_logp = f32(np.linspace(-3.0, -0.1, len(cases)))
    logp = f32(old_logp + np.log(ratio))
    args = dict(old_logp=old_logp, advantage=f32(advantage), cliprange=cliprange)
    loss, slope = slopes(lambda x: ppo.policy_loss(logp=x, **args), logp)
    want_loss, want_slope = np.array([ppo_oracles.policy_loss(r, a, cliprange) for r, a in cases]).T
    assert loss.dtype == jnp.float32
    assert_close(loss, want_loss)
    assert_close(slope, want_slope)

    clipped = ppo.policy_clipped(logp=logp, **args)
    assert clipped.dtype == bool
    np.testing.assert_array_equal(clipped, (advantage != 0) & (want_slope == 0))
    assert not np.array(slope)[np.array(clipped)].any()  # exactly 0
    assert_close(ppo.ratio(logp=logp, old_logp=old_logp), ratio)


def test_the_first_step_is_the_policy_gradient():
    advantage = f32(ADVANTAGES)
    logp = f32([-0.1, -1.0, -2.5, -7.0, -0.5])
    _, slope = slopes(lambda x: ppo.policy_loss(logp=x, old_logp=logp, advantage=advantage, cliprange=0.2), logp)
    np.testing.assert_array_equal(slope, -advantage)
    assert not ppo.policy_clipped(logp=logp, old_logp=logp, advantage=advantage, cliprange=0.2).any()


@pytest.mark.parametrize("loss", ["policy", "value"])
def test_what_is_not_a_number_is_none_in_the_sum_however_many_there_are(loss):
    """XLA's maximum drops NaN on a CPU, where some thousands are summed."""
    unknown, known = jnp.full((16, 1024), jnp.nan), jnp.ones((16, 1024))

    @jax.jit
    def total(x):
        if loss == "policy":
            return ppo.policy_loss(logp=2 * x, old_logp=known, advantage=known, cliprange=0.2).sum()
        return ppo.value_loss(value=2 * x, old_value=known, returns=known, cliprange_value=0.2).sum()

    assert jnp.isnan(total(unknown)) and jnp.isfinite(total(known))


def test_the_value_loss_and_its_slope_are_half_the_larger_squared_error():
    value = [-2.0, -0.65, -0.31, 0.0, 0.28, 0.45, 3.0]
    cases = np.array(list(itertools.product(value, [-0.5, 0.1], [-1.0, 0.0, 0.33, 2.0])))
    value, old_value, returns = f32(cases.T)
    args = dict(old_value=old_value, returns=returns, cliprange_value=0.2)
    loss, slope = slopes(lambda x: ppo.value_loss(value=x, **args), value)
    want_loss, want_slope = np.array([ppo_oracles.value_loss(*case, 0.2) for case in cases]).T
    assert loss.dtype == jnp.float32
    assert_close(loss, want_loss)
    assert_close(slope, want_slope)

    clipped = ppo.value_clipped(value=value, **args)
    near = np.clip(value, old_value - np.float32(0.2), old_value + np.float32(0.2))
    np.testing.assert_array_equal(clipped, np.abs(near - returns) > np.abs(value - returns))
    assert np.array(clipped).any() and not np.array(clipped).all()
    assert not np.array(slope)[np.array(clipped)].any()


def test_a_value_near_its_old_one_is_plainly_regressed():
    value, returns = f32([0.1, -0.4, 2.0]), f32([5.0, -5.0, 2.0])
    loss, slope = slopes(
        lambda x: ppo.value_loss(value=x, old_value=value, returns=returns, cliprange_value=0.2), value
    )
    assert_close(loss, 0.5 * (value - returns) ** 2)
    np.testing.assert_array_equal(slope, value - returns)


@pytest.mark.parametrize("cliprange_value", [0.1, None])
def test_the_scale_is_the_unit_of_the_value_loss_and_of_its_clip(cliprange_value):
    cases = list(itertools.product([-2.0, -0.31, 0.0, 0.45, 3.0], [-0.5, 0.1], [-1.0, 0.33, 2.0], [0.5, 4.0]))
    value, old_value, returns, scale = f32(cases).T
    args = dict(old_value=old_value, returns=returns, cliprange_value=cliprange_value, scale=scale)
    loss, slope = slopes(lambda x: ppo.value_loss(value=x, **args), value)
    want = [ppo_oracles.value_loss(*x, cliprange_value, s) for *x, s in cases]
    assert_close(loss, [x for x, _ in want])
    assert_close(slope, [x for _, x in want])
    clipped = np.array(ppo.value_clipped(value=value, **args))
    assert not np.array(slope)[clipped].any() and clipped.any() == (cliprange_value is not None)


def test_a_clip_in_the_rewards_unit_stalls_a_critic_of_large_returns_and_one_in_theirs_does_not():
    """A critic that said 0, for a return of 5.2: a clip of 0.2 cuts its gradient once it says 0.21."""

    def slope(value, **how):
        args = dict(old_value=f32(0), returns=f32(5.2), **how)
        return jax.grad(lambda x: ppo.value_loss(value=x, **args))(jnp.float32(value))

    assert_close([slope(0.19, cliprange_value=0.2), slope(0.21, cliprange_value=0.2)], [-5.01, 0.0])
    assert_close(slope(0.21, cliprange_value=0.2, scale=5.2), -4.99 / 5.2**2)
    assert slope(1.05, cliprange_value=0.2, scale=5.2) == 0  # a fifth of the way
    assert_close(slope(1.05, cliprange_value=None, scale=5.2), -4.15 / 5.2**2)


def categorical(seed, size=7):
    """Log-probs f64[size] of a random distribution."""
    logits = 1.5 * np.random.default_rng(seed).standard_normal(size)
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased_and_k2_is_half_the_mean_square(seed):
    logp, ref = categorical(seed), categorical(seed + 100)
    p = np.exp(logp)
    estimate = {
        name: np.array(ppo.kl_estimate(logp=f32(logp), ref_logp=f32(ref), estimator=name), np.float64)
        for name in ppo.KL_ESTIMATORS
    }
    kl = np.sum(p * (logp - ref))
    assert kl > 0.1
    assert_close(np.sum(p * estimate["k1"]), kl)
    assert_close(np.sum(p * estimate["k3"]), kl)
    assert_close(np.sum(p * estimate["k2"]), 0.5 * np.sum(p * (logp - ref) ** 2))
    assert_close(estimate["k1"], logp - ref)
    assert_close(estimate["k3"], np.exp(ref - logp) - 1 - (ref - logp))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_never_negative_even_where_float32_cancels(estimator):
    distances = np.concatenate([[0.0], np.logspace(-12, 1.5, 20_001)])
    for d in (f32(distances), f32(-distances)):
        assert np.all(np.array(ppo.kl_estimate(logp=d, ref_logp=np.zeros_like(d), estimator=estimator)) >= 0)


@pytest.mark.parametrize("estimator", ppo.KL_ESTIMATORS)
def test_the_estimate_between_equal_policies_is_0(estimator):
    logp = f32(categorical(0))
    assert not np.array(ppo.kl_estimate(logp=logp, ref_logp=logp, estimator=estimator)).any()


def test_as_a_loss_k1_has_no_slope_k2_that_of_the_kl_and_k3_that_of_the_reversed_kl():
    ref, logits = f32(categorical(1)), f32(categorical(2))

    def as_loss(logits, estimator):
        logp = jax.nn.log_softmax(logits)
        each = ppo.kl_estimate(logp=logp, ref_logp=ref, estimator=estimator)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * each)

    def kl(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - ref))

    def reversed_kl(logits):
        return jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(logits)))

    assert_close(jax.grad(as_loss)(logits, "k1"), np.zeros(7))
    assert_close(jax.grad(as_loss)(logits, "k2"), jax.grad(kl)(logits))
    assert_close(jax.grad(as_loss)(logits, "k3"), jax.grad(reversed_kl)(logits))


def test_an_unknown_estimator_lists_the_choices():
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2, k3"):
        ppo.kl_estimate(logp=f32([0.0]), ref_logp=f32([0.0]), estimator="k4")


def test_the_approximate_kl_is_k2_to_the_rollouts_policy():
    logp, old = f32(categorical(3)), f32(categorical(4))
    assert_close(ppo.approx_kl(logp=logp, old_logp=old), 0.5 * (logp.astype(np.float64) - old) ** 2)
    np.testing.assert_array_equal(
        ppo.approx_kl(logp=logp, old_logp=old), ppo.kl_estimate(logp=logp, ref_logp=old, estimator="k2")
    )


def test_the_adaptive_coefficient_moves_against_the_error_and_never_by_more_than_a_fifth_of_its_step():
    kl = f32([-3.0, 0.0, 4.7, 4.9, 5.7, 6.0, 6.3, 7.1, 7.3, 50.0, np.inf])
    step = 64 / 1000
    got = jax.vmap(lambda x: ppo.adaptive_kl_coef(0.05, kl=x, target=6.0, horizon=1000.0, responses=64))(kl)
    assert got.dtype == jnp.float32
    assert_close(got, [0.05 * (1 + step * max(-0.2, min(0.2, x / 6.0 - 1))) for x in kl.tolist()])
    got = np.array(got)
    np.testing.assert_array_equal(np.sign(got - np.float32(0.05)), np.sign(kl - 6.0))
    assert np.all(np.diff(got) >= 0)
    assert_close([got.min(), got.max()], [0.05 * (1 - 0.2 * step), 0.05 * (1 + 0.2 * step)])


def test_the_adaptive_coefficient_reaches_the_target_of_a_policy_that_answers_to_it():
    """A policy whose KL is 0.3 / coef holds the target 6 at coef = 0.05; the controller finds it from either side."""

    @jax.jit
    def settle(start):
        def step(coef, _):
            return ppo.adaptive_kl_coef(coef, kl=0.3 / coef, target=6.0, horizon=100.0, responses=50), None

        return jax.lax.scan(step, start, length=300)[0]

    for start in (0.001, 0.05, 2.0):
        assert_close(settle(jnp.float32(start)), 0.05)


@pytest.mark.parametrize("dtype", [np.int32, jnp.bfloat16, np.float64])
def test_every_loss_is_float32_whatever_comes_in(dtype):
    x = np.zeros(3, dtype)
    outputs = [
        ppo.ratio(logp=x, old_logp=x),
        ppo.policy_loss(logp=x, old_logp=x, advantage=x, cliprange=0.2),
        ppo.value_loss(value=x, old_value=x, returns=x, cliprange_value=0.2),
        ppo.approx_kl(logp=x, old_logp=x),
        *(ppo.kl_estimate(logp=x, ref_logp=x, estimator=name) for name in ppo.KL_ESTIMATORS),
    ]
    assert {out.dtype for out in outputs} == {np.dtype(np.float32)}
