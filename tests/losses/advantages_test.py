"""Advantages and returns: the papers' sums, and what a row's other responses and unused columns must not do."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.losses import advantages
from tests import ppo_oracles
from tests.tolerances import TOLERANCES

LENGTHS = [[3, 1, 4], [2, 5], [1], []]
WIDTH, NUM_SLOTS = 12, 4
DISCOUNTS = [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 1.0), (0.9, 0.0), (0.0, 0.8), (1.0, 0.0)]

gae = jax.jit(advantages.gae)
rewards_to_go = jax.jit(advantages.rewards_to_go)


def assert_close(got, want, kind="closed_form"):
    np.testing.assert_allclose(got, want, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


def draw(seed):
    """Rows of responses of one random number per token."""
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal(n).tolist() for n in row] for row in LENGTHS]


REWARDS, VALUES = draw(1), draw(2)
SLOT = ppo_oracles.slots(REWARDS, WIDTH, NUM_SLOTS)
USED = SLOT < NUM_SLOTS
FOLLOWS = np.array(advantages.follows(SLOT, num_slots=NUM_SLOTS))


def lay(rows, fill=0.0):
    return ppo_oracles.lay(rows, WIDTH, fill).astype(np.float32)


def each(fn, *rows):
    """An oracle of one response, for every response of the rows."""
    return [[fn(*responses) for responses in zip(*row)] for row in zip(*rows)]


@pytest.mark.parametrize("gap", [0, 1])
def test_a_column_is_followed_by_its_responses_next_token_only(gap):
    slot = ppo_oracles.slots(REWARDS, WIDTH, NUM_SLOTS, gap)
    follows = each(lambda x: [True] * (len(x) - 1) + [False], REWARDS)
    starts = each(lambda x: [True] + [False] * (len(x) - 1), REWARDS)
    for got, want in (
        (advantages.follows(slot, num_slots=NUM_SLOTS), follows),
        (advantages.starts(slot, num_slots=NUM_SLOTS), starts),
    ):
        assert got.dtype == bool
        np.testing.assert_array_equal(got, ppo_oracles.lay(want, WIDTH, False, gap))


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_gae_is_the_weighted_mean_of_the_k_step_advantages(gamma, lam):
    got = gae(rewards=lay(REWARDS), values=lay(VALUES), follows=FOLLOWS, gamma=gamma, lam=lam)
    assert got.dtype == jnp.float32
    assert_close(got, lay(each(lambda r, v: ppo_oracles.gae(r, v, gamma, lam), REWARDS, VALUES)))


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_rewards_to_go_are_the_discounted_sums(gamma):
    got = rewards_to_go(rewards=lay(REWARDS), follows=FOLLOWS, gamma=gamma)
    assert got.dtype == jnp.float32
    assert_close(got, lay(each(lambda r: ppo_oracles.rewards_to_go(r, gamma), REWARDS)))


def test_with_lambda_1_the_advantage_is_the_return_less_the_value():
    got = gae(rewards=lay(REWARDS), values=lay(VALUES), follows=FOLLOWS, gamma=1.0, lam=1.0)
    assert_close(got + lay(VALUES), rewards_to_go(rewards=lay(REWARDS), follows=FOLLOWS, gamma=1.0))


def test_with_lambda_0_the_advantage_is_the_error_of_one_step():
    got = gae(rewards=lay(REWARDS), values=lay(VALUES), follows=FOLLOWS, gamma=0.9, lam=0.0)
    errors = each(lambda r, v: [a + 0.9 * after - b for a, b, after in zip(r, v, [*v[1:], 0.0])], REWARDS, VALUES)
    assert_close(got, lay(errors))


def test_a_response_gets_the_same_alone_and_packed():
    packed = gae(rewards=lay(REWARDS), values=lay(VALUES), follows=FOLLOWS, gamma=0.9, lam=0.8)
    returns = rewards_to_go(rewards=lay(REWARDS), follows=FOLLOWS, gamma=0.9)
    alone = [[response] for row in REWARDS for response in row]
    alone_values = [[response] for row in VALUES for response in row]
    slot = ppo_oracles.slots(alone, WIDTH, NUM_SLOTS)
    follows = advantages.follows(slot, num_slots=NUM_SLOTS)
    used = slot < NUM_SLOTS
    rewards, values = lay(alone), lay(alone_values)
    single = gae(rewards=rewards, values=values, follows=follows, gamma=0.9, lam=0.8)
    # the responses one after another, row by row, in both
    np.testing.assert_array_equal(np.array(packed)[USED], np.array(single)[used])
    single = rewards_to_go(rewards=rewards, follows=follows, gamma=0.9)
    np.testing.assert_array_equal(np.array(returns)[USED], np.array(single)[used])


@pytest.mark.parametrize("lead", [(), (2,), (2, 1)])
def test_the_axes_before_the_columns_are_arbitrary(lead):
    fns = [
        functools.partial(advantages.gae, gamma=0.9, lam=0.8, values=np.broadcast_to(lay(VALUES), (*lead, 4, WIDTH))),
        functools.partial(advantages.rewards_to_go, gamma=0.9),
    ]
    slot = np.broadcast_to(SLOT, (*lead, *SLOT.shape))
    follows = advantages.follows(slot, num_slots=NUM_SLOTS)
    for fn, want in zip(
        fns,
        (
            gae(rewards=lay(REWARDS), values=lay(VALUES), follows=FOLLOWS, gamma=0.9, lam=0.8),
            rewards_to_go(rewards=lay(REWARDS), follows=FOLLOWS, gamma=0.9),
        ),
    ):
        got = fn(rewards=np.broadcast_to(lay(REWARDS), slot.shape), follows=follows)
        assert got.shape == slot.shape
        assert_close(got, np.broadcast_to(want, slot.shape))


@pytest.mark.parametrize("junk", [7.0, np.inf, np.nan])
def test_what_unused_columns_hold_reaches_no_response(junk):
    clean = gae(rewards=lay(REWARDS), values=lay(VALUES), follows=FOLLOWS, gamma=0.9, lam=0.8)
    dirty = gae(rewards=lay(REWARDS, junk), values=lay(VALUES, junk), follows=FOLLOWS, gamma=0.9, lam=0.8)
    np.testing.assert_array_equal(np.array(clean)[USED], np.array(dirty)[USED])
    assert not np.array(clean)[~USED].any()

    clean_returns = rewards_to_go(rewards=lay(REWARDS), follows=FOLLOWS, gamma=0.9)
    dirty_returns = rewards_to_go(rewards=lay(REWARDS, junk), follows=FOLLOWS, gamma=0.9)
    np.testing.assert_array_equal(np.array(clean_returns)[USED], np.array(dirty_returns)[USED])

    np.testing.assert_array_equal(advantages.whiten(clean, USED), advantages.whiten(dirty, USED))
    assert advantages.batch_baseline(
        returns=clean_returns, slot=SLOT, num_slots=NUM_SLOTS
    ) == advantages.batch_baseline(returns=dirty_returns, slot=SLOT, num_slots=NUM_SLOTS)
    assert advantages.explained_variance(
        values=lay(VALUES), returns=clean_returns, mask=USED
    ) == advantages.explained_variance(values=lay(VALUES, junk), returns=dirty_returns, mask=USED)


def test_the_masked_moments_are_those_of_the_masked_entries():
    x = lay(VALUES, np.nan)
    assert_close(advantages.masked_mean(x, USED), x[USED].astype(np.float64).mean())
    assert_close(advantages.masked_variance(x, USED), x[USED].astype(np.float64).var())


def test_whitened_entries_have_mean_0_and_variance_1_over_the_mask_only():
    x = lay(VALUES, np.nan) * 3.0 + 5.0
    white = np.array(advantages.whiten(x, USED), np.float64)
    exact = x[USED].astype(np.float64)
    assert white[~USED].tolist() == [0.0] * np.sum(~USED)
    assert_close(white[USED], (exact - exact.mean()) / exact.std())
    assert_close(white[USED].mean(), 0.0)
    assert_close(white[USED].var(), 1.0)


def test_whitening_without_the_shift_keeps_the_mean():
    x = lay(VALUES, np.nan) * 3.0 + 5.0
    kept = np.array(advantages.whiten(x, USED, shift_mean=False))
    assert_close(kept[USED], np.array(advantages.whiten(x, USED))[USED] + x[USED].astype(np.float64).mean())
    assert not kept[~USED].any()


def test_nothing_a_single_entry_and_equal_entries_whiten_to_0():
    x = lay(VALUES, np.nan)
    one = np.zeros_like(USED)
    one[0, 1] = True
    assert not np.array(advantages.whiten(x, np.zeros_like(USED))).any()
    assert not np.array(advantages.whiten(x, one)).any()
    equal = np.full(4001, 0.7, np.float32)
    assert not np.array(advantages.whiten(1e3 * equal, equal > 0)).any()
    assert np.array(advantages.whiten(x, one, shift_mean=False))[0, 1] == x[0, 1]


def test_the_baseline_is_the_mean_over_responses_of_the_whole_return():
    returns = rewards_to_go(rewards=lay(REWARDS), follows=FOLLOWS, gamma=1.0)
    got = advantages.batch_baseline(returns=returns, slot=SLOT, num_slots=NUM_SLOTS)
    assert got.shape == ()
    assert_close(got, np.mean([sum(response) for row in REWARDS for response in row]))
    empty = np.full_like(SLOT, NUM_SLOTS)
    assert advantages.batch_baseline(returns=returns, slot=empty, num_slots=NUM_SLOTS) == 0.0


def test_a_perfect_critic_explains_all_a_constant_one_nothing_and_a_worse_one_less():
    returns = lay(REWARDS, np.nan)
    explained = functools.partial(advantages.explained_variance, returns=returns, mask=USED)
    assert explained(values=returns) == 1.0
    assert_close(explained(values=returns + 3.0), 1.0)  # a constant error has no variance
    assert_close(explained(values=np.full_like(returns, returns[USED].mean())), 0.0)
    assert_close(explained(values=-returns), 1.0 - 2.0**2)
    assert_close(explained(values=0.5 * returns), 1.0 - 0.5**2)


def test_returns_that_do_not_vary_leave_nothing_to_explain():
    flat = np.full(4001, 0.7, np.float32)
    noise = np.random.default_rng(0).standard_normal(4001)
    assert advantages.explained_variance(values=noise, returns=flat, mask=flat > 0) == 0.0
    assert advantages.explained_variance(values=noise, returns=flat, mask=flat < 0) == 0.0


@pytest.mark.parametrize("dtype", [np.int32, jnp.bfloat16, np.float64])
def test_every_output_is_float32_whatever_comes_in(dtype):
    x = np.ones(SLOT.shape, dtype)
    outputs = [
        advantages.gae(rewards=x, values=x, follows=FOLLOWS, gamma=1, lam=1),
        advantages.rewards_to_go(rewards=x, follows=FOLLOWS, gamma=1),
        advantages.masked_mean(x, USED),
        advantages.masked_variance(x, USED),
        advantages.whiten(x, USED),
        advantages.batch_baseline(returns=x, slot=SLOT, num_slots=NUM_SLOTS),
        advantages.explained_variance(values=x, returns=x, mask=USED),
    ]
    assert {out.dtype for out in outputs} == {np.dtype(np.float32)}
