"""The rounds of SeRA on a tiny embedded world: what is kept, what is added, and what every control shares."""

import copy
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest

from sera_jax import experiment, guards
from sera_jax.checkpoint import Checkpoints, Workdir, save_tree
from sera_jax.config import Config
from sera_jax.core import Stream, rng_for
from sera_jax.data import batches
from sera_jax.data.batches import PairLoader
from sera_jax.data.items import Item
from sera_jax.data.packing import RowSpec, build_rows
from sera_jax.data.stored import with_reference
from sera_jax.evaluation.rankings import RANKINGS
from sera_jax.evaluation.report import check_summary
from sera_jax.experiment.methods import sera as sera_method
from sera_jax.experiment.methods.sera import ARMS as SERA_ARMS
from sera_jax.experiment.methods.sera import SERA, ranking_of
from sera_jax.loops import review
from sera_jax.loops import sera_study as study_module
from sera_jax.loops.brake import brake
from sera_jax.loops.runtime import NonFinite, Policy, Preempted
from sera_jax.loops.sera import sera
from sera_jax.loops.sera_study import SeraStudy
from sera_jax.loops.shapes import PairShapes
from sera_jax.losses.preference import resolve
from sera_jax.mesh import make_mesh
from sera_jax.training.optimizer import make_optimizer
from sera_jax.training.score import make_score, place_rows
from sera_jax.training.step import abstract_state
from sera_jax.writer import MetricWriter, read_records
from tests.loops.alike import assert_arm_alike, assert_policies_alike, run_on
from tests.loops.tiny import BATCH, PAIRS, tiny_config
from tests.tolerances import TOLERANCES

ARMS = ("daa", "sera", "random")
KEPT = round(0.7 * PAIRS)
ADDED = round(0.3 * PAIRS)
UPDATES = PAIRS // BATCH


class Lab(NamedTuple):
    """A finished run, and what its loops were given."""

    config: Config
    summary: dict
    study: SeraStudy
    root: pathlib.Path
    scorer: Callable

    def rounds(self, arm):
        return {facts["round"]: facts for facts in self.summary["rounds"] if facts["arm"] == arm}

    def offline(self, arm, round_):
        return _jsonl(self.root / "phases" / arm / f"pairs{round_}" / "offline.jsonl")

    def sampled(self, arm, round_):
        return _jsonl(self.root / "phases" / arm / f"pairs{round_}" / "sampled.jsonl")

    def policy(self, name):
        return Policy(name, self.root / "phases" / name, name)

    @property
    def lines(self):
        return read_records(self.root / "metrics.jsonl")[0]

    def train_lines(self, arm, round_):
        return [r for r in self.lines if (r["phase"], r["arm"], r["round"]) == ("train", arm, round_)]


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    config = tiny_config(root, sera__arms=ARMS, sera__rounds=3)
    seen = []

    def spy(study, arm, settings):
        seen.append(study)
        return sera(study, arm, settings)

    def one_device(*_):
        return make_mesh(1, 1, 1, devices=jax.devices()[:1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sera_method, "sera", spy)
        patch.setattr(experiment, "make_mesh", one_device)
        summary = experiment.run(config)
    run = seen[0].run
    scorer = make_score(run.cfg, run.mesh, window=run.layout.row_tokens, chunk_tokens=run.chunk_tokens)
    return Lab(config, summary, seen[0], root, scorer)


def _jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _study(lab, folder, *, loss=None, train=None, sft=None, config=None, **settings):
    """The lab's study with other settings in a work directory of its own; jitted functions are shared."""
    run = copy.copy(lab.study.run)
    run.workdir, run.writer = Workdir(folder, config or {}), MetricWriter(folder, tensorboard=False)
    return dataclasses.replace(
        lab.study,
        run=run,
        sft=sft or lab.study.sft,
        loss=loss or lab.study.loss,
        settings=dataclasses.replace(lab.study.settings, **settings),
        train=dataclasses.replace(lab.study.train, **(train or {})),
        evaluate=lambda policy, round_: {},
    )


def _run(study, arm="sera"):
    settings = dataclasses.replace(study.settings, **SERA_ARMS[arm].how)
    with jax.set_mesh(study.run.mesh), study.run.writer:
        return sera(dataclasses.replace(study, ranking=ranking_of(study.loss, settings)), arm, settings)


def _checksums(policy):
    return json.loads((policy.path / "params" / "checksums.json").read_text())


def _alone(lab, policy, items):
    """Summed log-probs f32[n, K] of every response of every item, each in a row of its own, from the policy on disk."""
    run = copy.copy(lab.study.run)
    run._held = None
    single = [Item(f"{i}/{k}", item.prompt, (r,)) for i, item in enumerate(items) for k, r in enumerate(item.responses)]
    spec = RowSpec(run.layout.row_tokens, scored=64, slots=1)
    score = lab.scorer
    params, logps = run.params(policy), []
    for start in range(0, len(single), 64):
        part = single[start : start + 64]
        rows = build_rows(part, [[i] for i in range(len(part))], spec, 64).rows
        logps += np.asarray(score(params, place_rows(rows, run.mesh)))[: len(part), 0].tolist()
    return np.array(logps).reshape(len(items), -1)


def _margins(lab, round_):
    """The pool's ensembled margins by eq. 7 in round `round_` of arm `sera`, in float64 from policies on disk."""
    gamma = lab.config.sera.ensemble_gamma
    items = [pair.item for pair in lab.study.pool]
    names = ["sft", "round1", "sera/round2"][:round_]
    reference, before, now = (_alone(lab, lab.policy(name), items) for name in ("sft", names[-2], names[-1]))
    reward = (1 - gamma) * (now - reference) + gamma * (before - reference)
    return np.array([row[w] - row[l] for row, pair in zip(reward, lab.study.pool) for w, l in pair.pairs])


def test_the_summary_has_what_readers_rely_on(lab):
    saved = json.loads((lab.root / "summary.json").read_text())
    check_summary(saved, SERA.report)
    assert set(saved["arms"]) == {"sft", *ARMS}
    assert {(r["arm"], r["round"]) for r in saved["rounds"]} == {(arm, r) for arm in ARMS for r in (1, 2, 3)}
    for facts in saved["arms"].values():
        wanted = {"gold_mean", "gold_ci95", "win_rate_vs_sft", "heldout_accuracy", "response_tokens_mean"}
        assert wanted <= set(facts)
    for facts in saved["rounds"]:
        assert {"kept", "added", "flipped_fraction_kept", "updates", "heldout_accuracy"} <= set(facts)
    assert set(saved["params_sha256"]) == {"sft", *ARMS}


def test_every_step_of_the_metrics_is_written_once(lab):
    places = [(r["phase"], r["arm"], r["round"], r["step"]) for r in lab.lines]
    assert len(set(places)) == len(places)
    train = [place for place in places if place[0] == "train"]
    expected = [("train", "", 1)] + [("train", arm, round_) for arm in ARMS for round_ in (2, 3)]
    assert sorted(train) == sorted((*key, step) for key in expected for step in range(1, UPDATES + 1))


def test_every_arm_has_the_same_number_of_updates_in_every_round(lab):
    assert {facts["updates"] for facts in lab.summary["rounds"]} == {UPDATES}
    for arm in ARMS:
        for round_ in (2, 3):
            assert len(lab.train_lines(arm, round_)) == UPDATES


def test_round_one_trains_on_all_pairs_and_is_shared_by_the_arms(lab):
    firsts = [lab.rounds(arm)[1] for arm in ARMS]
    assert all((facts["kept"], facts["added"]) == (PAIRS, 0) for facts in firsts)
    tokens = sum(record["num_tokens"] for record in lab.train_lines("", 1))
    assert tokens == sum(pair.item.tokens for pair in lab.study.pool)


def test_the_policy_starts_at_its_reference(lab):
    first = lab.train_lines("", 1)[0]
    tolerance = TOLERANCES["packing"]["atol"]
    assert first["rewards/margins"] == pytest.approx(0, abs=tolerance)
    assert first["rewards/chosen"] == pytest.approx(0, abs=tolerance)
    assert first["loss"] == pytest.approx(math.log(2), abs=tolerance)
    sft = lab.summary["arms"]["sft"]
    assert (sft["heldout_margin"], sft["heldout_accuracy"], sft["win_rate_vs_sft"]) == (0.0, 0.5, 0.5)
    assert lab.train_lines("", 1)[-1]["rewards/margins"] != 0


def test_the_state_of_a_round_is_let_go_when_the_next_one_of_its_arm_is_done(lab):
    """That of round 1 is of all arms, that of the last nobody has gone on from."""
    for arm in ARMS:
        rounds = [lab.root / "phases" / arm / f"round{n}" / "optimizer" / "arrays" for n in (2, 3)]
        assert [folder.exists() for folder in rounds] == [False, True]
    assert (lab.root / "phases" / "round1" / "optimizer" / "arrays").exists()


def test_the_learning_rate_goes_on_over_the_rounds_and_ends_near_zero(lab):
    rates = [r["learning_rate"] for key in (("", 1), ("sera", 2), ("sera", 3)) for r in lab.train_lines(*key)]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(lab.config.train.learning_rate)
    assert all(a > b for a, b in zip(rates[peak + 1 :], rates[peak + 2 :]))
    assert rates[-1] < 0.1 * rates[peak]


def test_exactly_the_configured_share_is_kept(lab):
    for arm in ("sera", "random"):
        for round_ in (2, 3):
            assert lab.rounds(arm)[round_]["kept"] == KEPT
            assert sum(row["kept"] for row in lab.offline(arm, round_)) == KEPT
    assert {lab.rounds("daa")[round_]["kept"] for round_ in (1, 2, 3)} == {PAIRS}


@pytest.mark.parametrize("round_", [2, 3])
def test_the_kept_pairs_have_the_largest_ensembled_margins(lab, round_):
    margins = _margins(lab, round_)
    rows = lab.offline("sera", round_)
    rtol, atol = TOLERANCES["packing"]["rtol"], TOLERANCES["packing"]["atol"]
    np.testing.assert_allclose([row["margin"] for row in rows], margins, rtol=rtol, atol=atol)
    assert np.std(margins) > 100 * atol, "the margins say nothing"
    kept = {i for i, row in enumerate(rows) if row["kept"]}
    expected = set(np.argsort(-margins, kind="stable")[:KEPT].tolist())
    cut = min(margins[i] for i in expected)
    assert all(abs(margins[i] - cut) <= 2 * atol for i in kept ^ expected)  # but for ties within rounding the same set


def test_only_a_rate_that_teaches_nothing_is_pointed_at(lab, tmp_path, capsys):
    rate = lab.config.train.learning_rate
    for train in ({}, {"learning_rate": rate / 1e6}):
        capsys.readouterr()
        _run(_study(lab, tmp_path / str(len(train)), rounds=1, train=train), arm="daa")
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        said = f"warning: {UPDATES} updates at {rate / 1e6:g}: the margins stayed at 0"
        assert [line.startswith(said) for line in warnings] == [True] * len(train)
    _run(_study(lab, tmp_path / "1", rounds=1, train=train), arm="daa")
    assert "warning" not in capsys.readouterr().err, "it was said where it was trained"


def test_random_keeps_as_many_but_others(lab):
    kept = {arm: {row["id"] for row in lab.offline(arm, 2) if row["kept"]} for arm in ("sera", "random")}
    assert len(kept["random"]) == len(kept["sera"])
    assert kept["random"] != kept["sera"]
    # both saw the same policy, so they ranked the same margins
    assert [row["margin"] for row in lab.offline("random", 2)] == [row["margin"] for row in lab.offline("sera", 2)]


def test_flipped_labels_are_counted_in_the_kept_set(lab):
    flipped = {pair.item.id: pair.flipped for pair in lab.study.pool}
    assert sum(flipped.values()) == round(lab.config.data.label_noise * PAIRS)
    for arm in ("sera", "random"):
        for round_ in (2, 3):
            kept = [row["id"] for row in lab.offline(arm, round_) if row["kept"]]
            assert lab.rounds(arm)[round_]["flipped_fraction_kept"] == np.mean([flipped[name] for name in kept])
    assert lab.rounds("daa")[3]["flipped_fraction_kept"] == lab.config.data.label_noise


def test_labels_that_nobody_flipped_are_not_counted(lab, tmp_path):
    study = _study(lab, tmp_path, rounds=1)
    real = [dataclasses.replace(pair, flipped=False) for pair in study.pool]
    (_, (facts,)) = _run(dataclasses.replace(study, pool=real), arm="daa")
    assert facts["kept"] == len(real)
    assert "flipped_fraction_kept" not in facts


def test_bootstrapped_pairs_are_the_best_against_the_worst_candidate(lab):
    gamma = lab.config.sera.ensemble_gamma
    samples = _jsonl(lab.root / "phases" / "round1" / "candidates" / "samples.jsonl")
    prompts = lab.study.prompts
    items = [Item(p.id, p.prompt, tuple(np.array(s["tokens"]) for s in samples if s["prompt"] == i))
             for i, p in enumerate(prompts)]  # fmt: skip
    assert {len(item.responses) for item in items} == {lab.config.sera.num_samples}
    reference, now = (_alone(lab, lab.policy(name), items) for name in ("sft", "round1"))
    reward = (1 - gamma) * (now - reference)  # the round before is the SFT model, whose reward is 0
    best = {item.id: reward[i].max() - reward[i].min() for i, item in enumerate(items)}
    place = {item.id: i for i, item in enumerate(items)}
    slack = 4 * TOLERANCES["packing"]["atol"]

    pairs = lab.sampled("sera", 2)
    assert 0 < len(pairs) <= ADDED
    assert len(pairs) == lab.rounds("sera")[2]["added"]
    used = [pair["id"].removesuffix("#round2") for pair in pairs]
    assert len(set(used)) == len(used), "one pair for each prompt"
    for name, pair in zip(used, pairs, strict=True):
        texts = [r.tolist() for r in items[place[name]].responses]
        chosen, rejected = (reward[place[name]][texts.index(pair[side])] for side in ("chosen", "rejected"))
        assert chosen - rejected == pytest.approx(best[name], abs=slack)
        assert chosen > rejected - slack
    others = [value for name, value in best.items() if name not in used]
    assert min(best[name] for name in used) >= max(others) - slack


def test_rankings_of_a_round_are_judged_by_the_gold_of_its_stored_candidates(lab):
    items = _candidates(lab, lab.root, "round1/candidates")
    reference, now = (_alone(lab, lab.policy(name), items) for name in ("sft", "round1"))
    lengths = np.array([[len(r) for r in item.responses] for item in items])
    golds = np.array([[lab.study.gold(item, r) for r in item.responses] for item in items])
    by = {"log_ratio_sum": now - reference, "logp_mean": now / lengths, "ref_logp_mean": reference / lengths}
    found = lab.rounds("sera")[2]["rankings"]
    assert set(found) == set(RANKINGS)
    assert found == lab.rounds("random")[2]["rankings"], "it hangs on the candidates alone"
    for name, scores in by.items():
        best, worst = (golds[np.arange(len(golds)), pick(scores, axis=1)] for pick in (np.argmax, np.argmin))
        assert found[name]["pairs"] <= len(items)
        # a pair that says the same on both sides is none, and has no gap
        assert found[name]["gold_gap"] * found[name]["pairs"] == pytest.approx(sum(best - worst), abs=1e-6)
        centred = [v - v.mean(axis=1, keepdims=True) for v in (scores, golds)]
        assert found[name]["gold_corr"] == pytest.approx(np.corrcoef(*map(np.ravel, centred))[0, 1], abs=1e-3)


def _candidates(lab, folder, name):
    """The items of a run's candidates, by prompt, with all their answers."""
    samples = _jsonl(folder / "phases" / name / "samples.jsonl")
    return [
        Item(p.id, p.prompt, tuple(np.array(s["tokens"], np.int32) for s in samples if s["prompt"] == i))
        for i, p in enumerate(lab.study.prompts)
    ]


def _check_pairs(folder, arm, items, scores):
    """Every pair of round 2 is its prompt's best against its worst by `scores`, f[prompts, N]."""
    place = {item.id: i for i, item in enumerate(items)}
    pairs = _jsonl(folder / "phases" / arm / "pairs2" / "sampled.jsonl")
    assert 0 < len(pairs) <= ADDED
    for pair in pairs:
        i = place[pair["id"].removesuffix("#round2")]
        said = [r.tolist() for r in items[i].responses]
        for side, value in (("chosen", scores[i].max()), ("rejected", scores[i].min())):
            assert scores[i][said.index(pair[side])] == pytest.approx(value, abs=TOLERANCES["packing"]["atol"])


@pytest.mark.parametrize("arm", ["sera_recommended", "bootstrap_only_likelihood"])
def test_ranking_by_likelihood_pairs_by_the_mean_log_prob_of_the_ensemble(lab, tmp_path, arm):
    _, facts = _run(_study(lab, tmp_path, train=SHORT, rounds=2), arm)
    assert facts[1]["kept"] == (KEPT if arm == "sera_recommended" else PAIRS)
    items = _candidates(lab, tmp_path, "round1/candidates")
    now, before = (
        _alone(lab, policy, items) for policy in (Policy("", tmp_path / "phases/round1", "r"), lab.study.sft)
    )
    lengths = np.array([[len(r) for r in item.responses] for item in items])
    gamma = lab.config.sera.ensemble_gamma
    _check_pairs(tmp_path, arm, items, ((1 - gamma) * now + gamma * before) / lengths)


def test_the_likelier_answers_of_the_sft_model_are_its_own_and_judged_by_it_alone(lab, tmp_path):
    _, facts = _run(_study(lab, tmp_path, train=SHORT, rounds=2, num_samples=3), "sft_likelier_of_4")
    assert facts[1]["kept"] == PAIRS
    items = _candidates(lab, tmp_path, "sft/candidates2")
    assert {len(item.responses) for item in items} == {4}
    lengths = np.array([[len(r) for r in item.responses] for item in items])
    _check_pairs(tmp_path, "sft_likelier_of_4", items, _alone(lab, lab.study.sft, items) / lengths)
    assert not (tmp_path / "phases" / "round1" / "candidates").exists()


def test_the_oracle_pairs_by_gold_and_chance_by_nothing(lab, tmp_path):
    facts = {arm: _run(_study(lab, tmp_path / arm, train=SHORT, rounds=2), arm)[1][1] for arm in CONTROLS}
    assert facts["oracle_pairing"]["agreement"] == {"agree": 1.0, "disagree": 0.0, "tie": 0.0}
    assert facts["random_pairing"]["agreement"]["agree"] < 1
    assert {f["kept"] for f in facts.values()} == {KEPT}, "the review is that of the method"
    items = _candidates(lab, tmp_path / "random_pairing", "round1/candidates")
    assert _candidates(lab, tmp_path / "oracle_pairing", "round1/candidates")[0].responses[0].tolist() == (
        items[0].responses[0].tolist()
    )
    rngs = [rng_for(lab.config.seed, Stream.SELECT, 2, 3, i) for i in range(len(items))]
    draws = np.array([rng.random(len(item.responses)) for rng, item in zip(rngs, items)], np.float32)
    _check_pairs(tmp_path / "random_pairing", "random_pairing", items, draws)


CONTROLS = ("oracle_pairing", "random_pairing")


def test_a_curriculum_alone_trains_on_all_pairs_in_order(lab, tmp_path, loaders):
    _, facts = _run(_study(lab, tmp_path, train=SHORT, rounds=2), "curriculum")
    assert (facts[1]["kept"], facts[1]["added"], facts[1]["updates"]) == (PAIRS, 0, 2)
    (_, _, order_1), (_, ids, order_2) = loaders
    assert (order_1, order_2, len(ids)) == ("shuffle", "given", PAIRS)
    margin = {row["id"]: row["margin"] for row in _jsonl(tmp_path / "phases" / "curriculum" / "pairs2/offline.jsonl")}
    assert [margin[name] for name in ids] == sorted(margin.values(), reverse=True)
    plain, _ = _run(_study(lab, tmp_path / "daa", train=SHORT, rounds=2, curriculum="easy_to_hard"), "daa")
    assert not (tmp_path / "daa" / "phases" / "daa" / "pairs2").exists(), "daa has no curriculum"
    assert _checksums(plain) != _checksums(Policy("", tmp_path / "phases" / "curriculum" / "round2", ""))


def test_answers_that_the_sft_model_would_not_say_make_no_pair(lab, tmp_path):
    study = _study(lab, tmp_path, train=SHORT, rounds=2, support_quantile=0.5)
    _, facts = _run(study)
    own = _candidates(lab, tmp_path, "sft/support")
    mean = lambda items: _alone(lab, lab.study.sft, items) / [[len(r) for r in i.responses] for i in items]  # noqa: E731
    least = np.quantile(mean(own), 0.5)
    items = _candidates(lab, tmp_path, "round1/candidates")
    rates, slack = mean(items), TOLERANCES["packing"]["atol"]
    assert facts[1]["bootstrap/unsupported_fraction"] == facts[1]["bootstrap/refused_unsupported"] / np.size(
        mean(items)
    )
    assert abs(facts[1]["bootstrap/refused_unsupported"] - np.sum(rates < least)) <= np.sum(abs(rates - least) < slack)
    assert 0 < np.sum(rates < least) < rates.size
    said = {
        (item.id, tuple(r.tolist())): rate for item, row in zip(items, rates) for r, rate in zip(item.responses, row)
    }
    for pair in _jsonl(tmp_path / "phases" / "sera" / "pairs2" / "sampled.jsonl"):
        for side in ("chosen", "rejected"):
            assert said[pair["id"].removesuffix("#round2"), tuple(pair[side])] >= least - slack


def test_the_share_to_keep_may_be_read_off_the_margins(lab, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        guards, "clean_share", lambda margins: seen.append(margins) or (0.6, {"mixture/clean_share": 0.6})
    )
    _, facts = _run(_study(lab, tmp_path, train=SHORT, rounds=2, keep_rule="mixture", bootstrap_fraction=0.0))
    rows = _jsonl(tmp_path / "phases" / "sera" / "pairs2" / "offline.jsonl")
    assert facts[1]["kept"] == round(0.6 * PAIRS) == sum(row["kept"] for row in rows) != KEPT
    assert facts[1]["mixture/clean_share"] == 0.6
    np.testing.assert_array_equal(seen[0], np.array([row["margin"] for row in rows], np.float32))


def test_pairs_that_selection_left_out_may_come_back_and_are_counted(lab, tmp_path):
    _, facts = _run(_study(lab, tmp_path, train=SHORT, rounds=2, replay_fraction=0.5, bootstrap_fraction=0.0))
    back = round(0.5 * (PAIRS - KEPT))
    assert (facts[1]["kept"], facts[1]["replayed"]) == (KEPT + back, back)
    assert facts[1]["select/kept_fraction"] == KEPT / PAIRS
    rows = _jsonl(tmp_path / "phases" / "sera" / "pairs2" / "offline.jsonl")
    largest = np.argsort([-row["margin"] for row in rows], kind="stable")[:KEPT]
    kept = {i for i, row in enumerate(rows) if row["kept"]}
    assert len(kept) == KEPT + back and set(largest.tolist()) < kept


@pytest.mark.parametrize(("agreement", "round_"), [("rewards", 2), ("rewards", 3), ("policies", 3)])
def test_a_pair_is_refused_where_one_of_two_judges_would_turn_it_round(lab, agreement, round_):
    """On the candidates that the lab's arm has, by judges that are recomputed from the policies on disk."""
    names = ["sft", "round1", "sera/round2"][:round_]
    done = lab.study.run.workdir.done
    policies = [Policy(name, done[name].path, done[name].digest) for name in names]

    def pairs(agreement):
        settings = dataclasses.replace(lab.study.settings, agreement=agreement, pairing="all")
        made = review.sampled(lab.study, settings, policies, round_)
        pairings = review.guarded(lab.study, settings, made, review.judged(lab.study, settings, made, round_))
        refused = sum(pairing.refused["disagreement"] for pairing in pairings)
        return {(i, p.chosen, p.rejected) for i, pairing in enumerate(pairings) for p in pairing.pairs}, refused

    items = _candidates(lab, lab.root, f"{names[-1]}/candidates")
    reference, before, now = (_alone(lab, lab.policy(name), items) for name in ("sft", names[-2], names[-1]))
    gamma = lab.config.sera.ensemble_gamma
    both, lengths = (1 - gamma) * now + gamma * before, np.array([[len(r) for r in i.responses] for i in items])
    judges = {"rewards": (both - reference, both / lengths), "policies": (now - reference, before - reference)}[
        agreement
    ]
    (every, none), (kept, refused) = pairs("none"), pairs(agreement)
    assert none == 0 < refused == len(every) - len(kept) and kept < every
    slack = 4 * TOLERANCES["packing"]["atol"]
    for i, chosen, rejected in every:
        ahead = min(judge[i, chosen] - judge[i, rejected] for judge in judges)
        assert abs(ahead) < slack or ((i, chosen, rejected) in kept) == (ahead > 0)


def test_every_arm_makes_as_many_updates_in_every_round(lab, tmp_path):
    study = _study(lab, tmp_path, train={"max_steps": 1}, rounds=2)
    with jax.set_mesh(study.run.mesh), study.run.writer:
        facts = {}
        for arm in SERA_ARMS:
            settings = dataclasses.replace(study.settings, **SERA_ARMS[arm].how)
            _, facts[arm] = sera(dataclasses.replace(study, ranking=ranking_of(study.loss, settings)), arm, settings)
    assert {arm: [f["updates"] for f in found] for arm, found in facts.items()} == {arm: [1, 1] for arm in SERA_ARMS}
    lines = [
        (r["arm"], r["round"], r["step"]) for r in read_records(tmp_path / "metrics.jsonl")[0] if r["phase"] == "train"
    ]
    assert sorted(lines) == sorted([("", 1, 1), *((arm, 2, 1) for arm in SERA_ARMS)])


BRAKES = {
    "stop_margin_std": ("irm/std", "the margins' standard deviation is {:.2f} nats"),
    "stop_chosen_logratio": ("irm/chosen_logratio", "the chosen answers' mean log-ratio is {:.2f} nats"),
    "stop_kl": ("bootstrap/kl_to_sft", "the candidates' KL to the SFT model is {:.2f} nats"),
    "stop_unsupported": ("bootstrap/unsupported_fraction", "the share of candidates below support is {:.3f}"),
}


@pytest.mark.parametrize("field", BRAKES)
def test_each_brake_reads_its_own_fact_and_stops_only_beyond_its_limit(lab, tmp_path, field, capsys):
    (fact, words), settings = BRAKES[field], lab.study.settings
    sign = -1 if field == "stop_chosen_logratio" else 1
    done = [{"arm": "sera", "round": 1}]
    study = _study(lab, tmp_path)
    for value, stops in ((0.2, False), (0.21, True)):
        found = {name: 0.0 for name, _ in BRAKES.values()} | {fact: sign * value}
        got = brake(study, dataclasses.replace(settings, **{field: 0.2}), [study.sft, "one"], done, found)
        assert (got == "one") == stops and ("kept_as_result" in done[0]) == stops
    assert (
        f"sera: no round 2: {words.format(sign * 0.21)} (config.sera.{field}=0.2); round 1" in capsys.readouterr().err
    )
    others = dict.fromkeys(set(BRAKES) - {field}, 1e9)
    assert brake(study, dataclasses.replace(settings, **others), [study.sft, "one"], done, found) is None
    assert brake(study, dataclasses.replace(settings, **{field: 0.2}), [study.sft, "one"], done, {}) is None


def test_how_far_a_policy_has_moved_is_known_before_a_round_trains(lab, tmp_path, capsys):
    """From the policies on disk; and a limit on it ends the arm once the candidates are drawn."""
    found = lab.rounds("sera")[3]
    items = [pair.item for pair in lab.study.pool]
    ratios = _alone(lab, lab.policy("sera/round2"), items) - _alone(lab, lab.study.sft, items)
    chosen = [row[pair.pairs[0][0]] for row, pair in zip(ratios, lab.study.pool)]
    atol = TOLERANCES["packing"]["atol"]
    assert found["irm/chosen_logratio"] == pytest.approx(np.mean(chosen), abs=atol)
    items = _candidates(lab, lab.root, "sera/round2/candidates")
    ratios = _alone(lab, lab.policy("sera/round2"), items) - _alone(lab, lab.study.sft, items)
    kl = found["bootstrap/kl_to_sft"]
    assert kl == pytest.approx(ratios.mean(), abs=atol) and kl > lab.rounds("sera")[2]["bootstrap/kl_to_sft"] > 0
    policy, facts = _run(_study(lab, tmp_path, rounds=2, train=SHORT, stop_kl=1e-9))
    assert (policy.name, len(facts), facts[0]["kept_as_result"]) == ("round1", 1, True)
    assert "the candidates' KL to the SFT model is" in capsys.readouterr().err
    assert (tmp_path / "phases" / "round1" / "candidates").exists()
    assert not (tmp_path / "phases" / "sera" / "pairs2").exists()
    (line,) = [r for r in read_records(tmp_path / "metrics.jsonl")[0] if r["phase"] == "review"]
    assert line["bootstrap/kl_to_sft"] > 1e-9 and "irm/std" in line


@pytest.mark.parametrize(("accuracy", "result"), [({1: 0.6, 2: 0.7}, 2), ({1: 0.8, 2: 0.7}, 1), ({}, 2)])
def test_rounds_that_run_away_are_ended_and_the_best_so_far_is_the_result(lab, tmp_path, capsys, accuracy, result):
    spread = lab.rounds("sera")[3]["irm/std"]
    assert spread > lab.rounds("sera")[2]["irm/std"]
    study = _study(lab, tmp_path, stop_margin_std=0.999 * spread)
    look = lambda policy, round_: {"heldout_accuracy": accuracy[round_]} if accuracy else {}  # noqa: E731
    policy, facts = _run(dataclasses.replace(study, evaluate=look))
    assert policy.name == ("round1", "sera/round2")[result - 1]
    assert [f["round"] for f in facts if "kept_as_result" in f] == [result] and len(facts) == 2
    assert f"sera: no round 3: the margins' standard deviation is {spread:.2f}" in capsys.readouterr().err
    (line,) = [r for r in read_records(tmp_path / "metrics.jsonl")[0] if r["phase"] == "review"]
    assert (line["arm"], line["round"], line["irm/std"]) == ("sera", 3, pytest.approx(spread))
    _, facts = _run(_study(lab, tmp_path / "not", rounds=2, train=SHORT, stop_margin_std=100.0))
    assert len(facts) == 2 and not any("kept_as_result" in f for f in facts)


def test_what_a_round_refuses_for_its_margins_is_counted(lab, tmp_path):
    how = {"min_margin": 0.01, "bootstrap_band": (0.0, 0.9), "bootstrap_fraction": 1.0}
    _, facts = _run(_study(lab, tmp_path, train=SHORT, rounds=2, **how))
    found = facts[1]
    refused = found.get("bootstrap/refused_below_min_margin", 0) + found["bootstrap/refused_outside_band"]
    assert found["bootstrap/pairs"] == found["added"] + refused
    assert found["bootstrap/refused_outside_band"] == found["bootstrap/pairs"] - round(0.9 * found["bootstrap/pairs"])


def test_a_round_warns_without_a_gold_reward(lab):
    found = lab.rounds("sera")[2]
    items = _candidates(lab, lab.root, "round1/candidates")
    reference, now = (_alone(lab, lab.policy(name), items) for name in ("sft", "round1"))
    lengths = np.array([[len(r) for r in item.responses] for item in items])
    reward = now - reference  # equation 7 scales it, since the SFT model's own is 0
    within = lambda a: (a - a.mean(axis=1, keepdims=True)).ravel()  # noqa: E731
    for name, other in (("bootstrap/reward_ref_corr", reference), ("bootstrap/reward_length_corr", lengths)):
        assert found[name] == pytest.approx(np.corrcoef(within(reward), within(other))[0, 1], abs=1e-2)
    assert 0 <= found["bootstrap/repeated_ngrams"] < 1
    assert found["bootstrap/margin_std"] > 0
    (line,) = [r for r in lab.lines if (r["phase"], r["arm"], r["round"]) == ("round", "sera", 2)]
    assert line["bootstrap/reward_ref_corr"] == found["bootstrap/reward_ref_corr"]


def test_plain_daa_is_sera_without_selection_and_bootstrapping(lab, tmp_path):
    policy, facts = _run(_study(lab, tmp_path, selection="none", bootstrap_fraction=0.0))
    assert _checksums(policy) == _checksums(lab.policy("daa/round3"))
    assert [f["kept"] for f in facts] == [PAIRS] * 3
    assert not (tmp_path / "phases" / "round1" / "pool").exists(), "scores that nothing reads"


def test_an_arm_whose_loss_is_its_own_has_its_own_first_round(lab, tmp_path):
    own = dataclasses.replace(_study(lab, tmp_path / "own", train=SHORT, rounds=2), own_loss=True)
    policy, facts = _run(own, "robust_dpo")
    alone, _ = _run(_study(lab, tmp_path / "alone", train=SHORT, rounds=2), "daa")
    assert (policy.name, _checksums(policy)) == ("robust_dpo/round2", _checksums(alone))
    assert [f["updates"] for f in facts] == [2, 2]
    lines = [r for r in read_records(tmp_path / "own" / "metrics.jsonl")[0] if r["phase"] == "train"]
    assert [(r["arm"], r["round"], r["step"]) for r in lines] == [("robust_dpo", n, s) for n in (1, 2) for s in (1, 2)]
    assert not (tmp_path / "own" / "phases" / "round1").exists()


def test_a_round_that_computes_mostly_filling_says_so_once_and_why(lab, tmp_path, capsys):
    _run(_study(lab, tmp_path, train={**SHORT, "gradient_accumulation_steps": 16}, rounds=1), "daa")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "filling" in line]
    assert line.startswith("round1: ")
    assert "multiples of 16 (config.data.row_multiple=1, 1 of the devices, 16 of gradient_accumulation_steps)" in line


def test_the_random_control_keeps_as_many_as_a_threshold_would(lab, tmp_path):
    settings = {"selection": "threshold", "threshold": 0.0, "rounds": 2, "bootstrap_fraction": 0.0}
    kept = {arm: _run(_study(lab, tmp_path / arm, **settings), arm)[1][1]["kept"] for arm in ("sera", "random")}
    rows = _jsonl(tmp_path / "sera" / "phases" / "sera" / "pairs2" / "offline.jsonl")
    assert 0 < kept["sera"] < PAIRS
    assert kept["sera"] == kept["random"] == sum(row["margin"] >= 0 for row in rows)


SHORT = {"max_steps": 2}


@pytest.mark.parametrize(
    "settings, kept",
    [
        ({"selection": "bottom"}, KEPT),
        ({"selection": "middle"}, KEPT),
        ({"selection": "middle", "band": (0.25, 0.75)}, PAIRS // 2),
        ({"selection": "random"}, KEPT),
        ({"selection": "none"}, PAIRS),
        ({"selection": "top", "keep_fraction": 0.0}, 0),
        ({"reference": "previous"}, KEPT),
        ({"curriculum": "easy_to_hard"}, KEPT),
        ({"reset_optimizer": True}, KEPT),
        ({"bootstrap_prompts": 10}, KEPT),
        ({"length_alpha": 0.1}, KEPT),
        ({"pairing": "all"}, KEPT),
        ({"agreement": "rewards"}, KEPT),
        ({"agreement": "policies", "bootstrap_band": (0.0, 0.8)}, KEPT),
    ],
    ids=str,
)
def test_every_option_runs_a_second_round(lab, tmp_path, settings, kept):
    study = _study(lab, tmp_path, train=SHORT, rounds=2, **settings)
    policy, facts = _run(study)
    assert facts[1]["kept"] == kept
    assert 0 < facts[1]["added"] <= ADDED
    assert facts[1]["updates"] == 2
    assert _checksums(policy) != _checksums(Policy("", tmp_path / "phases" / "round1", ""))
    lines = [r for r in read_records(tmp_path / "metrics.jsonl")[0] if r["phase"] == "train" and r["round"] == 2]
    assert [r["step"] for r in lines] == [1, 2]
    at_reference = abs(lines[0]["rewards/margins"]) < TOLERANCES["packing"]["atol"]
    assert at_reference == (settings.get("reference") == "previous")
    first_rate = lines[0]["learning_rate"]
    rates = lab.config.train.learning_rate
    assert (first_rate == pytest.approx(rates)) == bool(settings.get("reset_optimizer"))


@pytest.mark.parametrize("name", ["ipo", "simpo", "slic_hf"])
def test_other_losses_run_two_rounds_with_their_own_reward(lab, tmp_path, name):
    _, facts = _run(_study(lab, tmp_path, loss=resolve(name), train=SHORT, rounds=2, support_quantile=0.1))
    assert abs(facts[1]["bootstrap/reward_ref_corr"]) <= 1, "also of a loss without a reference, where it was scored"
    assert (facts[1]["kept"], 0 < facts[1]["added"] <= ADDED) == (KEPT, True)
    line = read_records(tmp_path / "metrics.jsonl")[0][0]
    if name == "ipo":  # at its reference the margin is 0, so the loss is (1 / (2 tau))^2
        assert line["loss"] == pytest.approx(25, rel=1e-3)
    else:  # without a reference the reward of an untrained policy is not 0
        assert abs(line["rewards/chosen"]) > 0.1


def test_a_margin_filter_may_refuse_everything(lab, tmp_path):
    _, facts = _run(_study(lab, tmp_path, train=SHORT, rounds=2, min_margin=1e6))
    assert (facts[1]["kept"], facts[1]["added"]) == (KEPT, 0)
    assert "agreement" not in facts[1]


def test_a_round_without_pairs_is_an_error_with_the_way_out(lab, tmp_path):
    study = _study(lab, tmp_path, train=SHORT, rounds=2, selection="threshold", threshold=1e6, min_margin=1e6)
    with pytest.raises(ValueError, match=r"sera, round 2: no pair is left.*threshold=1000000\.0.*keep more"):
        _run(study)


def test_finished_rounds_are_found_without_planning_them(lab, tmp_path, monkeypatch):
    policy, facts = _run(_study(lab, tmp_path, train=SHORT, rounds=2))
    left = json.loads((tmp_path / "phases" / "round1" / "shapes.json").read_text())
    assert left["sizes"] and left["spec"]["row_tokens"] == lab.config.data.row_tokens
    monkeypatch.setattr(batches, "StepPlanner", lambda *args, **how: pytest.fail("planned"))
    again, found = _run(_study(lab, tmp_path, train=SHORT, rounds=2))
    assert (again.digest, found) == (policy.digest, facts)


def test_margins_of_stored_pairs_are_those_of_each(lab):
    study = lab.study
    logps = np.random.default_rng(0).normal(-20, 5, (2, len(study.pool), 2)).astype(np.float32)
    pool = with_reference(study.pool, logps[0])
    margins = study_module.pool_margins(study.loss, pool, logps[1])
    np.testing.assert_array_equal(margins, study_module.pool_margins(study.loss, list(pool), logps[1]))
    assert margins.dtype == np.float32 and any(pair.flipped for pair in pool)


@pytest.fixture
def loaders(monkeypatch):
    """Of each training in turn: the loader, the ids of its pairs as they stand, and what it makes of that order."""
    loaders = []

    class Spy(PairLoader):
        def __init__(self, pairs, layout, **options):
            super().__init__(pairs, layout, **options)
            loaders.append((self, [pair.item.id for pair in pairs], options["order"]))

    monkeypatch.setattr(study_module, "PairLoader", Spy)
    return loaders


@pytest.mark.parametrize("curriculum, first", [("easy_to_hard", True), ("hard_to_easy", False)])
def test_a_curriculum_orders_what_was_reviewed_and_only_that(lab, tmp_path, loaders, curriculum, first):
    _run(_study(lab, tmp_path, train=SHORT, rounds=2, curriculum=curriculum, bootstrap_fraction=0.0))
    (_, _, order_1), (loader, ids, order_2) = loaders
    assert (order_1, order_2) == ("shuffle", "given")
    margin = {row["id"]: row["margin"] for row in _jsonl(tmp_path / "phases" / "sera" / "pairs2" / "offline.jsonl")}
    assert [margin[name] for name in ids] == sorted((margin[name] for name in ids), reverse=first)
    assert set(loader.batch(0).ids) == set(ids[:BATCH])


@pytest.mark.parametrize("curriculum, sign", [("easy_to_hard", 1), ("hard_to_easy", -1)])
def test_a_curriculum_spreads_self_made_pairs_in_their_order_over_the_others(lab, tmp_path, loaders, curriculum, sign):
    _run(_study(lab, tmp_path, train=SHORT, rounds=2, curriculum=curriculum))
    _, (_, ids, order) = loaders
    fresh = [i for i, name in enumerate(ids) if name.endswith("#round2")]
    assert order == "given" and len(ids) == KEPT + len(fresh)
    np.testing.assert_allclose(fresh, (np.arange(len(fresh)) + 0.5) * len(ids) / len(fresh), atol=1.5)
    sampled = {row["id"]: row for row in _jsonl(tmp_path / "phases/sera/pairs2/sampled.jsonl")}
    pairs = [sampled[ids[i]] for i in fresh]
    said = [[np.array(pair[part], np.int32) for part in ("prompt", "chosen", "rejected")] for pair in pairs]
    items = [Item("", prompt, (chosen, rejected)) for prompt, chosen, rejected in said]
    reward = _alone(lab, Policy("", tmp_path / "phases/round1", "r"), items) - _alone(lab, lab.study.sft, items)
    margins = sign * (reward[:, 0] - reward[:, 1])
    assert np.all(np.diff(margins) <= 4 * TOLERANCES["packing"]["atol"]) and margins[0] > margins[-1] + 0.01


def test_candidates_that_overflow_a_row_together_are_scored_and_trained_apart(lab, tmp_path):
    study = _study(lab, tmp_path, train=SHORT, rounds=2, pairing="all", num_samples=6)
    study.run.layout = dataclasses.replace(
        study.run.layout, share_prompt=False
    )  # six candidates, each with a prompt of its own
    _, facts = _run(study)
    assert 0 < facts[1]["added"] <= ADDED
    samples = _jsonl(tmp_path / "phases" / "round1" / "candidates" / "samples.jsonl")
    assert max(sum(len(s["tokens"]) for s in samples if s["prompt"] == i) for i in range(8)) > 0.6 * 128


def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_state_saved(lab, tmp_path):
    study = _study(lab, tmp_path, train={"learning_rate": 1e30, "warmup_ratio": 0.0, "save_steps": 0}, rounds=2)
    with pytest.raises(NonFinite, match=r"round1: the loss or gradient of update (\d+) is not finite") as stopped:
        _run(study)
    message = str(stopped.value)
    good = int(message.split("(update ")[1].split(")")[0])
    assert 0 < good < UPDATES and f"of update {good + 1} " in message
    ids = message.split("Records of its batch: ")[1].split(". The last")[0].replace(" ...", "").split(", ")
    assert set(ids) <= {pair.item.id for pair in study.pool} and len(ids) == BATCH
    folder = tmp_path / "checkpoints" / "round1"
    assert [p.name for p in folder.iterdir() if p.name.isdigit()] == [str(good)]
    assert not (tmp_path / "phases" / "round1").exists()
    with pytest.raises(NonFinite) as again:  # the same command again says the same
        _run(_study(lab, tmp_path, train={"learning_rate": 1e30, "warmup_ratio": 0.0, "save_steps": 0}, rounds=2))
    assert str(again.value) == message
    state = _good_state(study, folder)
    assert bool(state.ok) and int(state.step) == good
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def _good_state(study, folder):
    checkpoints = Checkpoints(folder, 1)
    optimizer = make_optimizer(study.train, UPDATES * study.settings.rounds)
    state = checkpoints.restore(abstract_state(study.run.cfg, optimizer, study.run.mesh))
    checkpoints.close()
    return state


def test_a_poisoned_reference_is_named_before_any_update(lab, tmp_path):
    run = lab.study.run
    params = run.load(lab.study.sft)
    save_tree(tmp_path / "bad" / "params", jax.tree.map(lambda x: x * np.nan, params))
    study = _study(lab, tmp_path / "run", sft=Policy("sft", tmp_path / "bad", "bad"))
    with pytest.raises(NonFinite, match=rf"log-prob of record '{study.pool[0].item.id}' is not finite.*bad"):
        _run(study)
    assert not (tmp_path / "run" / "phases" / "round1").exists()


def test_a_run_stopped_amid_a_round_goes_on_with_other_devices_and_ends_alike(lab, tmp_path):
    def on(fsdp, stop_after):
        """The lab's arm `sera` in a work directory of its own, as a process with so many devices would start it."""
        study = _study(lab, tmp_path, config={"mesh": {"fsdp": fsdp}})
        run = study.run
        run.mesh, run.pair_shapes = make_mesh(1, fsdp, 1, devices=jax.devices()[:fsdp]), PairShapes()
        run.layout = dataclasses.replace(run.layout, shards=fsdp)
        run._held, run._compiled = None, {}
        asked = itertools.count()
        run.stop_requested = lambda: next(asked) > stop_after
        return study

    with pytest.raises(Preempted, match="stopped in round1 after update 2"):
        _run(on(1, stop_after=1))
    study = on(2, stop_after=10**6)
    policy, facts = _run(study)
    assert study.run.workdir.notes == ["config: mesh.fsdp was 1, now 2 (no part of the run's identity)"]
    assert [(f["kept"], f["added"]) for f in facts] == [(f["kept"], f["added"]) for f in lab.rounds("sera").values()]
    tolerance = TOLERANCES["mesh"]["rtol"]
    known = {(r["phase"], r["arm"], r["round"], r["step"]): r for r in lab.lines}
    lines = read_records(tmp_path / "metrics.jsonl")[0]
    assert len([r for r in lines if r["phase"] == "train"]) == 3 * UPDATES
    for line in lines:
        same = known[line["phase"], line["arm"], line["round"], line["step"]]
        for name in {"loss", "grad_norm", "rewards/margins", "margin_mean", "bootstrap/margin_mean"} & line.keys():
            np.testing.assert_allclose(line[name], same[name], rtol=tolerance, err_msg=f"{name} of {line}")
    policies = (lab.study.sft, policy, lab.policy("sera/round3"))
    start, ours, theirs = (jax.tree.leaves(jax.device_get(study.run.load(p))) for p in policies)
    for a, b, c in zip(start, ours, theirs, strict=True):  # in norm, since Adam divides by a gradient's own size
        assert np.linalg.norm(b - c) <= tolerance * np.linalg.norm(c - a)


def test_a_whole_run_on_two_devices_and_by_another_attention_ends_alike(lab, tmp_path):
    sera_only = dataclasses.replace(lab.config.sera, arms=("sera",))
    tiles = dataclasses.replace(lab.config.model, attn_implementation="xla_tiles")
    run_on(2, dataclasses.replace(lab.config, workdir=str(tmp_path), sera=sera_only, model=tiles))
    assert_arm_alike(tmp_path, lab.root, "sera")
    assert_policies_alike(tmp_path, lab.root, ["sft", "round1", "sera/round2", "sera/round3"])


def _laid(lab, policy):
    """Tokens of a policy's candidates, each prompt once with all its answers."""
    rows = _jsonl(lab.root / "phases" / policy / "candidates" / "samples.jsonl")
    prompts = [len(lab.study.prompts[i].prompt) for i in {row["prompt"] for row in rows}]
    return sum(prompts) + sum(len(row["tokens"]) for row in rows)


def test_the_cost_of_every_arm_is_three_passes_to_train_and_one_to_sample_and_to_score(lab):
    """A round is an epoch. Round 1, which the arms share, counts in each."""
    arms, pool = lab.summary["arms"], sum(pair.item.tokens for pair in lab.study.pool)
    costs = {arm: [arms[arm][f"cost/{kind}"] for kind in ("training", "sampling", "scoring")] for arm in arms}
    for arm in arms:
        assert arms[arm]["cost/passes_tokens"] == sum(costs[arm])
    assert costs["daa"] == [3 * lab.config.sera.rounds * pool, 0, pool], "the reference's scores are the pool once"
    first, second = _laid(lab, "round1"), _laid(lab, "sera/round2")
    # reviewed by the SFT model and rounds 1 and 2; candidates are scored by the two newest policies and the SFT model
    assert costs["sera"][1:] == [first + second, 3 * pool + 2 * first + 3 * second]
    tokens = [r["num_tokens"] for r in lab.lines if r["phase"] == "train" and r["arm"] in ("", "sera")]
    assert costs["sera"][0] == 3 * sum(tokens)
    assert costs["sft"] == [3 * sum(r["num_tokens"] for r in lab.lines if r["phase"] == "sft"), 0, 0]
