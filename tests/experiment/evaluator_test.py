"""Which facts a run gets, from what it has: composed from scores and answers that are made up here."""

import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest

from sera_jax import world
from sera_jax.config import EvalGroup, SamplingGroup
from sera_jax.data.items import Item, PairItem
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.evaluator import Evaluator
from sera_jax.loops.cost import Ledger
from sera_jax.loops.runtime import Policy
from sera_jax.losses.preference import resolve
from sera_jax.sampling import Sample, grouped

BASE, SFT, OTHER = (Policy(name, pathlib.Path(), name) for name in ("base", "sft", "other/iteration3"))
# log-prob of a token under each: the SFT model is surer than the base, the trained policy surer still
PER_TOKEN = {"base": -2.0, "sft": -1.5, "other/iteration3": -1.0}
QUESTIONS = ["repeat : saw red", "first of : oak tin elm"]
GREEDY = ["sure , saw red all done .", "oak"]
REPLIES = {"sft": ["saw red", "oak"], "other/iteration3": ["sure , saw red all done .", "elm"]}


class FakeRuntime:
    """Scores by length alone, answers from a list; remembers what it was asked for."""

    def __init__(self, root, tokenizer):
        self.workdir = types.SimpleNamespace(root=root)
        self.tokenizer = tokenizer
        self.said: list[str] = []
        self.writer = types.SimpleNamespace(announce=self.said.append)
        self.scored: list[str] = []
        self.settings: list[SamplingGroup] = []
        self.sampled: dict[str, float] = {}
        self.ledger = Ledger()

    def score(self, name, policy, items):
        self.scored.append(name)
        rate = PER_TOKEN[policy.name]
        return [np.array([rate * len(r) for r in item.responses], np.float32) for item in items]

    def sample(self, name, policy, prompts, num_samples, settings, *, round_):
        self.settings.append(settings)
        self.sampled[name] = settings.temperature
        replies = zip(QUESTIONS, REPLIES[policy.name] if settings.temperature else GREEDY)
        answers = [self.tokenizer.encode_response(question, reply) for question, reply in replies]
        samples = [Sample(i, 0, tokens, np.zeros(0, np.float32), True) for i, tokens in enumerate(answers)]
        return grouped(prompts, samples)


@pytest.fixture
def make(tmp_path):
    tokenizer = Tokenizer.load(world.write_tokenizer(tmp_path / "t"))
    prompts = [Item(f"q{i}", tokenizer.encode_prompt(text), ()) for i, text in enumerate(QUESTIONS)]
    replies = ["saw red", "oak"]
    held = [
        dataclasses.replace(item, responses=(tokenizer.encode_response(question, reply),))
        for item, question, reply in zip(prompts, QUESTIONS, replies)
    ]

    def evaluator(temperature=1.0, pattern="", temperatures=(), **fields):
        settings = EvalGroup(
            temperature=temperature, temperatures=temperatures, num_generations=1, answer_pattern=pattern
        )
        given = {
            "run": FakeRuntime(tmp_path, tokenizer),
            "loss": None,
            "pairs": [],
            "prompts": prompts,
            "tokenizer": tokenizer,
            "gold": lambda item, tokens: world.gold(tokenizer.decode(item.prompt), tokenizer.decode(tokens)),
            "reference": SFT,
            "settings": settings,
            "sampling": SamplingGroup(temperature=0.3, top_p=0.5, top_k=4, max_new_tokens=16),
            "base": BASE,
            "demonstrations": held,
        }
        return Evaluator(**{**given, **fields})

    return evaluator


def test_the_facts_of_a_policy_of_self_rewarding_ppo(make):
    evaluator = make()
    facts = evaluator.of_arm(OTHER)
    lengths = np.array([len(answer.tokens) for answer in evaluator.answers(OTHER)])
    assert facts["response_tokens_mean"] == lengths.mean()
    assert facts["eos_fraction"] == 1.0
    assert facts["gold_mean"] == pytest.approx((1.0 + 0.0) / 2)
    assert facts["win_rate_vs_sft"] == pytest.approx(0.5)  # better on the first prompt, worse on the second
    assert facts["coherent_reward_mean"] == pytest.approx(0.5 * lengths.mean())
    assert facts["coherent_reward_length_corr"] == pytest.approx(1.0)
    assert facts["kl_to_sft"] == pytest.approx(0.5 * lengths.mean())
    assert facts["heldout_nll"] == pytest.approx(1.0)
    assert {"gold_ci95", "coherent_reward_ci95"} <= set(facts)
    assert not {"wellformed_fraction", "heldout_accuracy"} & set(facts)


def test_a_round_has_the_same_facts_without_the_intervals(make):
    evaluator = make()
    whole = evaluator.of_arm(OTHER)
    kept = {k: v for k, v in whole.items() if not k.endswith("_ci95")}
    assert evaluator.look_at(OTHER, 3) == kept


def test_the_gold_of_an_arm_is_known_at_every_temperature_asked_for(make):
    evaluator = make(temperatures=(0.0, 0.5, 1.0))
    facts = evaluator.of_arm(OTHER)
    assert facts["gold_by_temperature"] == pytest.approx({"0": (1.0 + 0.6) / 2, "0.5": 0.5, "1": facts["gold_mean"]})
    name = f"{OTHER.name}/generations"
    asked = {at: t for at, t in evaluator.run.sampled.items() if at.startswith(name)}
    assert asked == {name: 1.0, f"{name}_at_0": 0.0, f"{name}_at_0.5": 0.5}, "what is known is not drawn again"
    rest = {key: value for key, value in facts.items() if key != "gold_by_temperature"}
    assert rest == make().of_arm(OTHER)
    assert "gold_by_temperature" not in evaluator.look_at(OTHER, 3)
    assert "gold_by_temperature" not in make(temperatures=(0.0,), gold=None).of_arm(OTHER)


def test_the_gold_is_known_by_task_and_of_tasks_that_were_held_out_at_every_temperature(make):
    facts = make(temperatures=(0.0, 1.0), tasks=("repeat", "first"), heldout_tasks=("first",)).of_arm(OTHER)
    assert facts["gold_by_task"] == pytest.approx({"repeat": 1.0, "first": 0.0})
    assert (facts["gold_in_domain"], facts["gold_out_of_domain"]) == pytest.approx((1.0, 0.0))
    assert facts["gold_in_domain_by_temperature"] == pytest.approx({"0": 1.0, "1": 1.0})
    assert facts["gold_out_of_domain_by_temperature"] == pytest.approx({"0": 0.6, "1": 0.0})
    plain = make(temperatures=(0.0, 1.0), tasks=("repeat", "first")).of_arm(OTHER)
    assert plain == {name: value for name, value in facts.items() if "_domain" not in name}
    assert make(temperatures=(0.0, 1.0)).of_arm(OTHER) == {k: v for k, v in plain.items() if k != "gold_by_task"}


def test_the_main_facts_of_a_policy_are_said_in_a_line_and_once(make):
    evaluator = make()
    evaluator.look_at(OTHER, 1)
    facts = evaluator.look_at(OTHER, 1)  # as another arm, which shares the round, does
    assert evaluator.run.said == [
        f"held out, other iteration 3: gold {facts['gold_mean']:.3f}, wins vs sft 50.0 %, coherent "
        f"{facts['coherent_reward_mean']:.2f}, KL {facts['kl_to_sft']:.2f}, NLL 1.000, tokens 5.0"
    ]


def test_the_sft_model_is_at_no_distance_from_itself_and_scored_once(make):
    evaluator = make()
    facts = evaluator.of_arm(SFT)
    assert (facts["kl_to_sft"], facts["win_rate_vs_sft"]) == (0.0, 0.5)
    assert "sft/generations_by_itself" not in evaluator.run.scored


def test_a_last_policy_has_its_kl_by_its_answers_at_temperature_1_wherever_it_gave_some(make):
    evaluator = make(temperature=0.0, temperatures=(0.0, 1.0), base=None)
    lengths = [len(answer.tokens) for answer in evaluator.answers(OTHER, 1.0)]
    assert evaluator.of_arm(OTHER)["kl_to_sft"] == pytest.approx(0.5 * np.mean(lengths))
    assert evaluator.of_arm(SFT)["kl_to_sft"] == 0.0
    assert set(evaluator.run.scored) - {f"{name}/heldout_demonstrations" for name in (OTHER.name, SFT.name)} == {
        f"{OTHER.name}/draws_by_{scorer}" for scorer in ("itself", "sft")
    }
    assert "kl_to_sft" not in evaluator.look_at(OTHER, 3), "of a round it would cost as much again"


def test_the_kl_is_left_out_where_answers_are_not_draws_from_the_policy(make):
    greedy = make(temperature=0.0)
    assert "kl_to_sft" not in greedy.of_arm(OTHER)
    assert "coherent_reward_mean" in greedy.of_arm(OTHER)
    assert {s.temperature for s in greedy.run.settings} == {0.0}
    assert {(s.top_p, s.top_k, s.max_new_tokens) for s in greedy.run.settings} == {(1.0, 0, 16)}


def test_answers_that_are_no_policys_get_what_answers_alone_can_tell(make):
    evaluator = make(pattern=r"(\w+)$")
    answers = evaluator.answers(OTHER)
    facts = evaluator.facts_of_answers("best_of_n", answers)
    assert facts == {k: v for k, v in evaluator.of_arm(OTHER).items() if k not in ("heldout_nll", "kl_to_sft")}
    assert {"best_of_n/generations_by_sft", "best_of_n/generations_by_base"} <= set(evaluator.run.scored)


def test_an_answer_is_compared_with_the_held_out_demonstration_of_its_prompt(make):
    evaluator = make(pattern=r"(saw|oak|elm)")
    assert evaluator.of_arm(SFT) | {"wellformed_fraction": 1.0, "answer_accuracy": 1.0} == evaluator.of_arm(SFT)
    facts = evaluator.of_arm(OTHER)
    assert (facts["wellformed_fraction"], facts["answer_accuracy"]) == (1.0, 0.5)
    without = make(pattern=r"(saw|oak|elm)", demonstrations=[]).of_arm(OTHER)
    assert without["wellformed_fraction"] == 1.0
    assert not {"answer_accuracy", "heldout_nll"} & set(without)


def test_without_a_base_there_is_no_coherent_reward_and_without_prompts_there_are_no_answers(make):
    facts = make(base=None).of_arm(OTHER)
    assert not [name for name in facts if name.startswith("coherent_reward")]
    assert "kl_to_sft" in facts and "kl_to_sft" not in make(base=None).look_at(OTHER, 3)
    silent = make(prompts=[])
    assert set(silent.of_arm(OTHER)) == {"heldout_nll"}
    silent.show(OTHER)
    assert (silent.run.workdir.root / "generations.jsonl").read_text() == ""
    assert silent.facts_of_answers("best_of_n", []) == {}


def test_pairs_are_ranked_by_the_implicit_reward_of_the_loss(make):
    def pair(name, chosen, rejected):
        return PairItem(
            Item(name, np.array([1, 2], np.int32), tuple(np.full(n, 3, np.int32) for n in (chosen, rejected)))
        )

    evaluator = make(loss=resolve("dpo"), pairs=[pair("a", 5, 2), pair("b", 1, 2)], base=None, demonstrations=[])
    facts = evaluator.of_arm(OTHER)  # its log-ratio to the SFT model grows with every token
    assert facts["heldout_accuracy"] == facts["length_baseline_accuracy"] == 0.5
    assert facts["heldout_margin"] == pytest.approx(0.5 * np.mean([5 - 2, 1 - 2]))


def test_the_generations_of_every_policy_stand_in_one_file(make, tmp_path):
    evaluator = make()
    for policy in (SFT, OTHER, SFT):
        evaluator.show(policy)
    rows = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert [(row["policy"], row["id"]) for row in rows] == [("sft", "q0"), ("other/iteration3", "q0")]
    assert rows[1]["prompt"] == QUESTIONS[0]
    assert rows[1]["response"] == REPLIES["other/iteration3"][0]
    assert rows[1]["tokens"] == len(evaluator.answers(OTHER)[0].tokens)
