"""Rewards are functions that are handed in: what ranks candidates, and what PPO is paid."""

import dataclasses

import numpy as np
import pytest

from sera_jax import irm
from sera_jax.data.items import Item
from sera_jax.loops.rewards import coherent, implicit, of_texts
from sera_jax.loops.srppo_study import PpoArm
from sera_jax.losses.preference import LOSSES, resolve
from sera_jax.sampling import Candidates, Sample, grouped
from sera_jax.training.rewards import given
from tests.loops.srppo_lab import finished_of, first_rewards, study_of
from tests.tolerances import TOLERANCES

PACKING = {name: TOLERANCES["packing"][name] for name in ("rtol", "atol")}
LENGTHS = (2, 5, 3)
LOGP = np.array([-4.0, -5.0, -9.0], np.float32)
REF_LOGP = np.array([-5.0, -4.5, -7.0], np.float32)


def candidates():
    samples = [Sample(0, k, np.arange(n, dtype=np.int32), np.zeros(n), k != 2) for k, n in enumerate(LENGTHS)]
    return Candidates(Item("a", np.array([1], np.int32), ()), tuple(samples), LOGP, REF_LOGP)


@pytest.mark.parametrize("name", LOSSES)
def test_the_published_ranking_is_the_losses_own_score_to_the_bit(name):
    loss = resolve(name)
    reference = REF_LOGP if loss.uses_reference else None
    score = loss.score(LOGP, np.array(LENGTHS), reference)
    for how in (
        {},
        {"likelihood_weight": 0.0, "reduction": "loss"},
        {"likelihood_weight": 0.0, "reduction": loss.logp},
    ):
        np.testing.assert_array_equal(implicit(loss, **how)(candidates()), score)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "slic_hf"])
def test_the_likelihood_weight_goes_from_the_ratio_to_the_likelihood(name):
    loss, lengths = resolve(name), np.array(LENGTHS)
    for weight in (0.0, 0.25, 1.0):
        total = LOGP - (1 - weight) * REF_LOGP if loss.uses_reference else LOGP
        for reduction, expected in (("sum", total), ("mean", total / lengths)):
            rewards = implicit(loss, likelihood_weight=weight, reduction=reduction)(candidates())
            np.testing.assert_allclose(rewards, expected, rtol=1e-6)


def test_the_ensemble_of_equation_7_mixes_the_policies_and_leaves_the_reference_its_weight():
    now, before = candidates(), dataclasses.replace(candidates(), logp=LOGP - np.array([1, 3, 2], np.float32))
    both = dataclasses.replace(now, logp=np.float32(0.7) * now.logp + np.float32(0.3) * before.logp)
    for weight in (0.0, 0.5, 1.0):
        reward = implicit(resolve("dpo"), likelihood_weight=weight, reduction="mean")
        np.testing.assert_allclose(irm.ensemble(reward(now), reward(before), 0.3), reward(both), rtol=1e-5, atol=1e-6)


def test_the_coherent_reward_is_the_log_ratio_of_the_two_models():
    np.testing.assert_array_equal(coherent(candidates()), LOGP - REF_LOGP)


def test_a_rule_over_texts_ranks_too():
    reward = of_texts(
        lambda prompt, response: len(response) - len(prompt), lambda item, tokens: ("ab", "x" * len(tokens))
    )
    np.testing.assert_array_equal(reward(candidates()), np.array(LENGTHS) - 2)


def test_samples_come_back_by_prompt_in_the_order_of_their_index():
    prompts = [Item(name, np.array([1, 2], np.int32), (np.array([3], np.int32),)) for name in "ab"]
    tokens = np.array([5], np.int32)
    flat = [Sample(p, k, tokens + 10 * p + k, np.zeros(1), True) for p, k in ((1, 1), (0, 0), (1, 0), (0, 1))]
    groups = grouped(prompts, flat)
    assert [[t.tolist() for t in group.tokens] for group in groups] == [[[5], [6]], [[15], [16]]]
    assert all(group.prompt.responses == () for group in groups), "what the prompt's row held is no candidate"
    assert [group.item.id for group in groups] == ["a", "b"]


@pytest.mark.parametrize("rule", ["penalty", "subtract", "keep"])
def test_ppo_is_paid_what_a_function_over_texts_says(lab, tmp_path, rule):
    """The same rollouts as the method's own; the reward is how many letters an answer has."""
    study = study_of(lab, tmp_path, reward__missing_eos=rule, reward__missing_eos_penalty=3.0)
    letters = of_texts(
        lambda prompt, response: len(response), lambda item, tokens: tuple(study.texts(item, tokens).values())
    )
    arm = PpoArm("letters", reward=given, given=lambda study, rollouts, iteration: [letters(c) for c in rollouts])
    metrics, *_ = first_rewards(study, arm)
    seen = lab.seen["srppo", 1]
    said = np.concatenate([letters(c) for c in seen.rollouts.candidates])
    cut = ~finished_of(seen)
    expected = {"penalty": np.where(cut, -3.0, said), "subtract": said - 3.0 * cut, "keep": said}[rule]
    np.testing.assert_allclose(metrics["objective/scores"], expected.mean(), **PACKING)
    assert metrics["coherent_reward/mean"] == pytest.approx(lab.lines("srppo")[0]["coherent_reward/mean"], rel=1e-5)
