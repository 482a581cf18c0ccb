"""Online DPO on a tiny embedded world: whose pairs an update learns from, and that it may be stopped anywhere."""

import copy
import dataclasses
import json
import types
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from sera_jax import experiment
from sera_jax.checkpoint import Workdir
from sera_jax.config import Config
from sera_jax.data.items import Item, PairItem
from sera_jax.data.stored import items_of
from sera_jax.experiment.methods import METHODS, online_dpo
from sera_jax.experiment.methods.online_dpo import ARMS
from sera_jax.loops.online import _metrics, online, self_made
from sera_jax.loops.rewards import implicit
from sera_jax.loops.runtime import Policy, Preempted
from sera_jax.loops.sera_study import SeraStudy
from sera_jax.mesh import make_mesh
from sera_jax.training.step import init_state
from sera_jax.writer import MetricWriter, read_records
from tests.evaluation.shown import check_summary, table
from tests.loops.tiny import BATCH, PAIRS, TINY, tiny_config
from tests.tolerances import TOLERANCES

UPDATES, EVERY = 4, 2
TINY_ONLINE = {
    **TINY,
    "method": "online_dpo",
    "online.arms": ("online_dpo", "daa"),
    "online.updates": UPDATES,
    "online.eval_updates": EVERY,
}
SLACK = 4 * TOLERANCES["packing"]["atol"]


class Lab(NamedTuple):
    config: Config
    summary: dict
    study: SeraStudy
    root: object

    def policy(self, name):
        return Policy(name, self.root / "phases" / name, name)

    def lines(self, arm):
        found = read_records(self.root / "metrics.jsonl")[0]
        return [r for r in found if (r["phase"], r["arm"]) == ("train", arm)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("online")
    config = tiny_config(root, tiny=TINY_ONLINE)
    seen = []

    def spy(study, settings, arm, source):
        seen.append(study)
        return online(study, settings, arm, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_dpo, "online", spy)
        patch.setattr(experiment, "make_mesh", lambda *_: make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        summary = experiment.run(config)
    return Lab(config, summary, seen[0], root)


def study_in(lab, folder, **changes):
    """The lab's study in a work directory of its own; jitted functions are shared."""
    run = copy.copy(lab.study.run)
    run.workdir, run.writer = Workdir(folder, {}), MetricWriter(folder, tensorboard=False)
    return dataclasses.replace(lab.study, run=run, evaluate=lambda policy, round_: {}, **changes)


def first_batch(study, policy, update=1):
    """The batch that `policy` makes for itself, and where its pairs come from."""
    with jax.set_mesh(study.run.mesh), study.run.writer:
        state = init_state(study.run.params(policy), None)
        return self_made(study).batch(state, update)


def pairs_of(batch):
    """(chosen, rejected) tokens of every pair."""
    rows, out = batch.batch.rows, []
    for r, q in np.argwhere(batch.batch.weight > 0):
        sides = (batch.batch.chosen_slot[r, q], batch.batch.rejected_slot[r, q])
        out.append(tuple(rows.target[r][rows.slot[r] == side] for side in sides))
    return out


def test_the_third_row_of_the_table_runs_end_to_end_with_its_control(lab):
    saved = json.loads((lab.root / "summary.json").read_text())
    check_summary(saved)
    assert saved["config"]["method"] in METHODS
    assert set(saved["arms"]) == {"sft", *ARMS}
    expected = [(arm, i + 1, u) for arm in ARMS for i, u in enumerate((0, *range(EVERY, UPDATES + 1, EVERY)))]
    assert [(f["arm"], f["round"], f["update"]) for f in saved["rounds"]] == expected
    assert "update" in table(saved)


def test_both_arms_start_from_the_same_round_and_make_as_many_updates(lab):
    assert len(lab.lines("")) == PAIRS // BATCH, "round 1, on all offline pairs, belongs to no arm"
    for arm in ARMS:
        assert [r["step"] for r in lab.lines(arm)] == [*range(1, EVERY + 1)] * (UPDATES // EVERY)
    rates = {arm: [r["learning_rate"] for r in lab.lines(arm)] for arm in ARMS}
    assert rates["online_dpo"] == rates["daa"]
    peak = int(np.argmax(rates["daa"]))
    assert rates["daa"][peak:] == sorted(rates["daa"][peak:], reverse=True), "one schedule over all segments"
    assert len(set(lab.summary["params_sha256"].values())) == 3


def test_an_arm_costs_what_its_lines_and_round_1_say(lab):
    """The policy's answers are sampled once, and scored by it and by the reference; the control samples nothing."""
    of_reference = sum(item.tokens for item in items_of(lab.study.pool))
    for arm in ARMS:
        lines, facts = [*lab.lines(""), *lab.lines(arm)], lab.summary["arms"][arm]
        sampled = sum(line.get("cost/sampling", 0) for line in lines)
        assert (sampled > 0) is (arm == "online_dpo")
        assert facts["cost/sampling"] == sampled
        assert facts["cost/scoring"] == 2 * sampled + of_reference
        assert facts["cost/training"] == 3 * sum(line["num_tokens"] for line in lines)
    assert lab.summary["arms"]["sft"]["cost/training"] > 0


def test_what_is_said_of_the_pairs_adds_up(lab):
    for line in lab.lines("online_dpo"):
        assert 1 <= line["bootstrap/pairs"] <= BATCH
        shares = [line[f"bootstrap/gold_{name}"] for name in ("agree", "disagree", "tie")]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert line["bootstrap/margin_mean"] > 0
    assert not [name for line in lab.lines("daa") for name in line if name.startswith("bootstrap/")]


RANKINGS = {"implicit": {}, "likelihood": {"likelihood_weight": 1.0, "reduction": "mean"}}


def test_pairs_of_prompts_without_a_gold_reward_weigh_nothing_in_what_is_said_of_gold():
    def of_prompt(name, *lengths):
        return PairItem(Item(name, np.arange(3), tuple(map(np.zeros, lengths))), ((0, 1), (1, 2)))

    def said(pairs):
        study: Any = types.SimpleNamespace(gold=lambda item, tokens: np.nan if item.id == "new" else len(tokens))
        found = _metrics(study, pairs, np.ones(2 * len(pairs), np.float32), [])
        assert found["bootstrap/pairs"].value() == 2 * len(pairs)
        return {name: (m.value(), m.weight) for name, m in found.items() if "/gold_" in name}

    new = of_prompt("new", 3, 2, 1)
    shares = {"agree": 0.25, "disagree": 0.5, "tie": 0.25}
    expected = {f"bootstrap/gold_{name}": (share, 4) for name, share in shares.items()}
    assert said([of_prompt("a", 3, 2, 2), new, of_prompt("b", 1, 2, 3)]) == expected
    assert said([new]) == {}


@pytest.mark.parametrize("ranking", RANKINGS)
def test_an_update_learns_from_its_own_policys_best_and_worst_answers_by_the_ranking(lab, tmp_path, ranking):
    study = study_in(lab, tmp_path, ranking=implicit(lab.study.loss, **RANKINGS[ranking]))
    policy, seen = lab.policy("round1"), []
    run_generate = study.run.generate
    study.run.generate = lambda *args, **how: seen.append(run_generate(*args, **how)) or seen[-1]
    batch = first_batch(study, policy)
    (samples,) = seen
    answers = [{tuple(s.tokens.tolist()) for s in samples if s.prompt == p} for p in range(BATCH)]
    used = []
    for chosen, rejected in pairs_of(batch):
        pair = {tuple(chosen.tolist()), tuple(rejected.tolist())}
        used.append(next(p for p, said in enumerate(answers) if pair <= said))
    assert len(used) == len(pairs_of(batch)) == batch.metrics["bootstrap/pairs"].value()
    scores = likelihood_of(samples) if ranking == "likelihood" else None
    for owner, (chosen, rejected) in zip(used, pairs_of(batch), strict=True):
        if scores is not None:  # the sampler's own log-probs say the same as the scorer's
            mine = {tuple(s.tokens.tolist()): v for s, v in zip(samples, scores, strict=True) if s.prompt == owner}
            assert mine[tuple(chosen.tolist())] >= max(mine.values()) - SLACK
            assert mine[tuple(rejected.tolist())] <= min(mine.values()) + SLACK


def likelihood_of(samples):
    return [float(np.mean(s.logps)) for s in samples]


def test_the_two_rankings_make_other_pairs_of_the_same_answers(lab, tmp_path):
    chosen = []
    for name, how in RANKINGS.items():
        study = study_in(lab, tmp_path / name, ranking=implicit(lab.study.loss, **how))
        chosen.append({tuple(tokens.tolist()) for tokens, _ in pairs_of(first_batch(study, lab.policy("round1")))})
    assert chosen[0] != chosen[1]


def test_pairs_below_the_least_margin_are_left_out_of_an_update_and_counted(lab, tmp_path):
    counts = []
    for least in (None, lab.lines("online_dpo")[0]["bootstrap/margin_mean"]):
        rules = dataclasses.replace(lab.study.settings, min_margin=least)
        batch = first_batch(study_in(lab, tmp_path / str(least), settings=rules), lab.policy("round1"))
        made, refused = (batch.metrics[f"bootstrap/{name}"].value() for name in ("pairs", "refused_below_min_margin"))
        assert made == len(pairs_of(batch))
        counts.append((made, refused))
    (every, none), (made, refused) = counts
    assert (none, made + refused) == (0, every) and 0 < made < every


def test_a_policy_at_its_reference_makes_no_pair_and_says_the_way_out(lab, tmp_path):
    study = study_in(lab, tmp_path)
    with pytest.raises(ValueError, match=r"update 1: the answers to 16 prompts make no pair \(.*tie.*temperature"):
        first_batch(study, study.sft)


@pytest.mark.parametrize(
    ("says", "reason"), [(" \n", r"64 empty_response, 16 too_few"), ("so", r"identical_after_strip")]
)
def test_answers_that_say_nothing_or_the_same_make_no_pair_and_are_counted(lab, tmp_path, says, reason):
    spaces = iter([" ", "\n"] * 10**3)
    study = study_in(lab, tmp_path, text=lambda tokens: says + next(spaces))
    with pytest.raises(ValueError, match=rf"update 1: the answers to 16 prompts make no pair \(.*{reason}"):
        first_batch(study, lab.policy("online_dpo/update2"))


def test_a_run_that_is_stopped_between_updates_ends_as_one_that_was_not(lab, tmp_path):
    """Stopped once before and once amid sampling, and gone on with each time."""
    for asked in (3, 9):
        study = study_in(lab, tmp_path)
        count = iter(range(10**6))
        study.run.stop_requested = lambda count=count, asked=asked: next(count) >= asked
        with jax.set_mesh(study.run.mesh), study.run.writer, pytest.raises(Preempted, match="the same command goes on"):
            online(study, lab.config.online, "online_dpo", self_made(study))
        study.run.workdir._lock.close()
    study = study_in(lab, tmp_path)
    with jax.set_mesh(study.run.mesh), study.run.writer:
        policy, _ = online(study, lab.config.online, "online_dpo", self_made(study))
    ends = [json.loads((p.path / "params/checksums.json").read_text()) for p in (policy, lab.policy(policy.name))]
    assert ends[0] == ends[1]
