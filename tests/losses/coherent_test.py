"""The coherent reward and its placement against plain loops, and what packing and filling must not do to it."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.losses import coherent
from tests import ppo_oracles
from tests.tolerances import TOLERANCES

# Responses of each row, and whether they ended by themselves: single tokens of either kind, and an empty row.
LENGTHS = [[3, 1, 4], [1, 5], []]
FINISHED = [[True, False, False], [True, True], []]
WIDTH, NUM_SLOTS = 10, 4

RULES = [
    dict(missing_eos=missing_eos, count_eos=count_eos, length_normalize=length_normalize, missing_eos_penalty=penalty)
    for missing_eos, count_eos, length_normalize, penalty in itertools.product(
        coherent.MISSING_EOS, [True, False], [True, False], [1.75]
    )
]
PLAIN = dict(missing_eos="penalty", count_eos=True, length_normalize=False, missing_eos_penalty=1.0)


def assert_close(got, want, kind="closed_form"):
    np.testing.assert_allclose(got, want, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


def draw(seed):
    rng = np.random.default_rng(seed)
    return [[rng.standard_normal(n).tolist() for n in row] for row in LENGTHS]


LOGRATIOS = draw(0)
LAYOUT = dict(
    slot=ppo_oracles.slots(LOGRATIOS, WIDTH, NUM_SLOTS),
    num_slots=NUM_SLOTS,
    finished=ppo_oracles.of_slots(FINISHED, NUM_SLOTS, True).astype(bool),  # empty slots may say either
)
USED = LAYOUT["slot"] < NUM_SLOTS


def place(*, logratios, scores, slot, num_slots, finished, placement, mean=0.0, std=1.0, clip=None, **rules):
    """`coherent.place` of what `coherent.shares` gives by the rules."""
    at = dict(slot=slot, num_slots=num_slots)
    shares = coherent.shares(logratios, finished=finished, **at, **rules)
    return coherent.place(shares=shares, scores=scores, placement=placement, mean=mean, std=std, clip=clip, **at)


def lay(rows, fill=0.0, gap=0):
    return ppo_oracles.lay(rows, WIDTH, fill, gap).astype(np.float32)


def each(fn):
    """An oracle of (log-ratios, finished), for every response."""
    return [[fn(*response) for response in zip(*row)] for row in zip(LOGRATIOS, FINISHED)]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_scores_are_the_sums_of_log_ratios_under_every_rule(rules):
    got = coherent.scores(lay(LOGRATIOS), **LAYOUT, **rules)
    assert got.dtype == jnp.float32
    assert_close(got, ppo_oracles.of_slots(each(lambda x, end: ppo_oracles.coherent_score(x, end, **rules)), NUM_SLOTS))


@pytest.mark.parametrize("whitening", [(0.0, 1.0), (0.4, 2.5)], ids=str)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_payments_are_the_oracles_under_every_rule_placement_and_clip(rules, whitening):
    mean, std = whitening
    scores = coherent.scores(lay(LOGRATIOS), **LAYOUT, **rules)
    for placement, clip in itertools.product(coherent.PLACEMENTS, [None, 0.3]):
        how = dict(placement=placement, mean=mean, std=std, clip=clip)
        got = place(logratios=lay(LOGRATIOS), scores=scores, **LAYOUT, **rules, **how)
        want = lay(each(lambda x, end: ppo_oracles.paid(x, end, **rules, **how)))  # noqa: B023
        assert got.dtype == jnp.float32
        assert_close(got, want)
        assert not np.array(got)[~USED].any()
        assert clip is None or (np.abs(got).max() <= np.float32(clip) < np.abs(np.array(scores)).max() / std)


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_without_clip_and_mean_both_placements_pay_a_response_the_same_in_sum(rules):
    scores = coherent.scores(lay(LOGRATIOS), **LAYOUT, **rules)
    sums = [
        coherent.sum_slots(
            place(logratios=lay(LOGRATIOS), scores=scores, placement=placement, std=1.7, **LAYOUT, **rules),
            LAYOUT["slot"],
            NUM_SLOTS,
        )
        for placement in coherent.PLACEMENTS
    ]
    assert np.abs(sums[0]).max() > 0.1
    assert_close(*sums)


def test_the_log_ratio_is_sft_less_base():
    got = coherent.token_logratios(sft_logp=np.array([-0.5, -3.0], np.float32), base_logp=np.array([-2.0, -1.0]))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [1.5, -2.0])


@pytest.mark.parametrize("logratios_dtype", [np.int32, np.float32, jnp.bfloat16])
def test_a_fractional_score_is_paid_to_the_last_float32_digit(logratios_dtype):
    """Rewards written into an array of the token ids' type would come out as 0 and -1."""
    scores = ppo_oracles.of_slots([[0.7, -1.6, 0.1], [-0.3, 1.0], []], NUM_SLOTS).astype(np.float32)
    ids = np.ones((len(LENGTHS), WIDTH), logratios_dtype)
    got = place(logratios=ids, scores=scores, placement="eos", **LAYOUT, **PLAIN)
    assert got.dtype == jnp.float32
    paid = np.array(got)
    assert paid[0][paid[0] != 0].tolist() == [np.float32(0.7), np.float32(-1.6), np.float32(0.1)]
    assert paid[1][paid[1] != 0].tolist() == [np.float32(-0.3), np.float32(1.0)]
    shared = place(logratios=ids, scores=scores, placement="token", **LAYOUT, **PLAIN | dict(length_normalize=True))
    assert shared.dtype == coherent.scores(ids, **LAYOUT, **PLAIN).dtype == jnp.float32
    assert_close(shared[0, :3], np.full(3, 1 / 3))


def test_a_cut_response_is_paid_the_penalty_and_nothing_else():
    huge = lay(LOGRATIOS) * 1e6
    for placement in coherent.PLACEMENTS:
        scores = coherent.scores(huge, **LAYOUT, **PLAIN)
        paid = place(logratios=huge, scores=scores, placement=placement, **LAYOUT, **PLAIN)
        assert np.array(scores)[0, 1:3].tolist() == [-1.0, -1.0]
        assert np.array(paid)[0, 3:8].tolist() == [-1.0, 0.0, 0.0, 0.0, -1.0]


@pytest.mark.parametrize("placement", coherent.PLACEMENTS)
@pytest.mark.parametrize("rules", [RULES[0], RULES[7]], ids=str)
def test_a_response_is_paid_the_same_alone_packed_and_with_gaps(placement, rules):
    def pay(rows, finished, gap):
        slot = ppo_oracles.slots(rows, WIDTH + 2, NUM_SLOTS, gap)
        layout = dict(slot=slot, num_slots=NUM_SLOTS, finished=ppo_oracles.of_slots(finished, NUM_SLOTS).astype(bool))
        logratios = ppo_oracles.lay(rows, WIDTH + 2, np.nan, gap).astype(np.float32)
        scores = coherent.scores(logratios, **layout, **rules)
        paid = place(
            logratios=logratios, scores=scores, placement=placement, mean=0.3, std=1.5, clip=2.0, **layout, **rules
        )
        return np.array(paid)[slot < NUM_SLOTS]

    alone = pay(
        [[response] for row in LOGRATIOS for response in row], [[end] for row in FINISHED for end in row], gap=0
    )
    for gap in (0, 1):
        np.testing.assert_array_equal(pay(LOGRATIOS, FINISHED, gap), alone)


@pytest.mark.parametrize("junk", [3.0, np.inf, np.nan])
def test_what_unused_columns_and_empty_slots_hold_is_never_paid(junk):
    rules = RULES[0] | dict(missing_eos="subtract")
    clean = coherent.scores(lay(LOGRATIOS), **LAYOUT, **rules)
    dirty = coherent.scores(lay(LOGRATIOS, junk), **LAYOUT | dict(finished=LAYOUT["finished"] & (clean != 0)), **rules)
    np.testing.assert_array_equal(clean, dirty)
    empty = ppo_oracles.of_slots([[1] * len(row) for row in LENGTHS], NUM_SLOTS) == 0
    assert empty.any() and not np.array(clean)[empty].any()
    for placement in coherent.PLACEMENTS:
        how = dict(placement=placement, mean=0.2, std=2.0, **LAYOUT, **rules)
        left = place(logratios=lay(LOGRATIOS), scores=clean, **how)
        right = place(logratios=lay(LOGRATIOS, junk), scores=jnp.where(empty, junk, clean), **how)
        np.testing.assert_array_equal(left, right)


def test_the_axes_before_the_columns_are_arbitrary_and_a_jit_changes_nothing():
    def pay(logratios, slot, finished):
        layout = dict(slot=slot, num_slots=NUM_SLOTS, finished=finished)
        scores = coherent.scores(logratios, **layout, **RULES[3])
        how = dict(logratios=logratios, scores=scores, **layout, **RULES[3])
        return [scores, *(place(placement=placement, **how) for placement in coherent.PLACEMENTS)]

    arrays = lay(LOGRATIOS), LAYOUT["slot"], LAYOUT["finished"]
    want = pay(*arrays)
    lead = (2, 1)
    for got, one in zip(jax.jit(pay)(*(np.broadcast_to(x, (*lead, *x.shape)) for x in arrays)), want):
        assert_close(got, np.broadcast_to(one, (*lead, *one.shape)))
    for got, one in zip(pay(*(x[0] for x in arrays)), want):  # no axis before the columns at all
        assert_close(got, one[0])


def test_running_moments_are_those_of_all_scores_however_they_came():
    rng = np.random.default_rng(0)
    scores = (5.0 + 3.0 * rng.standard_normal(60)).astype(np.float32)
    update = jax.jit(coherent.update_moments)
    for sizes in ([60], [1] * 3 + [57], [30, 0, 30], [7, 53]):
        moments = coherent.no_moments()
        for part in np.split(scores, np.cumsum(sizes)[:-1]):
            filled = np.concatenate([part, np.full(60 - len(part), np.nan, np.float32)])
            moments = update(moments, filled, np.arange(60) < len(part))
        assert_close(moments.count, 60)
        assert_close(moments.mean, scores.astype(np.float64).mean())
        assert_close(moments.m2, scores.astype(np.float64).var() * 60)
        assert_close(moments.std(), scores.astype(np.float64).std())
        assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {np.dtype(np.float32)}


def test_the_std_is_1_until_two_scores_differ():
    def after(*scores):
        scores = np.array(scores, np.float32)
        return coherent.update_moments(coherent.no_moments(), scores, np.ones(len(scores), bool)).std()

    assert coherent.no_moments().std() == 1.0
    assert after(7.0) == 1.0
    assert after(*[0.7] * 50) == 1.0
    assert after(1.0, 5.0) == 2.0


def test_the_rms_is_the_size_of_the_numbers_and_1_where_they_are_0():
    """Numbers that are large and alike have a size, though no standard deviation."""

    def after(*numbers):
        numbers = np.array(numbers, np.float32)
        return coherent.update_moments(coherent.no_moments(), numbers, np.ones(len(numbers), bool)).rms()

    assert coherent.no_moments().rms() == after(0.0) == after(0.0, 0.0) == after(1e-9, -1e-9) == 1.0
    assert after(-7.0) == after(7.0, 7.0) == after(7.0, -7.0) == 7.0
    assert_close(after(5.0, 1.0, -2.0), np.sqrt(10.0))


@pytest.mark.parametrize(
    ("name", "wrong"), [("missing_eos", "ignore"), ("placement", "last")], ids=["missing_eos", "placement"]
)
def test_an_unknown_name_lists_the_choices(name, wrong):
    choices = ", ".join({"missing_eos": coherent.MISSING_EOS, "placement": coherent.PLACEMENTS}[name])
    arguments = dict(logratios=lay(LOGRATIOS), scores=np.zeros((3, NUM_SLOTS)), placement="token", **LAYOUT, **PLAIN)
    with pytest.raises(ValueError, match=f"{name} is '{wrong}'; choose one of {choices}"):
        place(**arguments | {name: wrong})
