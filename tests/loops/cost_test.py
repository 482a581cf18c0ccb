"""What the arms of Self-Rewarding PPO cost, counted by hand, and whose account a phase is on."""

import pytest

from sera_jax.loops.cost import Ledger, facts
from tests.loops.srppo_lab import ITERATIONS, jsonl


def parts(costs):
    """(training, sampling, scoring), which add up."""
    found = tuple(costs[f"cost/{kind}"] for kind in ("training", "sampling", "scoring"))
    assert costs["cost/passes_tokens"] == sum(found)
    return found


def test_supervised_fine_tuning_costs_three_passes_of_every_token_it_saw(lab):
    tokens = sum(item.tokens for item in lab.study.demonstrations)
    assert parts(lab.summary["arms"]["sft"]) == (3 * tokens, 0, 0)
    assert parts(lab.summary["arms"]["sft_longer"]) == (3 * tokens * lab.config.ppo.sft_longer_factor, 0, 0)


@pytest.mark.parametrize(("arm", "critic"), [("srppo", 1), ("random_reward", 1), ("reinforce", 0)])
def test_ppo_costs_a_pass_to_sample_one_for_every_scorer_and_three_for_every_model_it_trains(lab, arm, critic):
    rows = [part.rows for i in range(1, ITERATIONS + 1) for part in lab.seen[arm, i].rollouts.parts]
    tokens = sum(int((part.segment > 0).sum()) for part in rows)
    assert parts(lab.summary["arms"][arm]) == (3 * (1 + critic) * tokens, tokens, (3 + critic) * tokens)


def test_what_equal_compute_is_given_is_what_the_method_and_sft_cost(lab):
    arms = lab.summary["arms"]
    last = [facts for facts in lab.summary["rounds"] if facts["arm"] == "srppo"][-1]
    assert arms["srppo"]["cost/passes_tokens"] == last["passes_tokens"]
    both = arms["srppo"]["cost/passes_tokens"] + arms["sft"]["cost/passes_tokens"]
    update = arms["sft"]["cost/passes_tokens"] * lab.config.sft.batch_size / len(lab.study.demonstrations)
    assert arms["sft_equal_compute"]["cost/passes_tokens"] == pytest.approx(both, abs=update)


def test_best_of_n_costs_its_candidates_once_to_sample_and_once_for_either_scorer(lab):
    rows = jsonl(lab.root / "phases" / "best_of_n" / "candidates" / "samples.jsonl")
    said = sum(len(row["tokens"]) for row in rows)
    prompts = {item.id: len(item.prompt) for item in lab.study.prompts}
    assert len(rows) == lab.config.ppo.best_of * lab.config.world.heldout_prompts and prompts
    training, sampling, scoring = parts(lab.summary["arms"]["best_of_n"])
    assert (training, scoring) == (0, 2 * sampling)
    assert said < sampling < said + len(rows) * max(prompts.values())


def test_a_phase_is_on_the_innermost_account_and_once_however_often_it_is_asked_for():
    ledger = Ledger()
    ledger.note("sft", {"training": 6})
    with ledger.account() as arm:
        ledger.note("round1", {"training": 30})
        with ledger.account() as evaluation:
            ledger.note("heldout", {"scoring": 5})
        ledger.note("round1", {"training": 30})
        ledger.note("candidates", {"sampling": 7})
    assert (set(arm), set(evaluation)) == ({"round1", "candidates"}, {"heldout"})
    assert facts(arm.values()) == {
        "cost/passes_tokens": 37,
        "cost/training": 30,
        "cost/sampling": 7,
        "cost/scoring": 0,
    }
    assert facts(ledger.of("sft"))["cost/passes_tokens"] == 6
    assert facts(ledger.of("init")) == {}, "nothing is said of what nobody counted"
