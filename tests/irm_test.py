"""Margins, selection, pairing and their summaries: closed forms on small arrays and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sera_jax import irm
from sera_jax.data.reasons import BAD_REASONS
from sera_jax.losses.preference import LOSSES, resolve
from tests.tolerances import TOLERANCES


def f32(values) -> np.ndarray:
    return np.array(values, np.float32)


MARGINS = f32([0.5, -1.0, 3.0, 0.0, 2.0, -4.0, 1.0, 7.0, -0.5, 0.25])
RANKED_RULES = [("top", {"fraction": 0.5}), ("bottom", {"fraction": 0.5}), ("middle", {"fraction": 0.5})]
RANKED_RULES += [("middle", {"band": (0.2, 0.7)}), ("threshold", {"threshold": 0.3}), ("none", {})]


def assert_close(got, want):
    tol = TOLERANCES["closed_form"]
    np.testing.assert_allclose(got, want, rtol=tol["rtol"], atol=tol["atol"])


# Margins and the ensemble.


def test_the_margin_is_the_reward_difference_over_beta():
    assert_close(irm.margin(f32([1.0, -2.0]), f32([0.5, 1.0]), beta=0.5), [1.0, -6.0])


def test_the_ensemble_weighs_two_rounds_as_equation_7():
    now, before = f32([1.0, -2.0]), f32([3.0, 4.0])
    assert_close(irm.ensemble(now, before, 0.3), [0.7 * 1.0 + 0.3 * 3.0, 0.7 * -2.0 + 0.3 * 4.0])
    np.testing.assert_array_equal(irm.ensemble(now, before, 0.0), now)
    np.testing.assert_array_equal(irm.ensemble(now, before, 1.0), before)
    np.testing.assert_array_equal(irm.ensemble(now, None, 0.3), now)
    assert irm.ensemble(now, before, 0.3).dtype == np.float32


def test_the_ensemble_of_margins_is_the_margin_of_ensembles():
    rng = np.random.default_rng(0)
    now_w, now_l, old_w, old_l = rng.normal(size=(4, 20)).astype(np.float32)
    of_margins = irm.ensemble(irm.margin(now_w, now_l), irm.margin(old_w, old_l), 0.3)
    assert_close(of_margins, irm.margin(irm.ensemble(now_w, old_w, 0.3), irm.ensemble(now_l, old_l, 0.3)))


@pytest.mark.parametrize("gamma", [-0.1, 1.1, math.nan])
def test_an_ensemble_weight_outside_0_to_1_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        irm.ensemble(MARGINS, MARGINS, gamma)


def test_an_ensemble_of_different_pools_is_refused():
    with pytest.raises(ValueError, match="same responses"):
        irm.ensemble(MARGINS, MARGINS[1:], 0.3)


# Selection.


def test_each_rule_keeps_the_pairs_it_names():
    ranks = np.argsort(MARGINS)
    assert list(irm.select(MARGINS, "top", fraction=0.3)) == sorted(ranks[-3:])
    assert list(irm.select(MARGINS, "bottom", fraction=0.3)) == sorted(ranks[:3])
    assert list(irm.select(MARGINS, "middle", fraction=0.4)) == sorted(ranks[3:7])
    assert list(irm.select(MARGINS, "middle", band=(0.2, 0.5))) == sorted(ranks[2:5])
    assert list(irm.select(MARGINS, "threshold", threshold=1.0)) == [2, 4, 6, 7]
    assert list(irm.select(MARGINS, "none")) == list(range(10))


@pytest.mark.parametrize("rule", ["top", "bottom", "middle", "random"])
@pytest.mark.parametrize("n", [0, 1, 7, 10, 501])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_exactly_round_of_fraction_times_n_distinct_pairs_are_kept(rule, n, fraction):
    margins = np.random.default_rng(n).normal(size=n).astype(np.float32)
    kept = irm.select(margins, rule, fraction=fraction, seed=3)
    assert len(kept) == len(set(kept)) == round(fraction * n)
    assert kept.dtype == np.int64 and np.all(np.diff(kept) > 0)


def test_what_top_and_bottom_keep_partitions_the_pool():
    top, bottom = irm.select(MARGINS, "top", fraction=0.3), irm.select(MARGINS, "bottom", fraction=0.7)
    assert sorted([*top, *bottom]) == list(range(10))


@pytest.mark.parametrize(("rule", "values"), RANKED_RULES, ids=str)
def test_permuting_the_pairs_permutes_the_selection(rule, values):
    turn = np.random.default_rng(1).permutation(len(MARGINS))
    assert set(turn[irm.select(MARGINS[turn], rule, **values)]) == set(irm.select(MARGINS, rule, **values))


@pytest.mark.parametrize(("rule", "kept"), [("top", [0, 1, 2]), ("bottom", [0, 1, 2]), ("middle", [1, 2, 3])])
def test_ties_are_broken_by_index(rule, kept):
    assert list(irm.select(np.zeros(6, np.float32), rule, fraction=0.5)) == kept


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rule", ["top", "middle", "bottom"])
def test_beta_changes_no_ranking(name, rule):
    """METHODS, traps: scaling rewards changes absolute thresholds only."""
    rng = np.random.default_rng(5)
    logp_w, logp_l, ref_w, ref_l = -rng.integers(20, 400, size=(4, 64)).astype(np.float32)
    length = np.full(64, 16.0, np.float32)
    scale = LOSSES[name].scale
    kept, pairs = set(), set()
    for beta in (0.125, 1.0, 8.0):  # powers of two scale float32 exactly, so ties cannot move
        loss = resolve(name, **({scale: beta} if scale else {}))
        reward_w, reward_l = loss.reward(logp_w, length, ref_w), loss.reward(logp_l, length, ref_l)
        kept.add(tuple(irm.select(irm.margin(reward_w, reward_l), rule, fraction=0.5)))
        tokens = [np.array([i, 1]) for i in range(64)]
        pairs.add(tuple((p.chosen, p.rejected) for p in irm.pair_candidates(reward_w, tokens).pairs))
    assert len(kept) == len(pairs) == 1


def test_random_selection_is_named_by_seed_and_round_and_ignores_the_margins():
    def draw(margins=MARGINS, **names):
        return tuple(irm.select(margins, "random", fraction=0.5, **names))

    assert draw(seed=1) == draw(seed=1) == draw(-MARGINS, seed=1)
    assert len({draw(seed=seed, round_index=r) for seed in range(3) for r in range(3)}) > 5


def test_random_selection_is_fair():
    counts = np.zeros(10)
    for seed in range(2000):
        counts[irm.select(MARGINS, "random", fraction=0.3, seed=seed)] += 1
    # 600 +- 5 standard deviations of a binomial(2000, 0.3)
    assert np.all(np.abs(counts - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_margin_that_is_not_finite_is_refused_with_its_pair(bad):
    margins = MARGINS.copy()
    margins[4] = bad
    for call in (
        lambda: irm.select(margins, "top", fraction=0.5),
        lambda: irm.select(margins, "none"),
        lambda: irm.filter_bootstrapped(margins, count=3),
        lambda: irm.order(margins, "easy_to_hard"),
        lambda: irm.margin_summary(margins),
    ):
        with pytest.raises(ValueError, match="first: pair 4"):
            call()


@pytest.mark.parametrize(
    ("rule", "values", "message"),
    [
        ("best", {}, "choices: top, bottom, middle"),
        ("top", {}, "'top' needs fraction"),
        ("random", {}, "'random' needs fraction"),
        ("threshold", {"fraction": 0.5}, "'threshold' needs threshold"),
        ("middle", {}, "needs a fraction"),
        ("middle", {"band": (0.7, 0.2)}, "band of ranks"),
        ("top", {"fraction": 1.5}, "1.5; it must be in"),
        ("top", {"fraction": -0.1}, "-0.1; it must be in"),
    ],
    ids=str,
)
def test_a_selection_that_cannot_be_made_is_refused(rule, values, message):
    with pytest.raises(ValueError, match=message):
        irm.select(MARGINS, rule, **values)


def test_curricula_run_from_large_margins_to_small_and_back():
    easy_first = irm.order(MARGINS, "easy_to_hard")
    assert np.all(np.diff(MARGINS[easy_first]) <= 0)
    np.testing.assert_array_equal(irm.order(MARGINS, "hard_to_easy"), easy_first[::-1])
    np.testing.assert_array_equal(irm.order(MARGINS, "none"), np.arange(10))
    with pytest.raises(ValueError, match="easy_to_hard"):
        irm.order(MARGINS, "easy")


@pytest.mark.parametrize(("first", "second"), [("abcdef", "xyz"), ("ab", ""), ("", "xyz"), ("a", "x" * 9)])
def test_what_is_spread_keeps_its_order_and_is_everywhere_as_dense(first, second):
    both = irm.spread(first, second)
    assert [x for x in both if x in first] == list(first) and [x for x in both if x in second] == list(second)
    for end in range(len(both) + 1):
        share = end / max(len(both), 1)
        assert abs(sum(x in first for x in both[:end]) - share * len(first)) <= 1


def test_the_filter_keeps_the_largest():
    assert list(irm.filter_bootstrapped(MARGINS, count=3)) == [2, 4, 7]
    assert list(irm.filter_bootstrapped(MARGINS, count=1)) == [7]
    assert len(irm.filter_bootstrapped(MARGINS, count=0)) == 0
    assert len(irm.filter_bootstrapped(np.zeros(0), count=5)) == 0
    assert len(irm.filter_bootstrapped(MARGINS, count=99)) == 10


@pytest.mark.parametrize("count", [3, 0, 99])
def test_the_control_arms_random_filter_keeps_as_many_from_anywhere(count):
    wanted = len(irm.filter_bootstrapped(MARGINS, count=count))
    draws = [irm.filter_bootstrapped(MARGINS, count=count, rule="random", seed=seed) for seed in range(30)]
    assert all(len(d) == len(set(d)) == wanted for d in draws)
    if wanted:
        assert {int(i) for d in draws for i in d} == set(range(10))


def test_a_filter_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="top, random"):
        irm.filter_bootstrapped(MARGINS, count=3, rule="bottom")
    with pytest.raises(ValueError, match="-1"):
        irm.filter_bootstrapped(MARGINS, count=-1)


# Pairs of candidates.

EOS = 2


def answers(*texts):
    return [np.array([*text, EOS]) for text in texts]


def test_best_against_worst_pairs_the_highest_with_the_lowest_reward():
    got = irm.pair_candidates(f32([0.5, 2.0, -1.0, 1.0]), answers([5], [6], [7], [8]))
    assert got.pairs == (irm.CandidatePair(1, 2, 3.0),) and not got.refused


def test_all_pairs_are_half_of_n_times_n_minus_1_and_each_has_the_better_first():
    rewards = f32([0.5, 2.0, -1.0, 1.0])
    got = irm.pair_candidates(rewards, answers([5], [6], [7], [8]), mode="all")
    assert [(p.chosen, p.rejected) for p in got.pairs] == [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2), (0, 2)]
    assert all(p.margin == rewards[p.chosen] - rewards[p.rejected] > 0 for p in got.pairs)


def test_length_control_takes_alpha_off_per_token():
    rewards, tokens = f32([3.0, 2.0, 1.0]), answers([5] * 9, [6], [7] * 2)
    assert irm.pair_candidates(rewards, tokens).pairs == (irm.CandidatePair(0, 2, 2.0),)
    (pair,) = irm.pair_candidates(rewards, tokens, length_alpha=1.0).pairs
    assert (pair.chosen, pair.rejected) == (1, 0)
    assert pair.margin == (2.0 - 2) - (3.0 - 10)


@pytest.mark.parametrize("mode", ["best_worst", "all"])
def test_permuting_the_candidates_pairs_the_same_answers(mode):
    rewards, tokens = f32([0.5, 2.0, -1.0, 1.0]), answers([5], [6], [7], [8])
    turn = [2, 0, 3, 1]
    straight = irm.pair_candidates(rewards, tokens, mode=mode).pairs
    turned = irm.pair_candidates(rewards[turn], [tokens[i] for i in turn], mode=mode).pairs
    assert [(turn[p.chosen], turn[p.rejected]) for p in turned] == [(p.chosen, p.rejected) for p in straight]


@pytest.mark.parametrize(
    ("rewards", "tokens", "finished", "refused", "pair"),
    [
        ([1, 1], answers([5], [5]), None, {"identical_pair": 1}, None),
        ([1, 1.0001], answers([5], [5]), None, {"identical_pair": 1}, None),  # scored in other places of a batch
        ([1, 1], answers([5], [6]), None, {"tie": 1}, None),
        ([3, 2, 1], [*answers([5], [6]), np.array([], int)], None, {"empty_response": 1}, (0, 1)),
        ([3, 2, 1], [np.array([EOS]), *answers([5], [6])], None, {"empty_response": 1}, (1, 2)),
        ([3, 2, 1], [np.array([EOS + 1]), *answers([5], [6])], None, {"empty_response": 1}, (1, 2)),
        ([3, 2, 1], answers([5], [6], [7]), [False, True, True], {"truncated": 1}, (1, 2)),
        ([3, 2], answers([5], [6]), [False, True], {"truncated": 1, "too_few": 1}, None),
        ([3, 2], [np.array([EOS]), np.array([], int)], None, {"empty_response": 2, "too_few": 1}, None),
        (
            [math.nan, 2, 1],
            answers([], [5], [6]),
            None,
            {"empty_response": 1},
            (1, 2),
        ),  # the reward of nothing is not read
    ],
    ids=str,
)
def test_what_cannot_make_a_pair_is_refused_with_a_counted_reason(rewards, tokens, finished, refused, pair):
    got = irm.pair_candidates(f32(rewards), tokens, finished=finished, stop_ids=(EOS, EOS + 1))
    assert dict(got.refused) == refused
    assert [(p.chosen, p.rejected) for p in got.pairs] == ([pair] if pair else [])


@pytest.mark.parametrize(
    ("rewards", "texts", "refused", "pair"),
    [
        ([3, 2, 1], ["a", "b", "c"], {}, (0, 2)),
        ([3, 2, 1], [" \n", "b", "c"], {"empty_response": 1}, (1, 2)),
        ([3, 2, 1], ["a", "b", ""], {"empty_response": 1}, (0, 1)),  # control tokens alone say nothing
        ([3, 2, 1], ["a", "b", " a\n"], {"identical_after_strip": 1}, None),
        ([3, 2, 1], ["a", "", "\t"], {"empty_response": 2, "too_few": 1}, None),
    ],
    ids=str,
)
def test_what_candidates_say_is_held_to_what_rows_are_held_to(rewards, texts, refused, pair):
    got = irm.pair_candidates(f32(rewards), answers([5], [6], [7]), texts=texts)
    assert dict(got.refused) == refused
    assert set(refused) - {"too_few"} <= set(BAD_REASONS) and set(refused) <= set(irm.REFUSALS)
    assert [(p.chosen, p.rejected) for p in got.pairs] == ([pair] if pair else [])


def test_every_prompt_is_a_pair_or_one_counted_refusal():
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(300):
        tokens = [rng.integers(3, 5, size=rng.integers(0, 3)) for _ in range(4)]
        rewards = np.round(rng.normal(size=4)).astype(np.float32)
        finished = rng.random(4) < 0.7
        got = irm.pair_candidates(rewards, tokens, finished=finished)
        outcomes.append([len(got.pairs), *(got.refused[r] for r in ("too_few", "identical_pair", "tie"))])
    outcomes = np.array(outcomes)
    assert np.all(outcomes.sum(axis=1) == 1) and np.all(outcomes.sum(axis=0) > 0)


def test_of_all_pairs_each_is_kept_or_counted():
    tokens = answers([5], [5], [6], [7])
    got = irm.pair_candidates(f32([1, 1, 1, 0]), tokens, mode="all")
    assert len(got.pairs) + got.refused["identical_pair"] + got.refused["tie"] == 6
    assert got.refused == {"identical_pair": 1, "tie": 2}


def test_candidates_that_are_not_candidates_are_refused():
    with pytest.raises(ValueError, match="two or more"):
        irm.pair_candidates(f32([1.0]), answers([5]))
    with pytest.raises(ValueError, match="two or more"):
        irm.pair_candidates(f32([1.0, 2.0, 3.0]), answers([5], [6]))
    with pytest.raises(ValueError, match="best_worst, all"):
        irm.pair_candidates(f32([1.0, 2.0]), answers([5], [6]), mode="best")
    with pytest.raises(ValueError, match="not finite"):
        irm.pair_candidates(f32([math.nan, 2.0]), answers([5], [6]))


# Summaries.


def test_the_margin_summary_has_the_names_and_values_users_plot():
    got = irm.margin_summary(MARGINS, np.arange(10), np.full(10, 4))
    assert set(got) == {f"irm/{k}" for k in ("mean", "std", "p10", "p50", "p90", "negative_fraction")} | {
        f"length/{k}" for k in ("chosen", "rejected", "diff", "margin_corr")
    }
    assert_close(got["irm/mean"], np.mean(MARGINS))
    assert_close(got["irm/std"], np.std(MARGINS))
    assert_close(got["irm/p50"], np.median(MARGINS))
    assert_close(got["irm/negative_fraction"], 0.3)
    assert_close(got["length/diff"], 0.5)
    x, y = MARGINS - MARGINS.mean(), np.arange(10) - 4.5
    assert_close(got["length/margin_corr"], x @ y / math.sqrt((x @ x) * (y @ y)))


def test_quantities_that_are_not_defined_have_no_key():
    assert irm.margin_summary(np.zeros(0)) == {}
    assert "length/margin_corr" not in irm.margin_summary(MARGINS, np.full(10, 3), np.full(10, 3))
    assert irm.correlation(np.arange(3), np.ones(3)) is None
    assert irm.overlap([], []) is None
    assert irm.selection_summary(np.zeros(0), np.zeros(0, int)) == {}
    assert irm.bootstrap_summary([], []) == {"bootstrap/pairs": 0.0}


def test_selecting_by_the_logged_threshold_keeps_the_same_pairs():
    kept = irm.select(MARGINS, "top", fraction=0.4)
    logged = irm.selection_summary(MARGINS, kept)
    assert logged["select/kept_fraction"] == 0.4
    np.testing.assert_array_equal(irm.select(MARGINS, "threshold", threshold=logged["select/threshold"]), kept)


def test_the_ensemble_summary_counts_signs_that_differ():
    assert irm.ensemble_summary(MARGINS, None, 0.3) == {"ensemble/weight_0": 1.0}
    got = irm.ensemble_summary(f32([1, -1, 2, 3]), f32([1, 1, -2, 3]), 0.3)
    assert got == {"ensemble/weight_0": 0.7, "ensemble/weight_1": 0.3, "ensemble/disagreement": 0.5}


def test_overlap_is_the_jaccard_index():
    assert irm.overlap(["a", "b", "c"], ["b", "c", "d"]) == 0.5


def test_the_bootstrap_summary_adds_up():
    tokens = [answers([5] * 3, [6]), answers([5], [5]), answers([5], [6] * 4)]
    rewards = f32([[2, 1], [1, 1], [0, 3]])
    pairings = [irm.pair_candidates(r, t) for r, t in zip(rewards, tokens, strict=True)]
    lengths = [[len(a) for a in t] for t in tokens]
    got = irm.bootstrap_summary(pairings, lengths, [[True, True], [True, False], [True, True]])
    assert got == {
        "bootstrap/pairs": 2.0,
        "bootstrap/refused_identical_pair": 1.0,
        "bootstrap/margin_mean": 2.0,
        "bootstrap/len_diff": 2.5,
        "bootstrap/tie_fraction": 1 / 3,
        "bootstrap/eos_fraction": 5 / 6,
    }
