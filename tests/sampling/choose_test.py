"""Laws of the token choice, on toy vocabularies whose distribution is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sera_jax.sampling.choose import choose, draw, kth_largest
from tests.tolerances import TOLERANCES

DRAWS = 20_000
# One draw in ten thousand would fail by chance; the seeds are fixed, so it either always does or never.
CHANCE = 1e-4


def frequencies(logits, **settings):
    settings = dict(temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0, stop_ids=(0,)) | settings
    keys = jax.random.split(jax.random.key(3), DRAWS)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, len(logits)))
    run = jax.jit(lambda rows, keys: choose(logits=rows, keys=keys, index=jnp.zeros(DRAWS, jnp.int32), **settings))
    token, logp = jax.device_get(run(rows, keys))
    return np.bincount(token, minlength=len(logits)), token, logp


def oracle(logits, temperature=1.0, top_p=1.0, top_k=0, banned=()):
    """The filtered softmax in float64, by sorting: top-k first, then top-p on what is left; ties are kept."""
    logits = np.asarray(logits, np.float64) / temperature
    logits[list(banned)] = -np.inf
    if top_k:
        logits[logits < np.sort(logits)[-top_k]] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    heavier = np.array([p[p > x].sum() for x in p])
    p = np.where(heavier < top_p, p, 0.0)
    return p / p.sum()


def assert_distributed(counts, p):
    assert counts[p == 0].sum() == 0
    kept = p > 0
    if kept.sum() > 1:
        assert stats.chisquare(counts[kept], DRAWS * p[kept]).pvalue > CHANCE


TOY = np.array([1.0, 0.2, 2.0, 0.2, -1.0, 1.5, -3.0, 0.0, 0.7, -0.5, 1.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_match_the_softmax_at_the_temperature(temperature):
    counts, _, _ = frequencies(TOY, temperature=temperature)
    assert_distributed(counts, oracle(TOY, temperature))


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.8, 0.95])
def test_sampled_frequencies_match_the_nucleus(top_p):
    counts, _, _ = frequencies(TOY, top_p=top_p)
    assert_distributed(counts, oracle(TOY, top_p=top_p))


@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 11, 100])
def test_sampled_frequencies_match_the_k_most_likely(top_k):
    counts, _, _ = frequencies(TOY, top_k=top_k)
    assert_distributed(counts, oracle(TOY, top_k=min(top_k, len(TOY))))


def test_top_p_is_applied_to_what_top_k_leaves():
    counts, _, _ = frequencies(TOY, top_k=4, top_p=0.7, temperature=0.8)
    expected = oracle(TOY, top_k=4, top_p=0.7, temperature=0.8)
    assert 1 < (expected > 0).sum() < 4
    assert_distributed(counts, expected)


def test_tokens_that_tie_with_the_last_kept_one_are_kept():
    logits = np.array([3.0, 1.0, 1.0, 1.0, 0.0])
    assert set(np.flatnonzero(frequencies(logits, top_k=2)[0])) == {0, 1, 2, 3}
    top_p = float(oracle(logits)[0]) + 0.01  # the nucleus needs one of the three tied tokens
    assert set(np.flatnonzero(frequencies(logits, top_p=top_p)[0])) == {0, 1, 2, 3}


def test_a_vocabulary_of_many_blocks_is_sampled_like_a_small_one():
    logits = np.random.default_rng(0).normal(size=1000) * 2
    counts, _, _ = frequencies(logits, top_p=0.9)
    p = oracle(logits, top_p=0.9)
    assert counts[p == 0].sum() == 0
    order = np.argsort(p)[::-1]
    groups = np.array_split(order[: (p > 0).sum()], 20)  # chi-square wants more than a few draws per cell
    assert stats.chisquare([counts[g].sum() for g in groups], [DRAWS * p[g].sum() for g in groups]).pvalue > CHANCE


def test_temperature_zero_takes_the_most_likely_token():
    counts, _, _ = frequencies(TOY, temperature=0.0)
    assert counts[TOY.argmax()] == DRAWS


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1e-40}, {"top_p": 1e-40}, {"temperature": 1e-300, "top_p": 1e-300, "top_k": 3}],
    ids=str,
)
def test_however_small_temperature_or_top_p_are_the_likeliest_token_is_drawn(settings):
    """Where float32 has no such number, too, and whatever the scale of the logits."""
    settings = dict(temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0, stop_ids=(0,)) | settings
    logits = jnp.stack([jnp.asarray(TOY, jnp.float32) * scale for scale in (1.0, 1e-3, 40.0)])
    keys, start = jax.random.split(jax.random.key(0), 3), jnp.zeros(3, jnp.int32)
    token, logp = jax.jit(functools.partial(choose, **settings))(logits=logits, keys=keys, index=start)
    np.testing.assert_array_equal(token, TOY.argmax())
    assert np.isfinite(logp).all()


@pytest.mark.parametrize("temperature", [1e30, 1e300])
def test_however_large_the_temperature_is_every_token_that_is_allowed_is_drawn_alike(temperature):
    counts, _, _ = frequencies(TOY, temperature=temperature, min_new_tokens=1, stop_ids=(2, 5))
    assert_distributed(counts, oracle(np.zeros(len(TOY)), banned=(2, 5)))


def test_stop_tokens_cannot_be_chosen_before_the_least_length():
    logits = jnp.broadcast_to(jnp.array([0.0, 5.0, 1.0, 6.0]), (4, 4))
    index = jnp.array([0, 1, 2, 3])
    for temperature in (0.0, 1e-3):
        token, _ = choose(
            logits=logits,
            keys=jax.random.split(jax.random.key(0), 4),
            index=index,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            min_new_tokens=2,
            stop_ids=(1, 3),
        )
        np.testing.assert_array_equal(token, [2, 2, 3, 3])


def test_forbidding_the_stop_tokens_renormalises_the_rest():
    counts, _, _ = frequencies(TOY, min_new_tokens=1, stop_ids=(2, 5), top_p=0.9)
    assert_distributed(counts, oracle(TOY, top_p=0.9, banned=(2, 5)))


def test_logps_are_those_of_the_unfiltered_softmax_at_temperature_one():
    _, token, logp = frequencies(TOY, temperature=0.6, top_p=0.7, top_k=5)
    np.testing.assert_allclose(logp, np.log(oracle(TOY))[token], **bounds("closed_form"))


def test_a_draw_depends_on_its_key_and_index_only():
    keys = jax.random.split(jax.random.key(1), 6)
    weights = jnp.exp(jax.random.normal(jax.random.key(2), (6, 40)))
    together = draw(weights=weights, keys=keys, top_p=0.6)
    for row in range(6):
        rotated = draw(weights=jnp.roll(weights, row, axis=0), keys=jnp.roll(keys, row), top_p=0.6)
        np.testing.assert_array_equal(jnp.roll(rotated, -row), together)


def test_the_kth_largest_is_exact_for_any_finite_floats():
    values = np.random.default_rng(0).normal(size=(5, 33)) * 10.0 ** np.arange(-20, 5, 5)[:, None]
    values = values.astype(np.float32)
    values[0, :5], values[1, :] = 0.0, -7.5
    for k in (1, 2, 17, 33):
        np.testing.assert_array_equal(kth_largest(jnp.asarray(values), k), np.sort(values, axis=1)[:, -k])


def test_logits_that_are_not_numbers_do_not_hang_the_draw():
    token = draw(weights=jnp.full((2, 9), jnp.nan), keys=jax.random.split(jax.random.key(0), 2), top_p=0.5)
    assert token.shape == (2,)


def bounds(kind):
    return {name: TOLERANCES[kind][name] for name in ("rtol", "atol")}
