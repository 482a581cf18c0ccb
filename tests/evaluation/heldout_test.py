"""Held-out pairs: accuracy, margin and the length-only baseline in closed form."""

import numpy as np
import pytest

from sera_jax.evaluation import heldout

CHOSEN, REJECTED = np.array([1.0, 0.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0, 0.0])
LONG, SHORT = np.array([5, 5, 2, 3]), np.array([3, 4, 6, 3])  # two longer chosen, one shorter, one equal


def test_the_facts_of_four_pairs_by_hand():
    facts = heldout.facts(CHOSEN, REJECTED, LONG, SHORT)
    assert facts["heldout_accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert facts["heldout_margin"] == pytest.approx((1 - 1 + 0 + 3) / 4)
    assert facts["length_baseline_accuracy"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert facts["heldout_accuracy_shorter"] == 0.5
    assert facts["heldout_accuracy_longer"] == 0.5
    assert facts["heldout_shorter_fraction"] == 0.25


def test_the_scale_divides_the_margin_and_leaves_the_accuracy():
    plain, scaled = (heldout.facts(b * CHOSEN, b * REJECTED, LONG, SHORT, scale=b) for b in (1.0, 0.1))
    assert scaled == pytest.approx(plain)


def test_exchanging_the_sides_turns_every_accuracy_round():
    one = heldout.facts(CHOSEN, REJECTED, LONG, SHORT)
    other = heldout.facts(REJECTED, CHOSEN, SHORT, LONG)
    assert other["heldout_accuracy"] == pytest.approx(1 - one["heldout_accuracy"])
    assert other["heldout_margin"] == pytest.approx(-one["heldout_margin"])
    assert other["length_baseline_accuracy"] == pytest.approx(1 - one["length_baseline_accuracy"])
    assert other["heldout_accuracy_longer"] == pytest.approx(1 - one["heldout_accuracy_shorter"])


def test_a_whole_weight_counts_a_pair_as_often():
    repeat = np.array([2, 1, 0, 3])
    weighted = heldout.facts(CHOSEN, REJECTED, LONG, SHORT, weight=repeat)
    repeated = heldout.facts(*(np.repeat(x, repeat) for x in (CHOSEN, REJECTED, LONG, SHORT)))
    assert weighted == pytest.approx(repeated)
    assert "heldout_accuracy_shorter" not in weighted, "the only such pair has no weight"


def test_a_policy_equal_to_its_reference_is_right_half_the_time():
    zeros = np.zeros(7)
    assert heldout.facts(zeros, zeros, np.arange(7), np.arange(7)[::-1])["heldout_accuracy"] == 0.5


def test_length_alone_is_right_on_none_of_the_pairs_with_the_shorter_side_chosen():
    facts = heldout.facts(LONG, SHORT, LONG, SHORT)  # the length itself as the reward
    assert facts["heldout_accuracy"] == facts["length_baseline_accuracy"]
    assert facts["heldout_accuracy_shorter"] == 0.0
    assert facts["heldout_accuracy_longer"] == 1.0


def test_nothing_is_said_of_no_pairs_and_shapes_must_agree():
    empty = np.zeros(0)
    assert heldout.facts(empty, empty, empty, empty) == {}
    with pytest.raises(ValueError, match="one of each per pair"):
        heldout.facts(CHOSEN, REJECTED, LONG[:2], SHORT[:2])
