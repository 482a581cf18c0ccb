"""Bradley and Terry's loss against float64 numpy, and which way it pushes."""

import jax
import numpy as np

from sera_jax.losses.reward_model import bradley_terry
from tests.tolerances import TOLERANCES

CLOSE = {name: TOLERANCES["closed_form"][name] for name in ("rtol", "atol")}
CHOSEN = np.array([0.0, 1.5, -3.0, 40.0, -40.0], np.float32)
REJECTED = np.array([0.0, -0.5, 2.0, -50.0, 50.0], np.float32)


def test_the_loss_is_minus_the_log_of_the_probability_that_the_chosen_side_wins():
    margin = CHOSEN.astype(np.float64) - REJECTED
    np.testing.assert_allclose(bradley_terry(chosen=CHOSEN, rejected=REJECTED), np.logaddexp(0, -margin), **CLOSE)


def test_its_gradient_lifts_the_chosen_side_as_much_as_it_lowers_the_rejected_one_and_most_where_it_is_wrong():
    by_chosen, by_rejected = jax.grad(lambda c, r: bradley_terry(chosen=c, rejected=r).sum(), (0, 1))(CHOSEN, REJECTED)
    margin = CHOSEN.astype(np.float64) - REJECTED
    np.testing.assert_allclose(by_chosen, -1 / (1 + np.exp(margin)), **CLOSE)
    np.testing.assert_array_equal(by_rejected, -by_chosen)


def test_a_shift_of_all_scores_changes_nothing():
    moved = bradley_terry(chosen=CHOSEN + 8, rejected=REJECTED + 8)
    np.testing.assert_allclose(moved, bradley_terry(chosen=CHOSEN, rejected=REJECTED), **CLOSE)
