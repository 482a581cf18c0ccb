"""Rankings of candidates against the gold reward: laws on candidates that are made up."""

import dataclasses

import numpy as np
import pytest

from sera_jax import irm
from sera_jax.data.items import Item
from sera_jax.evaluation import rankings
from sera_jax.loops.rewards import implicit
from sera_jax.losses.preference import resolve
from sera_jax.sampling import Candidates, Sample


def candidates(seed, reference=True):
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.arange(1, 9))[:4]
    samples = tuple(Sample(0, k, rng.integers(9, size=n), np.zeros(0), True) for k, n in enumerate(lengths))
    logp, ref = (-rng.uniform(1, 20, 4).astype(np.float32) for _ in range(2))
    return Candidates(Item(f"p{seed}", np.arange(3), ()), samples, logp, ref if reference else None)


def pair(given, rewards):
    return [irm.pair_candidates(reward, c.tokens) for c, reward in zip(given, rewards, strict=True)]


def judged_by(name, sign=1.0, count=12):
    given = [candidates(seed) for seed in range(count)]
    golds = [sign * np.float64(rankings.reward_of(rankings.RANKINGS[name], c)) for c in given]
    return given, golds, rankings.facts(given, golds, pair)


@pytest.mark.parametrize("name", [name for name, ranking in rankings.RANKINGS.items() if ranking.judge is None])
def test_a_ranking_agrees_with_itself_and_never_with_its_opposite(name):
    given, golds, found = judged_by(name)
    assert set(found) == set(rankings.RANKINGS)
    assert found[name]["agreement"] == {"agree": 1.0, "disagree": 0.0, "tie": 0.0}
    assert found[name]["gold_corr"] == pytest.approx(1.0)
    gaps = [np.ptp(gold) for gold in golds]
    assert found[name]["gold_gap"] == pytest.approx(np.mean(gaps))
    assert found[name]["gold_gap_se"] == pytest.approx(np.std(gaps, ddof=1) / np.sqrt(len(given)))
    against = judged_by(name, -1.0)[2][name]
    assert (against["agreement"]["disagree"], against["gold_gap"]) == (1.0, -found[name]["gold_gap"])
    assert against["tokens_gap"] == found[name]["tokens_gap"]


def test_the_shortest_are_shorter_by_the_spread_of_the_lengths():
    given, _, found = judged_by("logp_mean")
    assert found["shortest"]["tokens_gap"] == -np.mean([np.ptp(c.lengths) for c in given])


def test_without_a_reference_only_the_others_are_compared_and_without_candidates_none():
    given = [candidates(seed, reference=False) for seed in range(3)]
    found = rankings.facts(given, [np.arange(4.0)] * 3, pair)
    assert set(found) == {"logp_mean", "shortest"}
    assert rankings.facts([], [], pair) == {}


def test_a_ranking_that_finds_all_alike_makes_no_pair_and_is_left_out():
    given = [dataclasses.replace(candidates(seed), ref_logp=candidates(seed).logp) for seed in range(3)]
    found = rankings.facts(given, [np.arange(4.0)] * 3, pair)
    assert set(found) == set(rankings.RANKINGS) - {"log_ratio_sum", "log_ratio_agreed", "log_ratio_mean"}


def test_a_judge_leaves_the_pairs_on_which_it_agrees():
    given, golds, _ = judged_by("logp_mean", count=40)
    found = rankings.facts(given, golds, pair)
    assert 0 < found["log_ratio_agreed"]["pairs"] < found["log_ratio_sum"]["pairs"] == 40
    assert found["log_ratio_agreed"]["agreement"]["agree"] == 1.0, "of those the judge is right, since it is the gold"
    assert found["log_ratio_sum"]["agreement"]["agree"] * 40 == pytest.approx(found["log_ratio_agreed"]["pairs"])


def test_a_part_of_the_likelihood_is_what_the_option_ranks_by():
    for name, weight in (("log_ratio_mean", 0.0), ("tenth_mean", 0.1), ("half_mean", 0.5), ("logp_mean", 1.0)):
        offered = implicit(resolve("dpo"), likelihood_weight=weight, reduction="mean")
        for given in (candidates(seed) for seed in range(3)):
            np.testing.assert_allclose(rankings.reward_of(rankings.RANKINGS[name], given), offered(given), rtol=1e-4)


def test_arms_with_the_same_candidates_share_their_lines():
    found = judged_by("logp_mean")[2]
    rounds = [{"arm": arm, "round": 2, "rankings": found} for arm in ("sera", "random")]
    lines = rankings.table([{"arm": "daa", "round": 2}, *rounds]).splitlines()
    assert len(lines) == 2 + len(rankings.RANKINGS)
    assert all(line.strip().startswith("sera, random      2") for line in lines[2:])
    assert "100 / 0 / 0" in next(line for line in lines if "log pi, a token" in line)
