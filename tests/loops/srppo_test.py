"""Self-Rewarding PPO on a tiny embedded world: what is rolled out, scored, paid, learnt, and what is logged of it."""

import dataclasses
import json

import numpy as np
import pytest

from sera_jax.core import Stream, rng_for
from sera_jax.evaluation.report import check_summary
from sera_jax.experiment.methods.srppo import SRPPO
from sera_jax.loops.ppo import Learner
from sera_jax.loops.runtime import Preempted
from sera_jax.losses.advantages import follows
from sera_jax.models.critic import HEAD
from sera_jax.training.optimizer import schedule
from sera_jax.writer import RESERVED
from tests.loops.alike import assert_arm_alike, assert_policies_alike, run_on
from tests.loops.srppo_lab import (
    ARMS,
    EVERY,
    ITERATIONS,
    MINI_BATCHES,
    PPO_ARMS,
    by_response,
    checksums,
    finished_of,
    jsonl,
    lengths_of,
    log_ratios,
    ppo_lines,
    responses_of,
    run_arm,
    study_of,
)
from tests.loops.tiny import BATCH
from tests.tolerances import TOLERANCES

CRITIC = {"loss/value_avg", "val/clipfrac_avg"} | {
    f"critic/{name}" for name in ("vf_explained_var", "value_scale", "grad_norm")
}
# The spelling of TRL's PPO and GRPO trainers, which users' dashboards are made for, and what no other tool has.
METRICS = CRITIC | {
    *(f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")),
    *(f"policy/{name}" for name in ("approxkl_avg", "clipfrac_avg", "entropy_avg")),
    *(f"val/{name}" for name in ("ratio", "ratio_var", "num_eos_tokens", "contain_eos_token")),
    *(f"completions/{name}_length" for name in ("mean", "min", "max", "mean_terminated")),
    *(f"coherent_reward/{name}" for name in ("mean", "std", "per_token", "length_corr")),
    *(f"cost/{name}" for name in ("training", "sampling", "scoring")),
    *(f"timing_s/{name}" for name in ("rollout", "score", "update")),
    *("loss/policy_avg", "lr", "episode", "grad_norm", "completions/clipped_ratio"),
    *("rollout/decode_score_gap", "rollout/sft_prompt_fraction", "rollout/gold_mean", "rollout/padding_fraction"),
    *("ppo/missing_eos", "ppo/kl_coef", "ppo/updates", "ppo/refused_updates", "ppo/early_stop"),
}
CLOSED = {name: TOLERANCES["closed_form"][name] for name in ("rtol", "atol")}
PACKING = {name: TOLERANCES["packing"][name] for name in ("rtol", "atol")}


def untimed(lines):
    return [{k: v for k, v in line.items() if k != "time" and not k.startswith("timing_s/")} for line in lines]


def scored_apart(lab, tmp_path, seen):
    """log pi_sft - log pi_base of every response of an iteration, nats, by the scorer of evaluation."""
    items, run = seen.rollouts.items, study_of(lab, tmp_path).run
    with run.writer:
        by_sft, by_base = (np.concatenate(run.score(p.name, p, items)) for p in (lab.study.sft, lab.study.base))
    return np.float64(by_sft) - np.float64(by_base)


# ---- the run


def test_the_summary_has_what_readers_rely_on(lab):
    saved = json.loads((lab.root / "summary.json").read_text())
    check_summary(saved, SRPPO.report)
    assert set(saved["arms"]) == {"sft", *ARMS}
    assert [(f["arm"], f["round"], f["iteration"]) for f in saved["rounds"]] == [
        (arm, last // EVERY, last) for arm in PPO_ARMS for last in range(EVERY, ITERATIONS + 1, EVERY)
    ]
    assert set(saved["params_sha256"]) == {"sft", *ARMS} - {"best_of_n"}


def test_every_iteration_of_every_arm_is_in_log_and_summary_once(lab):
    expected = [(arm, i) for arm in PPO_ARMS for i in range(1, ITERATIONS + 1)]
    assert [(line["arm"], line["iteration"]) for line in lab.summary["iterations"]] == expected
    written = [(arm, line["step"]) for arm in PPO_ARMS for line in lab.lines(arm)]
    assert written == expected
    assert [line["round"] for line in lab.lines("srppo")] == [1, 1, 2, 2]


@pytest.mark.parametrize("arm", PPO_ARMS)
def test_every_iteration_logs_the_names_that_users_know(lab, arm):
    wanted = METRICS - CRITIC if arm == "reinforce" else METRICS
    for line in lab.lines(arm):
        assert wanted <= set(line)
        assert [name for name, value in line.items() if name not in RESERVED and not np.isfinite(value)] == []
        assert line["episode"] == line["step"] * BATCH
        assert line["ppo/updates"] == MINI_BATCHES


def test_reinforce_has_no_critic_in_log_or_state(lab):
    assert not [name for line in lab.lines("reinforce") for name in line if name in CRITIC]
    for arm, has_critic in (("srppo", True), ("reinforce", False)):
        state = json.loads((lab.policy(f"{arm}/iteration4").path / "state" / "checksums.json").read_text())
        assert any(HEAD in leaf for leaf in state) == has_critic


def test_the_policy_starts_at_the_sft_model_and_then_leaves_it(lab):
    for arm in PPO_ARMS:
        first, *later = lab.lines(arm)
        assert first["objective/kl"] == first["objective/kl_k3"] == first["objective/non_score_reward"] == 0.0
        assert all(line["objective/kl"] != 0.0 for line in later)
        for part in lab.seen[arm, 1].scored:
            np.testing.assert_array_equal(part["logp"], part["sft_logp"])
        assert checksums(lab.policy(f"{arm}/iteration4")) != checksums(lab.study.sft)


def test_what_is_optimised_is_the_reward_less_the_kl_at_its_coefficient(lab):
    for line in lab.lines("srppo"):
        penalty = lab.config.ppo.kl_coef * line["objective/kl"]
        np.testing.assert_allclose(line["objective/non_score_reward"], -penalty, **CLOSED)
        np.testing.assert_allclose(line["objective/rlhf_reward"], line["objective/scores"] - penalty, **PACKING)


@pytest.mark.parametrize("iteration", [1, ITERATIONS])
def test_the_logged_coherent_reward_is_that_of_the_rollouts_under_the_two_models(lab, tmp_path, iteration):
    seen = lab.seen["srppo", iteration]
    ratios, lengths = scored_apart(lab, tmp_path, seen), lengths_of(seen)
    line = lab.lines("srppo")[iteration - 1]
    np.testing.assert_allclose(line["coherent_reward/mean"], ratios.mean(), **PACKING)
    np.testing.assert_allclose(line["coherent_reward/std"], ratios.std(), **PACKING)
    np.testing.assert_allclose(line["coherent_reward/per_token"], ratios.sum() / lengths.sum(), **PACKING)
    np.testing.assert_allclose(line["coherent_reward/length_corr"], np.corrcoef(ratios, lengths)[0, 1], atol=1e-3)
    assert line["completions/mean_length"] == lengths.mean()


def test_the_old_log_probs_are_the_scorers_and_not_the_samplers(lab, tmp_path):
    seen = lab.seen["srppo", EVERY + 1]  # whose policy is the one that the evaluation before saved
    for part, experience in zip(seen.scored, seen.experience, strict=True):
        np.testing.assert_array_equal(experience.old_logp.reshape(part["logp"].shape), part["logp"])
        np.testing.assert_array_equal(experience.sft_logp.reshape(part["logp"].shape), part["sft_logp"])
    run = study_of(lab, tmp_path).run
    with run.writer:
        alone = np.concatenate(run.score("policy", lab.policy(f"srppo/iteration{EVERY}"), seen.rollouts.items))
    packed = by_response(seen, [part["logp"] for part in seen.scored])
    np.testing.assert_allclose([packed[i, 0] for i in range(BATCH)], alone, **PACKING)


def test_sampler_and_scorer_differ_by_rounding_only_and_the_log_says_by_how_much(lab):
    for arm in PPO_ARMS:
        for line in lab.lines(arm):
            assert 0 < line["rollout/decode_score_gap"] <= line["rollout/decode_score_gap_max"]
            assert line["rollout/decode_score_gap_max"] < TOLERANCES["decoding"]["atol"]


def test_an_answer_that_was_cut_is_counted_and_pays_the_penalty_at_its_end(lab):
    for iteration in range(1, ITERATIONS + 1):
        seen, line = lab.seen["srppo", iteration], lab.lines("srppo")[iteration - 1]
        finished = finished_of(seen)
        assert 0 < finished.sum() < BATCH, "the tiny model ends some answers and not others"
        assert (line["ppo/missing_eos"], line["val/num_eos_tokens"]) == (BATCH - finished.sum(), finished.sum())
        assert line["completions/clipped_ratio"] == 1 - line["val/contain_eos_token"] == 1 - finished.mean()
        expected = np.where(finished, log_ratios(seen), -lab.config.reward.missing_eos_penalty)
        np.testing.assert_allclose(line["objective/scores"], expected.mean(), **PACKING)


def test_the_prompts_of_an_iteration_are_shared_out_by_the_overlap(lab):
    known = {item.prompt.tobytes() for item in lab.study.demonstrations}
    for iteration in range(1, ITERATIONS + 1):
        items = lab.seen["srppo", iteration].rollouts.items
        assert sum(item.prompt.tobytes() in known for item in items) == BATCH // 2
        assert lab.lines("srppo")[iteration - 1]["rollout/sft_prompt_fraction"] == 0.5
    drawn = [item.id for iteration in (1, 2) for item in lab.seen["srppo", iteration].rollouts.items]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("arm", PPO_ARMS)
def test_rollouts_are_saved_as_texts_with_their_rewards(lab, arm):
    folder = lab.root / "rollouts" / arm
    assert sorted(path.name for path in folder.iterdir()) == ["000001.jsonl", "000002.jsonl", "000004.jsonl"]
    for iteration in (1, 2, 4):
        rows, seen = jsonl(folder / f"{iteration:06d}.jsonl"), lab.seen[arm, iteration]
        line = lab.lines(arm)[iteration - 1]
        assert [row["id"] for row in rows] == [item.id for item in seen.rollouts.items]
        assert {row["iteration"] for row in rows} == {iteration}
        assert all(row["prompt"] and isinstance(row["response"], str) for row in rows)
        assert len({row["response"] for row in rows}) > 1
        assert [row["tokens"] for row in rows] == lengths_of(seen).tolist()
        assert [row["finished"] for row in rows] == finished_of(seen).tolist()
        means = {name: np.mean([row[name] for row in rows]) for name in ("coherent_reward", "logratio_to_sft", "gold")}
        np.testing.assert_allclose(means["coherent_reward"], line["coherent_reward/mean"], **PACKING)
        np.testing.assert_allclose(means["logratio_to_sft"], line["objective/kl"], **PACKING)
        np.testing.assert_allclose(means["gold"], line["rollout/gold_mean"], **CLOSED)


def test_random_rewards_meet_the_same_first_rollouts_and_lead_elsewhere(lab):
    ours, theirs = lab.seen["random_reward", 1], lab.seen["srppo", 1]
    assert responses_of(ours.rollouts) == responses_of(theirs.rollouts)
    assert lab.lines("random_reward")[0]["coherent_reward/mean"] == lab.lines("srppo")[0]["coherent_reward/mean"]
    assert responses_of(lab.seen["random_reward", 4].rollouts) != responses_of(lab.seen["srppo", 4].rollouts)
    hashes = lab.summary["params_sha256"]
    assert len(set(hashes.values())) == len(hashes)


def test_random_rewards_are_noise_of_the_scores_own_mean_and_spread(lab):
    for iteration in (1, 2):
        seen = lab.seen["random_reward", iteration]
        scores = np.where(finished_of(seen), log_ratios(seen), -lab.config.reward.missing_eos_penalty)
        noise = rng_for(lab.config.seed, Stream.REWARD, iteration).standard_normal(BATCH)
        expected = scores.mean() + scores.std() * noise
        line = lab.lines("random_reward")[iteration - 1]
        np.testing.assert_allclose(line["objective/scores"], expected.mean(), **PACKING)


def test_the_returns_of_reinforce_less_their_mean_are_its_advantages(lab):
    seen = lab.seen["reinforce", 1]
    advantage = np.concatenate([e.advantage[e.rows.slot < e.rows.num_slots] for e in seen.experience])
    np.testing.assert_allclose((advantage.mean(), advantage.std()), (0.0, 1.0), atol=1e-5)
    for e in seen.experience:  # with gamma 1 every token of a response has its whole return
        more = np.asarray(follows(e.rows.slot, num_slots=e.rows.num_slots))[..., :-1]
        assert more.any()
        np.testing.assert_allclose(e.advantage[..., 1:][more], e.advantage[..., :-1][more], **CLOSED)


def test_the_rate_logged_is_that_of_the_last_update(lab):
    rate = schedule(lab.config.train, ITERATIONS * MINI_BATCHES)
    for line in lab.lines("srppo"):
        np.testing.assert_allclose(line["lr"], float(rate(line["step"] * MINI_BATCHES - 1)), rtol=1e-6)


def test_a_program_is_compiled_once_for_a_shape_whatever_the_arm(lab):
    def shapes(arms):
        parts = [part for (arm, _), seen in lab.seen.items() if arm in arms for part in seen.rollouts.parts]
        return {(*part.rows.tokens.shape, *part.rows.slot.shape, part.rows.num_slots) for part in parts}

    of_sft = len(("pretrain", "sft", "sft_longer", "sft_equal_compute"))
    of_ppo = len(shapes(PPO_ARMS)) + len(shapes(("srppo", "random_reward")))
    assert len(shapes(PPO_ARMS)) < ITERATIONS
    assert lab.summary["compilations"]["update"] == of_sft + of_ppo


# ---- the same run in other ways


def test_a_run_in_one_segment_stopped_amid_sampling_ends_with_the_same_bits(lab, tmp_path, monkeypatch):
    study = study_of(lab, tmp_path, ppo__eval_iterations=0)
    sample, looks = Learner.sample, []

    def stopped(self, state, iteration):
        if iteration == 3:
            self.study.run.stop_requested = lambda: looks.append(iteration) or len(looks) == 2
        out = sample(self, state, iteration)
        assert iteration != 3, "sampling went on to its end"
        return out

    monkeypatch.setattr(Learner, "sample", stopped)
    with pytest.raises(Preempted, match=r"stopped in srppo/iteration4 after iteration 2; the same command goes on"):
        run_arm(study)
    monkeypatch.setattr(Learner, "sample", sample)
    assert (tmp_path / "checkpoints" / "srppo" / "iteration4" / "2").is_dir()
    assert not (tmp_path / "phases" / "srppo" / "iteration4").exists()

    policy = run_arm(study_of(lab, tmp_path, ppo__eval_iterations=0))
    assert checksums(policy) == checksums(lab.policy("srppo/iteration4"))
    ours, theirs = (untimed(lines) for lines in (ppo_lines(tmp_path, "srppo"), lab.lines("srppo")))
    assert [line | {"round": 0} for line in ours] == [line | {"round": 0} for line in theirs]
    for path in (lab.root / "rollouts" / "srppo").iterdir():
        assert (tmp_path / "rollouts" / "srppo" / path.name).read_bytes() == path.read_bytes()


def test_a_run_stopped_amid_a_segment_goes_on_with_two_devices_and_another_attention_and_ends_alike(lab, tmp_path):
    config = dataclasses.replace(
        lab.config,
        workdir=str(tmp_path),
        ppo=dataclasses.replace(lab.config.ppo, arms=("srppo",)),
        train=dataclasses.replace(lab.config.train, save_steps=1),
    )
    first = tmp_path / "checkpoints" / "srppo" / "iteration2" / "1"
    with pytest.raises(Preempted, match="stopped in srppo/iteration2 after iteration 1"):
        run_on(1, config, stop_requested=first.exists)
    tiles = dataclasses.replace(config.model, attn_implementation="xla_tiles")
    run_on(2, dataclasses.replace(config, model=tiles))
    assert_arm_alike(tmp_path, lab.root, "srppo")
    assert_policies_alike(tmp_path, lab.root, ["sft", "srppo/iteration2", "srppo/iteration4"])
