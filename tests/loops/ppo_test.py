"""What the options of PPO do to an iteration, on the tiny run's models: arms of one or two iterations from its SFT."""

import json

import jax
import numpy as np
import pytest

from sera_jax.checkpoint import load_tree
from sera_jax.experiment.saved import export
from sera_jax.losses.coherent import MISSING_EOS
from sera_jax.mesh import make_mesh
from sera_jax.models.critic import HEAD
from sera_jax.models.huggingface import load_pretrained
from tests.loops.srppo_lab import (
    checksums,
    finished_of,
    first_rewards,
    log_ratios,
    ppo_lines,
    run_arm,
    study_of,
    watch,
)
from tests.loops.tiny import BATCH
from tests.tolerances import TOLERANCES

CLOSED = {name: TOLERANCES["closed_form"][name] for name in ("rtol", "atol")}
PACKING = {name: TOLERANCES["packing"][name] for name in ("rtol", "atol")}


def lines_of(folder, arm="srppo"):
    return ppo_lines(folder, arm)


def policy_metrics(line):
    return [name for name in line if name.startswith("policy/") or name in ("loss/policy_avg", "val/ratio", "loss")]


def test_several_answers_to_a_prompt_share_it(lab, tmp_path, monkeypatch):
    seen = {}
    watch(monkeypatch, seen)
    run_arm(study_of(lab, tmp_path, ppo__num_samples=2, ppo__iterations=1))
    rollouts = seen["srppo", 1].rollouts
    assert [len(item.responses) for item in rollouts.items] == [2] * (BATCH // 2)
    assert any(not np.array_equal(*item.responses) for item in rollouts.items if len(item.responses[0]) > 1)
    prompt_columns = sum(((p.rows.segment > 0) & (p.rows.branch == 0)).sum() for p in rollouts.parts)
    assert prompt_columns == sum(len(item.prompt) for item in rollouts.items)
    (line,) = lines_of(tmp_path)
    assert (line["rollout/responses"], line["episode"], line["ppo/updates"]) == (BATCH, BATCH, 2)
    assert line["objective/kl"] == 0.0


@pytest.mark.parametrize("critic", ["model", "head"])
def test_in_the_warm_up_only_the_critic_learns_and_the_policy_leaves_without_it(lab, tmp_path, critic):
    settings = {"ppo__critic": critic, "ppo__critic_warmup_iterations": 1, "ppo__iterations": 2}
    study = study_of(lab, tmp_path / "run", **settings, ppo__eval_iterations=1)
    policy = run_arm(study)
    first, second = lines_of(tmp_path / "run")
    assert policy_metrics(first) == []
    assert first["ppo/updates"] == 0 and first["loss/value_avg"] > 0 and first["critic/grad_norm"] > 0
    warmed = json.loads((tmp_path / "run/phases/srppo/iteration1/params/checksums.json").read_text())
    assert warmed == checksums(lab.study.sft)
    assert second["objective/kl"] == 0.0, "the policy of the second iteration is still the SFT model"
    assert second["ppo/updates"] == 2 and policy_metrics(second)
    assert first["critic/vf_explained_var"] == 0.0, "a new critic says 0 everywhere"
    assert second["critic/vf_explained_var"] != 0.0

    assert checksums(policy).keys() == checksums(lab.study.sft).keys(), "no value head among the policy's parameters"
    assert checksums(policy) != warmed
    held = json.loads((policy.path / "state" / "checksums.json").read_text())
    assert [leaf for leaf in held if HEAD in leaf], "training could go on with the head"
    params = load_tree(policy.path / "params", study.run.abstract_params())
    export(params, study.run.cfg, tmp_path / "hf", tokenizer_dir=lab.root / "tokenizer")
    _, read = load_pretrained(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(read))

    # the segments' border changes nothing: the head and its optimiser cross it
    whole = run_arm(study_of(lab, tmp_path / "whole", **settings, ppo__eval_iterations=0))
    assert checksums(whole) == checksums(policy)


def test_the_first_update_finds_the_policy_that_sampled(lab, tmp_path):
    run_arm(study_of(lab, tmp_path, ppo__num_mini_batches=1, ppo__iterations=1))
    (line,) = lines_of(tmp_path)
    assert line["ppo/updates"] == 1
    np.testing.assert_allclose((line["val/ratio"], line["val/ratio_var"]), (1.0, 0.0), **CLOSED)
    np.testing.assert_allclose(line["policy/approxkl_avg"], 0.0, **CLOSED)
    assert line["policy/clipfrac_avg"] == 0.0
    np.testing.assert_allclose(line["loss/policy_avg"], 0.0, **CLOSED)  # minus the mean of whitened advantages


def test_after_the_target_kl_the_policy_rests_and_the_critic_goes_on(lab, tmp_path):
    run_arm(study_of(lab, tmp_path, ppo__target_kl=1e-9, ppo__num_ppo_epochs=2, ppo__iterations=1))
    (line,) = lines_of(tmp_path)
    assert (line["ppo/early_stop"], line["ppo/updates"], line["ppo/refused_updates"]) == (1, 1, 1)
    state = tmp_path / "phases/srppo/iteration1/state"
    study = study_of(lab, tmp_path / "other")
    assert state.is_dir() and study is not None


def test_an_update_of_a_policy_that_left_its_rollouts_is_refused_and_counted(lab, tmp_path):
    fast = {"train__learning_rate": 0.1, "train__warmup_ratio": 0.0, "ppo__num_ppo_epochs": 2, "ppo__iterations": 1}
    run_arm(study_of(lab, tmp_path / "limited", **fast, ppo__ratio_limit=1.0001))
    (limited,) = lines_of(tmp_path / "limited")
    assert limited["ppo/refused_updates"] > 0 and limited["ppo/updates"] > 0
    assert limited["ppo/refused_updates"] + limited["ppo/updates"] == 4
    assert limited["val/ratio"] > 1.0001 and limited["ppo/early_stop"] == 0


def test_whitened_scores_have_no_mean_and_the_kl_coefficient_follows_the_kl(lab, tmp_path, monkeypatch):
    seen = {}
    watch(monkeypatch, seen)
    study = study_of(
        lab,
        tmp_path,
        reward__whiten=True,
        ppo__kl_controller="adaptive",
        ppo__kl_target=1e-6,
        ppo__kl_horizon=2.0 * BATCH,
        ppo__iterations=3,
        ppo__num_mini_batches=1,
    )
    run_arm(study)
    lines = lines_of(tmp_path)
    scores = []
    for i, line in enumerate(lines, 1):
        one = seen["srppo", i]
        scores.append(np.where(finished_of(one), log_ratios(one), -lab.config.reward.missing_eos_penalty))
        so_far = np.concatenate(scores)
        expected = (scores[-1].mean() - so_far.mean()) / so_far.std()
        np.testing.assert_allclose(line["objective/scores"], expected, **PACKING)
    np.testing.assert_allclose(lines[0]["objective/scores"], 0.0, **PACKING)
    # KL / target - 1, cut to a fifth: below in the first iteration, whose KL is 0, then by its sign
    coefficient = lab.config.ppo.kl_coef
    for line in lines:
        np.testing.assert_allclose(line["ppo/kl_coef"], coefficient, rtol=1e-6)
        coefficient *= 1 + (0.2 if line["objective/kl"] > 1e-6 else -0.2) / 2
    assert lines[1]["ppo/kl_coef"] < lines[0]["ppo/kl_coef"]


def test_a_kl_in_the_loss_is_not_in_the_reward(lab, tmp_path):
    options = {"ppo__kl_in": "loss", "ppo__kl_estimator": "k3", "ppo__num_mini_batches": 1, "ppo__kl_coef": 2.0}
    run_arm(study_of(lab, tmp_path, **options, ppo__iterations=2))
    first, second = lines_of(tmp_path)
    for line in (first, second):
        assert line["objective/non_score_reward"] == 0.0
        assert line["objective/rlhf_reward"] == line["objective/scores"]
    assert first["loss"] == first["loss/policy_avg"]
    # per token in the loss, per response in the log
    added = 2.0 * second["objective/kl_k3"] / second["completions/mean_length"]
    assert added > 0
    np.testing.assert_allclose(second["loss"] - second["loss/policy_avg"], added, rtol=1e-3)


@pytest.mark.parametrize("rule", MISSING_EOS)
def test_an_answer_that_was_cut_is_paid_by_the_rule_asked_for(lab, tmp_path, rule):
    metrics, _, _ = first_rewards(study_of(lab, tmp_path, reward__missing_eos=rule, reward__missing_eos_penalty=3.0))
    seen = lab.seen["srppo", 1]  # the same rollouts: no update has been made
    cut, ratios = ~finished_of(seen), log_ratios(seen)
    expected = {"penalty": np.where(cut, -3.0, ratios), "subtract": ratios - 3.0 * cut, "keep": ratios}[rule]
    np.testing.assert_allclose(metrics["objective/scores"], expected.mean(), **PACKING)
    assert metrics["ppo/missing_eos"] == cut.sum() > 0


# An update that grows evenly with the gradient, so that rounding is not blown up where the gradient is near 0.
SMOOTH = {"train__adam_epsilon": 0.1, "train__learning_rate": 0.1, "train__warmup_ratio": 0.0, "ppo__iterations": 1}


@pytest.fixture(scope="module")
def plain(lab, tmp_path_factory):
    return changed(lab, tmp_path_factory.mktemp("plain"))


def changed(lab, folder, **options):
    """The one line of metrics, and what the iteration did to the SFT model's parameters, on the host."""
    study = study_of(lab, folder, **SMOOTH, **options)
    policy = run_arm(study)
    trees = [load_tree(p.path / "params", study.run.abstract_params()) for p in (policy, study.sft)]
    now, before = (jax.device_get(tree) for tree in trees)
    (line,) = lines_of(folder)
    return line, jax.tree.map(lambda a, b: np.float64(a) - b, now, before)


@pytest.mark.parametrize("way", ["microbatches", "mesh"])
def test_an_iteration_is_the_same_in_microbatches_and_on_a_mesh(lab, plain, tmp_path, way):
    options = {"train__gradient_accumulation_steps": 2} if way == "microbatches" else {"mesh": make_mesh(2, 2, 2)}
    line, change = changed(lab, tmp_path, **options)
    one_line, one_change = plain
    differences = []
    for a, b in zip(jax.tree.leaves(change), jax.tree.leaves(one_change), strict=True):
        differences.append((np.linalg.norm(a - b) / np.linalg.norm(b)))
    print(differences)
    for name in ("coherent_reward/mean", "loss/value_avg", "policy/entropy_avg", "val/ratio", "grad_norm"):
        print(name, line[name], one_line[name])
    assert 0
