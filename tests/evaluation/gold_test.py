"""Gold facts: laws of the interval, the win rate, the agreement and chrF."""

import sys
from collections import Counter

import numpy as np
import pytest

from sera_jax.evaluation import gold


def sample(n, seed=0):
    return np.random.default_rng(seed).choice([-0.3, 0.0, 0.25, 0.6, 0.85, 1.0], size=n)


def test_the_interval_holds_the_mean_and_lies_within_the_values():
    golds = sample(200)
    facts = gold.facts(golds)
    low, high = facts["gold_ci95"]
    assert golds.min() <= low <= facts["gold_mean"] <= high <= golds.max()
    assert facts["gold_mean"] == pytest.approx(golds.mean())


def test_the_interval_is_near_the_normal_one_for_many_prompts():
    golds = sample(400)
    low, high = gold.ci95(golds)
    half = 1.96 * golds.std(ddof=1) / np.sqrt(len(golds))
    # 2000 resamples put the percentiles within about a tenth of the half width
    assert low == pytest.approx(golds.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(golds.mean() + half, abs=0.15 * half)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    truth = np.mean([-0.3, 0.0, 0.25, 0.6, 0.85, 1.0])
    covered = [low <= truth <= high for low, high in (gold.ci95(sample(100, seed)) for seed in range(200))]
    assert 0.88 <= np.mean(covered) <= 0.99  # 0.95 plus or minus 4 standard errors of 200 trials


def test_the_interval_is_the_same_every_time_and_a_point_for_equal_values():
    assert gold.ci95(sample(50)) == gold.ci95(sample(50))
    assert gold.ci95(np.full(10, 0.6)) == pytest.approx((0.6, 0.6))


def test_the_means_by_task_and_by_domain_are_of_their_own_prompts():
    golds, tasks = np.array([1.0, 0.0, 0.5, 0.25]), ["name", "last", "name", "first"]
    assert gold.by_task(golds, tasks) == {"first": 0.25, "last": 0.0, "name": 0.75}
    assert gold.by_domain(golds, tasks, ("name", "first")) == {
        "gold_in_domain": 0.0, "gold_out_of_domain": pytest.approx(1.75 / 3)
    }  # fmt: skip
    assert gold.by_domain(golds, tasks, ("repeat",)) == {"gold_in_domain": pytest.approx(1.75 / 4)}
    assert gold.by_domain(golds, tasks, ()) == {}


def test_nothing_is_said_of_no_prompts():
    assert gold.facts([]) == {}
    with pytest.raises(ValueError, match="at least one"):
        gold.ci95(np.zeros(0))


def test_a_set_of_answers_wins_half_against_itself():
    assert gold.win_rate(sample(31), sample(31)) == 0.5


def test_the_win_rates_of_two_sets_add_to_one():
    a, b = sample(101, 1), sample(101, 2)
    assert gold.win_rate(a, b) + gold.win_rate(b, a) == pytest.approx(1.0)
    assert gold.win_rate(np.array([1.0, 0.6, 0.0]), np.array([0.0, 0.6, 0.25])) == pytest.approx((1 + 0.5 + 0) / 3)


def test_rounding_in_the_sum_of_terms_makes_no_winner():
    assert gold.win_rate(np.array([0.1 + 0.2]), np.array([0.3])) == 0.5
    assert gold.agreement(np.array([0.1 + 0.2]), np.array([0.3])) == {"agree": 0.0, "disagree": 0.0, "tie": 1.0}


def test_a_win_rate_needs_the_same_prompts():
    with pytest.raises(ValueError, match="paired"):
        gold.win_rate(np.zeros(3), np.zeros(4))


def test_the_shares_of_agreement_add_to_one_and_swap_with_the_sides():
    a, b = sample(80, 3), sample(80, 4)
    shares, swapped = gold.agreement(a, b), gold.agreement(b, a)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert (shares["agree"], shares["tie"]) == (swapped["disagree"], swapped["tie"])
    assert gold.agreement([], []) == {}


def test_a_pair_without_a_gold_reward_does_not_count():
    known = gold.agreement([1.0, 0.0, 0.5], [0.0, 1.0, 0.5])
    assert gold.agreement([1.0, np.nan, 0.0, 0.5, 0.3], [0.0, 0.1, 1.0, 0.5, np.nan]) == known
    assert gold.agreement([np.nan], [0.0]) == {}


def chrf_oracle(said, reference):
    """F_2 of the mean precision and recall of character n-grams, n = 1..6, of the orders that both texts have."""
    precisions, recalls = [], []
    for n in range(1, 7):
        ours, theirs = (
            Counter(text[i : i + n] for i in range(len(text) - n + 1))
            for text in ("".join(said.split()), "".join(reference.split()))
        )
        if ours and theirs:
            same = (ours & theirs).total()
            precisions.append(same / ours.total())
            recalls.append(same / theirs.total())
    p, r = np.mean(precisions or [0.0]), np.mean(recalls or [0.0])
    return 5 * p * r / (4 * p + r) if p + r else 0.0


SAID = ["He goes to the park every day.", "He go to park", "Yes.", "", "Une réponse, ailleurs"]


def test_chrf_is_that_of_sacrebleu_from_0_to_1_and_of_the_nearest_reference():
    sacrebleu = pytest.importorskip("sacrebleu", reason="eval.gold='chrf' reads it")
    chrf, reference, other = gold.chrf().of, "He goes to the park every day.", "Yes, he goes."
    for said in SAID:
        assert chrf(said, [reference]) == sacrebleu.CHRF().sentence_score(said, [reference]).score / 100
        assert chrf(said, [reference]) == pytest.approx(chrf_oracle(said, reference))
        assert chrf(said, [other, reference]) == max(chrf(said, [other]), chrf(said, [reference]))
    assert (chrf(reference, [reference]), chrf("", [reference])) == (1.0, 0.0)


def test_sentiment_is_that_of_vader_from_0_to_1():
    pytest.importorskip("vaderSentiment", reason="eval.gold='sentiment' reads it")
    reward = gold.sentiment()
    good, plain, bad = (reward.of(said, ()) for said in ("A great day!", "It is a day.", "A horrible day."))
    assert 0 <= bad < plain == 0.5 < good <= 1
    assert reward.of("", ()) == 0.5
    assert reward.of("VADER is smart, handsome, and funny.", ()) == (1 + 0.8316) / 2  # of the package's README


@pytest.mark.parametrize(("name", "package"), [("chrf", "sacrebleu"), ("sentiment", "vaderSentiment")])
def test_a_gold_without_its_package_says_what_to_install(monkeypatch, name, package):
    for module in (package, f"{package}.{package}"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"config\.eval\.gold='{name}'.* pip install {package}"):
        gold.OF_TEXT[name]()
