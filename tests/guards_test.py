"""Guard rails on self-made pairs and warnings without a gold reward, against plain numpy."""

import numpy as np
import pytest

from sera_jax import guards, irm

PAIR = irm.CandidatePair


def best_worst(rewards):
    """The pairing of some of four candidates by their rewards."""
    tokens = [np.array([k]) for k in range(len(rewards))]
    return lambda places: irm.pair_candidates(np.asarray(rewards, np.float32)[places], [tokens[k] for k in places])


@pytest.mark.parametrize(
    ("supported", "pairs", "refused"),
    [
        ([1, 1, 1, 1], (PAIR(1, 3, 9.0),), {}),
        ([1, 0, 1, 1], (PAIR(2, 3, 7.0),), {"unsupported": 1}),
        ([1, 0, 1, 0], (PAIR(2, 0, 1.0),), {"unsupported": 2}),
        ([0, 0, 1, 0], (), {"unsupported": 3, "too_few": 1}),
    ],
)
def test_the_best_and_the_worst_are_sought_among_what_is_supported(supported, pairs, refused):
    got = guards.among_supported(np.array(supported, bool), best_worst([2, 5, 3, -4]))
    assert (got.pairs, dict(got.refused)) == (pairs, refused)


def test_a_pair_that_a_judge_puts_the_other_way_round_is_refused_and_a_tie_is_not():
    made = irm.pair_candidates(np.float32([3, 2, 1]), [np.array([k]) for k in range(3)], mode="all")
    assert guards.agreed(made, []) == made
    got = guards.agreed(made, [np.array([1, 1, 0]), np.array([5, 6, 6])])
    assert [(p.chosen, p.rejected) for p in got.pairs] == [(1, 2)]
    assert dict(got.refused) == {"disagreement": 2}
    same = guards.agreed(made, [np.array([30.0, 20.0, 10.0])])
    assert (same.pairs, dict(same.refused)) == (made.pairs, {})


def test_margins_are_let_through_by_size_and_by_rank_and_each_refusal_has_one_reason():
    margins = np.float32([0.5, 9.0, 1.0, 3.0, 2.0, 4.0, 8.0, 6.0, 7.0, 5.0])
    for least, band, inside, reasons in (
        (None, None, margins > 0, {}),
        (2.0, None, margins >= 2, {"below_min_margin": 2}),
        (None, (0.0, 0.8), margins <= 7, {"outside_band": 2}),
        (2.0, (0.1, 0.8), (margins >= 2) & (margins <= 7), {"below_min_margin": 2, "outside_band": 2}),
        (100.0, (0.0, 0.8), margins > 100, {"below_min_margin": 10}),
    ):
        got, refused = guards.admitted(margins, least, band)
        np.testing.assert_array_equal(got, inside)
        assert dict(refused) == reasons
        assert got.sum() + sum(refused.values()) == len(margins)
    assert guards.admitted(np.zeros(0, np.float32), 1.0, (0.0, 0.5))[0].shape == (0,)


@pytest.mark.parametrize("clean", [0.9, 0.7, 0.5])
def test_the_share_of_clean_labels_is_the_weight_of_the_upper_part_of_the_margins(clean):
    rng = np.random.default_rng(3)
    upper = rng.random(4000) < clean
    margins = np.where(upper, rng.normal(3, 1.5, 4000), rng.normal(-3, 1, 4000)).astype(np.float32)
    share, fit = guards.clean_share(margins)
    assert share == fit["mixture/clean_share"] == pytest.approx(clean, abs=0.02)
    assert guards.clean_share(10 * margins + 5)[0] == pytest.approx(share, abs=1e-4)
    assert guards.clean_share(rng.permutation(margins))[0] == pytest.approx(share, abs=1e-6)
    for name, lower, higher in (("weight", 1 - clean, clean), ("mean", -3, 3), ("std", 1, 1.5)):
        assert [fit[f"mixture/{name}_{i}"] for i in (0, 1)] == pytest.approx([lower, higher], abs=0.1)


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0, 3.0])
def test_margins_of_one_kind_show_no_noise(shift):
    """Skewed and heavy tails too, though two normal distributions fit them better than one does."""
    rng = np.random.default_rng(4)
    skewed = [
        rng.exponential(size=2000),
        rng.gamma(2, size=2000),
        rng.lognormal(0, 0.5, 2000),
        rng.lognormal(size=2000),
    ]
    for margins in (rng.normal(1, 2, 2000), rng.standard_t(3, 2000), *skewed, *(-x for x in skewed)):
        assert guards.clean_share((margins - shift * np.sign(np.mean(margins))).astype(np.float32))[0] == 1.0
    for margins in (np.ones(50), rng.normal(size=9), np.zeros(0)):
        assert guards.clean_share(margins.astype(np.float32)) == (1.0, {})


def test_a_share_of_clean_labels_wants_labels_that_the_policy_contradicts_and_is_half_at_least():
    rng = np.random.default_rng(5)
    apart = np.where(rng.random(4000) < 0.3, rng.normal(6, 1, 4000), rng.normal(0, 1, 4000))
    for shift, share in ((1.0, 1.0), (-3.0, 0.5), (-8.0, 1.0)):
        found, fit = guards.clean_share((apart + shift).astype(np.float32))
        assert found == share and fit["mixture/weight_1"] == pytest.approx(0.3, abs=0.03)


def test_pairs_of_a_small_margin_are_counted_where_they_are_left_out():
    made = irm.pair_candidates(np.float32([3, 2, 0]), [np.array([k]) for k in range(3)], mode="all")
    assert guards.above(made, None) == made
    got = guards.above(made, 2.0)
    assert [p.margin for p in got.pairs] == [3.0, 2.0]
    assert dict(got.refused) == {"below_min_margin": 1}


def test_a_correlation_within_prompts_does_not_see_what_differs_between_them():
    rng = np.random.default_rng(0)
    level = 100 * rng.normal(size=(50, 1))  # of the prompt, common to both
    a, b = rng.normal(size=(2, 50, 4))
    unrelated = guards.within_correlation(list(level + a), list(level + b))
    assert unrelated is not None and abs(unrelated) < 0.2 < np.corrcoef((level + a).ravel(), (level + b).ravel())[0, 1]
    assert guards.within_correlation(list(level + a), list(7 * level - 2 * a)) == pytest.approx(-1)
    assert guards.within_correlation([np.ones(4)], [a[0]]) is None
    assert guards.within_correlation([], []) is None


def test_the_repeated_share_counts_n_grams_that_the_same_answer_had():
    again = np.array([1, 2, 3, 1, 2, 3])  # 123 231 312 123
    assert guards.repeated_share([again]) == pytest.approx(1 / 4)
    assert guards.repeated_share([again, np.array([1, 2, 3])]) == pytest.approx(1 / 5), "another answer's do not count"
    assert guards.repeated_share([np.full(12, 7)]) == pytest.approx(9 / 10)
    assert guards.repeated_share([np.array([1, 2])]) is None


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_what_replay_takes_back_was_left_out_and_halves_from_round_to_round(fraction):
    kept = irm.select(np.arange(50.0), "top", fraction=0.2)
    back = {r: guards.replayed(kept, 50, fraction=fraction, seed=3, round_index=r) for r in (2, 3, 4)}
    assert {r: len(i) for r, i in back.items()} == {r: round(fraction / 2 ** (r - 2) * 40) for r in back}
    for indices in back.values():
        assert sorted(set(indices.tolist())) == indices.tolist() and not set(indices) & set(kept)
    again = guards.replayed(kept, 50, fraction=fraction, seed=3)
    assert again.tolist() == back[2].tolist()
    others = guards.replayed(kept, 50, fraction=fraction, seed=4)
    assert (others.tolist() == again.tolist()) == (fraction in (0.0, 1.0))
