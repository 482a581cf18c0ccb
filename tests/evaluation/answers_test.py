"""Held-out demonstrations and answers as numbers: closed forms, what scale and order do, and what is left out."""

import numpy as np
import pytest

from sera_jax.evaluation import answers
from tests.tolerances import TOLERANCES

NUMBER = r"####\s*(-?[\d,]+)"


def close(value):
    return pytest.approx(value, rel=TOLERANCES["closed_form"]["rtol"], abs=TOLERANCES["closed_form"]["atol"])


def draws(n=50, seed=0):
    rng = np.random.default_rng(seed)
    return -rng.exponential(20, n), -rng.exponential(25, n), rng.integers(1, 60, n)


def test_the_likelihood_of_a_uniform_model_is_the_logarithm_of_its_vocabulary():
    lengths = np.array([3, 1, 8])
    assert answers.likelihood_facts(-np.log(64) * lengths, lengths) == {"heldout_nll": close(np.log(64))}


def test_every_token_counts_the_same_in_the_likelihood_whatever_response_it_belongs_to():
    logp, _, lengths = draws()
    whole = answers.likelihood_facts(logp, lengths)["heldout_nll"]
    merged = answers.likelihood_facts(np.array([logp.sum()]), np.array([lengths.sum()]))["heldout_nll"]
    assert whole == close(merged)


def test_the_coherent_reward_is_zero_between_equal_models_and_changes_sign_with_their_exchange():
    sft, base, lengths = draws()
    assert answers.coherent_facts(sft, sft, lengths) == {"coherent_reward_mean": 0.0, "coherent_reward_ci95": [0, 0]}
    forth, back = answers.coherent_facts(sft, base, lengths), answers.coherent_facts(base, sft, lengths)
    assert forth["coherent_reward_mean"] == close(-back["coherent_reward_mean"])
    assert forth["coherent_reward_length_corr"] == close(-back["coherent_reward_length_corr"])


def test_the_coherent_reward_is_the_mean_of_the_log_ratios_within_its_interval():
    sft, base, lengths = draws()
    facts = answers.coherent_facts(sft, base, lengths)
    low, high = facts["coherent_reward_ci95"]
    assert facts["coherent_reward_mean"] == close(np.mean(sft - base))
    assert low < facts["coherent_reward_mean"] < high


@pytest.mark.parametrize("per_token, expected", [(0.5, 1.0), (-0.5, -1.0)])
def test_a_reward_that_grows_with_every_token_has_a_correlation_of_one_with_length(per_token, expected):
    _, base, lengths = draws()
    facts = answers.coherent_facts(base + per_token * lengths, base, lengths)
    assert facts["coherent_reward_length_corr"] == close(expected)


def test_a_correlation_that_is_not_defined_is_left_out():
    sft, base, lengths = draws()
    assert "coherent_reward_length_corr" not in answers.coherent_facts(sft, base, np.full_like(lengths, 7))
    assert "coherent_reward_length_corr" not in answers.coherent_facts(sft[:1], base[:1], lengths[:1])


def test_the_kl_estimate_approaches_the_kl_of_the_distributions_the_answers_are_drawn_from():
    rng = np.random.default_rng(0)
    policy, sft = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.5, 0.3])
    drawn = rng.choice(3, size=40000, p=policy)
    truth = float(np.sum(policy * np.log(policy / sft)))
    ratio = np.log(policy / sft)[drawn]
    found = answers.kl_facts(np.log(policy)[drawn], np.log(sft)[drawn])["kl_to_sft"]
    assert abs(found - truth) < 5 * ratio.std() / np.sqrt(len(drawn))  # five standard errors of the mean
    assert answers.kl_facts(np.log(policy)[drawn], np.log(policy)[drawn]) == {"kl_to_sft": 0.0}


@pytest.mark.parametrize(
    "text, said",
    [
        ("it is 4\n#### 1,234", "1234"),
        ("#### 3 then #### 5", "5"),
        ("####-7", "-7"),
        ("#### about 7", None),
        ("", None),
    ],
)
def test_the_last_match_speaks_and_commas_do_not(text, said):
    assert answers.last_match(NUMBER, text) == said


def test_an_optional_group_that_took_no_part_says_nothing():
    assert answers.last_match(r"####( \d+)?", "####") is None


def test_an_answer_is_right_where_it_says_what_the_reference_says():
    said = ["#### 5", "#### 1,000", "#### 6", "five", "#### 7"]
    wanted = ["#### 5", "#### 1000", "#### 5", "#### 5", None]
    facts = answers.pattern_facts(NUMBER, said, wanted)
    assert facts == {"wellformed_fraction": close(4 / 5), "answer_accuracy": close(2 / 5)}


def test_no_form_on_either_side_is_not_agreement():
    facts = answers.pattern_facts(NUMBER, ["five", "#### 5"], ["six", "#### 5"])
    assert facts == {"wellformed_fraction": 0.5, "answer_accuracy": 0.5}


def test_accuracy_is_left_out_where_no_reference_says_anything():
    assert answers.pattern_facts(NUMBER, ["#### 5"], [None]) == {"wellformed_fraction": 1.0}
    assert answers.pattern_facts(NUMBER, ["#### 5"], ["five"]) == {"wellformed_fraction": 1.0}


def test_nothing_to_look_at_gives_no_facts_and_unequal_counts_are_refused():
    none = np.zeros(0)
    assert answers.likelihood_facts(none, none) == {}
    assert answers.coherent_facts(none, none, none) == {}
    assert answers.kl_facts(none, none) == {}
    assert answers.pattern_facts(NUMBER, [], []) == {}
    with pytest.raises(ValueError, match="2 answers, 1 references"):
        answers.pattern_facts(NUMBER, ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="one value of each per response"):
        answers.kl_facts(np.zeros(2), np.zeros(3))
