"""What the options of PPO do to an iteration, on the tiny run's models: arms of one or two iterations from its SFT."""

import dataclasses
import json
import math
import pathlib
import types
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from sera_jax.checkpoint import load_tree
from sera_jax.data.items import Item
from sera_jax.experiment.saved import export
from sera_jax.loops.ppo import Learner
from sera_jax.loops.runtime import Policy
from sera_jax.loops.srppo_study import SrppoStudy
from sera_jax.losses.coherent import MISSING_EOS
from sera_jax.mesh import make_mesh
from sera_jax.models.critic import HEAD
from sera_jax.models.huggingface import load_pretrained
from sera_jax.training.ppo_steps import PpoPrograms
from tests.loops.srppo_lab import (
    MINI_BATCHES,
    checksums,
    finished_of,
    first_rewards,
    jsonl,
    log_ratios,
    ppo_lines,
    responses_of,
    run_arm,
    study_of,
    watch,
)
from tests.loops.tiny import BATCH
from tests.tolerances import TOLERANCES

CLOSED = {name: TOLERANCES["closed_form"][name] for name in ("rtol", "atol")}
PACKING = {name: TOLERANCES["packing"][name] for name in ("rtol", "atol")}


def test_several_answers_to_a_prompt_share_it(lab, tmp_path, monkeypatch):
    seen = {}
    watch(monkeypatch, seen)
    run_arm(study_of(lab, tmp_path, ppo__num_samples=2), ends=(1,))
    rollouts = seen["srppo", 1].rollouts
    assert [len(item.responses) for item in rollouts.items] == [2] * (BATCH // 2)
    assert all(not np.array_equal(*item.responses) for item in rollouts.items if len(item.responses[0]) > 3)
    assert prompt_columns(rollouts) == sum(len(item.prompt) for item in rollouts.items)
    (line,) = ppo_lines(tmp_path, "srppo")
    assert (line["rollout/responses"], line["episode"], line["ppo/updates"]) == (BATCH, BATCH, MINI_BATCHES)
    assert line["objective/kl"] == 0.0
    texts = jsonl(tmp_path / "rollouts" / "srppo" / "000001.jsonl")
    assert [row["id"] for row in texts] == [item.id for item in rollouts.items for _ in range(2)]

    repeated, *_ = first_rewards(study_of(lab, tmp_path / "apart", layout={"share_prompt": False}, ppo__num_samples=2))
    apart = seen["srppo", 1].rollouts
    assert prompt_columns(apart) == 2 * prompt_columns(rollouts)
    assert responses_of(apart) == responses_of(rollouts)
    for name in ("coherent_reward/mean", "coherent_reward/std", "objective/entropy", "objective/scores"):
        np.testing.assert_allclose(repeated[name], line[name], **PACKING, err_msg=name)


def prompt_columns(rollouts):
    return sum(((part.rows.segment > 0) & (part.rows.branch == 0)).sum() for part in rollouts.parts)


WARM_UP = {"ppo__critic_warmup_iterations": 1}


class Warmed(NamedTuple):
    study: SrppoStudy
    policy: Policy
    root: pathlib.Path


CRITICS = pytest.mark.parametrize("warmed", ["model", "head"], indirect=True)


@pytest.fixture(scope="module")
def warmed(request, lab, tmp_path_factory):
    """An arm of two iterations, a segment each, in the first of which only the critic learns."""
    root = tmp_path_factory.mktemp("warmed")
    study = study_of(lab, root, ppo__critic=request.param, **WARM_UP)
    return Warmed(study, run_arm(study, ends=(1, 2)), root)


@CRITICS
def test_in_the_warm_up_only_the_critic_learns(lab, warmed):
    first, second = ppo_lines(warmed.root, "srppo")
    assert not [name for name in first if name.startswith(("policy/", "val/ratio", "loss/policy"))]
    assert first["ppo/updates"] == 0 and first["loss/value_avg"] > 0 and first["critic/grad_norm"] > 0
    saved = json.loads((warmed.root / "phases/srppo/iteration1/params/checksums.json").read_text())
    assert saved == checksums(lab.study.sft)
    assert second["objective/kl"] == 0.0, "the policy of the second iteration is still the SFT model"
    assert second["ppo/updates"] == MINI_BATCHES and second["policy/entropy_avg"] > 0
    assert first["critic/vf_explained_var"] == 0.0, "a new critic says 0 everywhere"
    assert second["critic/vf_explained_var"] != 0.0
    assert checksums(warmed.policy) != checksums(lab.study.sft)


@CRITICS
def test_a_policy_leaves_without_its_critic(lab, warmed, tmp_path):
    assert checksums(warmed.policy).keys() == checksums(lab.study.sft).keys(), "no value head among its parameters"
    held = json.loads((warmed.policy.path / "state" / "checksums.json").read_text())
    assert [leaf for leaf in held if HEAD in leaf], "training can go on with the head"
    params = warmed.study.run.load(warmed.policy)
    export(params, warmed.study.run.cfg, tmp_path / "hf", tokenizer_dir=lab.root / "tokenizer")
    _, read = load_pretrained(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(read))


@pytest.mark.parametrize("warmed", ["head"], indirect=True)  # a critic of its own crosses it in the lab's run
def test_a_head_on_the_policy_crosses_the_border_of_segments(lab, warmed, tmp_path):
    whole = run_arm(study_of(lab, tmp_path, ppo__critic="head", **WARM_UP), ends=(2,))
    assert checksums(whole) == checksums(warmed.policy)


def test_an_arm_without_a_critic_rests_while_that_of_the_others_warms_up(lab, tmp_path):
    policy = run_arm(study_of(lab, tmp_path, **WARM_UP), "reinforce", ends=(1,))
    (line,) = ppo_lines(tmp_path, "reinforce")
    assert line["ppo/updates"] == 0 and "loss/policy_avg" not in line
    assert checksums(policy) == checksums(lab.study.sft)


def test_the_first_update_finds_the_policy_that_sampled(lab, tmp_path):
    _, (batch, *_), state, programs = first_rewards(study_of(lab, tmp_path))
    _, metrics = programs.policy_step(state.policy, batch)
    np.testing.assert_allclose(metrics["val/ratio"].value(), 1.0, **CLOSED)
    np.testing.assert_allclose(metrics["val/ratio_squared"].value(), 1.0, **CLOSED)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"].value(), 0.0, **CLOSED)
    assert metrics["policy/clipfrac_avg"].value() == 0.0
    used = np.asarray(batch.rows.slot) < batch.rows.num_slots
    mean_advantage = np.float64(batch.advantage)[used].mean()
    np.testing.assert_allclose(metrics["loss/policy_avg"].value(), -mean_advantage, **CLOSED)


def test_after_the_target_kl_the_policy_rests_and_the_critic_goes_on(lab, tmp_path):
    study = study_of(lab, tmp_path, ppo__target_kl=1e-9, ppo__num_ppo_epochs=2)
    policy = run_arm(study, ends=(1,))
    (line,) = ppo_lines(tmp_path, "srppo")
    # the first update starts at the rollouts' own policy, the second finds it moved: neither it nor a later one is made
    assert (line["ppo/updates"], line["ppo/refused_updates"], line["ppo/early_stop"]) == (1, 1, 1)
    (programs,) = study.run.made(PpoPrograms)
    whole = programs.abstract
    rest = dataclasses.replace(whole, policy=dataclasses.replace(whole.policy, params={}))
    state = load_tree(policy.path / "state", rest)
    assert (int(state.policy.step), int(state.critic.step)) == (1, 2 * MINI_BATCHES)


def test_an_update_of_a_policy_that_left_its_rollouts_is_refused_and_counted(lab, tmp_path):
    limit = 1.0001
    run_arm(study_of(lab, tmp_path, ppo__ratio_limit=limit), ends=(1,))
    (line,) = ppo_lines(tmp_path, "srppo")
    assert lab.lines("srppo")[0]["val/ratio"] > limit, "without the limit the policy goes on from there"
    assert (line["ppo/updates"], line["ppo/refused_updates"], line["ppo/early_stop"]) == (1, 1, 0)


def test_whitened_scores_have_no_mean_and_the_kl_coefficient_follows_the_kl(lab, tmp_path, monkeypatch):
    seen = {}
    watch(monkeypatch, seen)
    adaptive = {"ppo__kl_controller": "adaptive", "ppo__kl_target": 1e-6, "ppo__kl_horizon": 2.0 * BATCH}
    run_arm(study_of(lab, tmp_path, reward__whiten=True, **adaptive), ends=(3,))
    lines, scores = ppo_lines(tmp_path, "srppo"), []
    for i, line in enumerate(lines, 1):
        one = seen["srppo", i]
        scores.append(np.where(finished_of(one), log_ratios(one), -lab.config.reward.missing_eos_penalty))
        so_far = np.concatenate(scores)
        expected = (scores[-1].mean() - so_far.mean()) / so_far.std()
        np.testing.assert_allclose(line["objective/scores"], expected, **PACKING)
    np.testing.assert_allclose(lines[0]["objective/scores"], 0.0, **PACKING)
    coefficient = lab.config.ppo.kl_coef
    for line in lines:  # KL / target - 1, cut to a fifth; half the horizon is one iteration's responses
        np.testing.assert_allclose(line["ppo/kl_coef"], coefficient, rtol=1e-6)
        coefficient *= 1 + (0.2 if line["objective/kl"] > 1e-6 else -0.2) / 2
    assert lines[1]["ppo/kl_coef"] < lines[0]["ppo/kl_coef"], "the first KL is 0"


def test_a_kl_in_the_loss_is_not_in_the_reward(lab, tmp_path):
    weight = 2.0
    options = {"ppo__kl_in": "loss", "ppo__kl_estimator": "k3", "ppo__kl_coef": weight}
    metrics, (batch, *_), state, programs = first_rewards(study_of(lab, tmp_path, **options))
    assert metrics["objective/non_score_reward"] == 0.0
    assert metrics["objective/rlhf_reward"] == metrics["objective/scores"]
    policy, found = programs.policy_step(state.policy, batch)
    assert found["loss"].value() == found["loss/policy_avg"].value(), "at the SFT model the KL is 0"
    rows = jax.tree.map(lambda x: x[0], batch.rows)
    now = np.float64(programs.score(policy.params, rows))
    _, found = programs.policy_step(policy, batch)
    away = (now - np.float64(batch.sft_logp[0]))[np.asarray(rows.slot) < rows.num_slots]
    added = weight * np.mean(np.exp(-away) - 1 + away)
    assert added > 1e-3
    np.testing.assert_allclose(found["loss"].value() - found["loss/policy_avg"].value(), added, rtol=1e-3)


@pytest.mark.parametrize("rule", MISSING_EOS)
def test_an_answer_that_was_cut_is_paid_by_the_rule_asked_for(lab, tmp_path, rule):
    metrics, *_ = first_rewards(study_of(lab, tmp_path, reward__missing_eos=rule, reward__missing_eos_penalty=3.0))
    seen = lab.seen["srppo", 1]  # the same rollouts: no update has been made
    cut, ratios = ~finished_of(seen), log_ratios(seen)
    expected = {"penalty": np.where(cut, -3.0, ratios), "subtract": ratios - 3.0 * cut, "keep": ratios}[rule]
    np.testing.assert_allclose(metrics["objective/scores"], expected.mean(), **PACKING)
    assert metrics["ppo/missing_eos"] == cut.sum() > 0


@pytest.fixture(scope="module")
def plain(lab, tmp_path_factory):
    return first_change(lab, tmp_path_factory.mktemp("plain"))


def first_change(lab, folder, **options):
    """Metrics of the first iteration, and what it did to the SFT model's parameters."""
    study = study_of(lab, folder, **options)
    policy = run_arm(study, ends=(1,))
    now, before = (study.run.load(p) for p in (policy, study.sft))
    (line,) = ppo_lines(folder, "srppo")
    return line, jax.tree.map(lambda a, b: np.float64(a) - b, *jax.device_get((now, before)))


@pytest.mark.parametrize("way", ["microbatch", "mesh"])
def test_an_iteration_is_the_same_in_microbatches_and_on_a_mesh(lab, plain, tmp_path, way):
    # two devices: simulated ones share a few threads, which programs that are dispatched together can block for good
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    options = {"train__gradient_accumulation_steps": 2} if way == "microbatch" else {"mesh": mesh}
    (one_line, one_change), (line, change) = plain, first_change(lab, tmp_path, **options)
    tolerance = TOLERANCES[way]["rtol"]
    assert one_line["objective/kl"] == line["objective/kl"] == 0.0
    for name in ("coherent_reward/mean", "loss/value_avg", "policy/entropy_avg", "val/ratio", "grad_norm"):
        np.testing.assert_allclose(line[name], one_line[name], rtol=tolerance, err_msg=name)
    moved = 0
    for (path, a), b in zip(jax.tree.leaves_with_path(one_change), jax.tree.leaves(change), strict=True):
        # in norm: Adam divides by the gradient's own size, so that rounding decides where a gradient is near 0
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a), jax.tree_util.keystr(path)
        moved += np.linalg.norm(a) > 0
    assert moved > len(jax.tree.leaves(change)) / 2


@pytest.mark.parametrize("golds", [[0.2, 0.6], [0.2, math.nan, 0.6], [math.nan], []])
def test_rollouts_of_prompts_without_a_gold_reward_do_not_count_in_its_mean(golds):
    items = [Item(str(gold), np.arange(2), (np.arange(3),)) for gold in golds]
    schedule = types.SimpleNamespace(sft_per_iteration=1, per_iteration=2)
    study = types.SimpleNamespace(gold=lambda item, tokens: float(item.id))
    learner: Any = types.SimpleNamespace(study=study, schedule=schedule)
    rollouts: Any = types.SimpleNamespace(items=items)
    found = Learner._prompt_metrics(learner, rollouts)
    known = [gold for gold in golds if not math.isnan(gold)]
    assert found == {"rollout/sft_prompt_fraction": 0.5, **({"rollout/gold_mean": 0.4} if known else {})}
