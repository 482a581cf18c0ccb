"""An experiment with Self-Rewarding PPO: which arms and iterations its summary holds, and what each arm is given."""

import dataclasses
import fcntl
import itertools
import json
import types

import jax
import numpy as np
import pytest

from sera_jax import experiment
from sera_jax.checkpoint.papers import write_jsonl
from sera_jax.evaluation.report import check_summary
from sera_jax.experiment import verifying
from sera_jax.experiment.methods import srppo as srppo_method
from sera_jax.experiment.methods.srppo import SRPPO, iteration_metrics
from sera_jax.loops.runtime import Preempted
from sera_jax.mesh import make_mesh
from tests.damage import command, copied
from tests.loops.tiny import tiny_srppo

ARMS = ("sft_equal_compute", "best_of_n", "srppo", "sft_longer", "ppo_reward_model")
ITERATIONS = 2


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run: config, summary, folder, and the first calls of the arms' loops."""
    root = tmp_path_factory.mktemp("run")
    config = tiny_srppo(
        root,
        world__prompts=30,
        ppo__prompt_overlap=0.5,
        ppo__arms=ARMS,
        ppo__iterations=ITERATIONS,
        ppo__eval_iterations=1,
        ppo__best_of=2,
        world__preferences=24,
        world__heldout_preferences=12,
        data__label_noise=0.25,
        reward_model__batch_size=8,
        reward_model__learning_rate=1e-3,
        eval__num_generations=3,
    )
    calls = {}

    def watched(name, function):
        def call(*args, **options):
            calls.setdefault(name, args)
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_mesh", lambda *_: make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        for name in ("sft_equal_compute", "sft_longer", "best_of_n", "srppo"):
            patch.setattr(srppo_method, name, watched(name, getattr(srppo_method, name)))
        summary = experiment.run(config)
    return types.SimpleNamespace(config=config, summary=summary, root=root, calls=calls)


def test_every_arm_is_reported_in_the_order_asked_for_after_the_sft_model(done):
    check_summary(json.loads((done.root / "summary.json").read_text()), SRPPO.report)
    assert list(done.summary["arms"]) == ["sft", *ARMS]
    for arm, facts in done.summary["arms"].items():
        assert {"gold_mean", "gold_ci95", "coherent_reward_mean", "eos_fraction", "win_rate_vs_sft"} <= set(facts), arm
        assert ("heldout_nll" in facts) == ("kl_to_sft" in facts) == (arm != "best_of_n"), arm
        assert facts["cost/passes_tokens"] > 0, arm
        assert ("reward_model_accuracy" in facts) == (arm == "ppo_reward_model"), arm
    assert done.summary["arms"]["sft"]["kl_to_sft"] == 0.0
    assert done.summary["arms"]["sft"]["win_rate_vs_sft"] == 0.5


def test_only_arms_with_a_policy_have_parameters(done):
    assert set(done.summary["params_sha256"]) == {"sft", *ARMS} - {"best_of_n"}
    assert len(set(done.summary["params_sha256"].values())) == len(ARMS)


def test_equal_compute_is_given_what_ppo_cost_though_it_was_named_before_it(done):
    *_, last = [facts for facts in done.summary["rounds"] if facts["arm"] == "srppo"]
    assert last["passes_tokens"] > 0
    assert done.calls["sft_equal_compute"][1:] == (done.config.sft, last["passes_tokens"])


def test_candidates_are_drawn_at_the_temperature_of_the_rollouts_for_every_held_out_prompt(done):
    _, prompts, settings = done.calls["best_of_n"]
    assert len(prompts) == done.config.world.heldout_prompts
    assert (settings.temperature, settings.top_p, settings.max_new_tokens) == (1.0, 1.0, 16)


def test_the_study_holds_the_two_models_the_demonstrations_and_the_new_prompts(done):
    study, arm = done.calls["srppo"]
    assert arm.name == "srppo"
    assert (study.base.name, study.sft.name) == ("pretrain", "sft")
    assert len(study.demonstrations) == done.config.world.demonstrations
    known = {item.prompt.tobytes() for item in study.demonstrations}
    assert study.prompts
    assert not known & {item.prompt.tobytes() for item in study.prompts}
    shown = study.texts(study.prompts[0], np.array([10, 11, 2], np.int32))
    assert set(shown) == {"prompt", "response"}
    assert all(isinstance(text, str) and text for text in shown.values())


def test_rounds_are_the_evaluations_and_iterations_the_metrics_of_ppo(done):
    assert [(f["arm"], f["round"], f["iteration"]) for f in done.summary["rounds"]] == [
        (arm, n, n) for arm in ("srppo", "ppo_reward_model") for n in (1, 2)
    ]
    assert not [name for facts in done.summary["rounds"] for name in facts if name.endswith("_ci95")]
    lines = done.summary["iterations"]
    assert [(line["arm"], line["iteration"]) for line in lines] == [
        (arm, i) for arm in ("srppo", "ppo_reward_model") for i in (1, 2)
    ]
    assert {"objective/kl", "coherent_reward/mean", "loss/policy_avg"} <= set(lines[0])


def test_the_prompts_are_counted_by_kind(done):
    counts = done.summary["prompts"]
    study = done.calls["srppo"][0]
    assert counts["sft"] == len({item.prompt.tobytes() for item in study.demonstrations})
    assert counts["new"] == len(study.prompts)
    assert (counts["overlap"], counts["heldout"]) == (0.5, done.config.world.heldout_prompts)
    assert counts["new"] + counts["left_out_known"] + counts["left_out_repeated"] == 30


def test_the_first_answers_of_every_policy_and_of_best_of_n_are_kept_as_texts(done):
    rows = [json.loads(line) for line in (done.root / "generations.jsonl").read_text().splitlines()]
    names = [row["policy"] for row in rows]
    expected = {"sft", "best_of_n", "sft_longer", "sft_equal_compute"}
    expected |= {f"{arm}/iteration{n}" for arm in ("srppo", "ppo_reward_model") for n in (1, 2)}
    assert set(names) == expected
    assert all(names.count(name) == 3 for name in expected)


def test_a_finished_run_is_sound_and_what_was_changed_in_it_is_a_line_and_exit_code_2(done, tmp_path, capsys):
    assert command(done.config, "verify") == 0
    assert capsys.readouterr().out.startswith(f"{done.root}: all as it was written, ")
    workdir = copied(done.root, tmp_path / "run")
    metrics, summary = workdir / "metrics.jsonl", workdir / "summary.json"
    metrics.write_text(metrics.read_text().replace('"objective/kl": 0.', '"objective/kl": 1.', 1))
    summary.write_text(summary.read_text().replace("0.", "1.", 1))
    next((workdir / "phases" / "sft" / "params").rglob("d/*")).unlink()
    assert command(dataclasses.replace(done.config, workdir=str(workdir)), "verify") == 2
    out, err = capsys.readouterr()
    assert err == f"error: 4 of what {workdir} holds are damaged\n"
    phase, lines, of_run, of_summary = out.splitlines()
    assert phase.endswith(f" is missing; delete {workdir}/phases/sft and start the same command again to make it anew")
    assert lines.startswith(f"{metrics} no longer has the lines of srppo/iteration1 as they were written; ")
    assert (
        of_run == f"{metrics} is not what the run left; no later start writes it anew, and nothing is computed from it"
    )
    assert of_summary == f"{summary} is not what the run left; start the same command again, which writes it anew"


def test_of_each_arm_the_last_state_alone_is_kept_and_the_policy_of_every_evaluation(done):
    """So the last phase can be gone on with; --verify, above, misses nothing."""
    for arm in ("srppo", "ppo_reward_model"):
        folders = [done.root / "phases" / arm / f"iteration{i}" for i in range(1, ITERATIONS + 1)]
        assert [(folder / "state" / "arrays").exists() for folder in folders] == [False] * (ITERATIONS - 1) + [True]
        assert all((folder / "params" / "arrays").exists() for folder in folders)


def test_verifying_stops_between_two_phases_with_nobody_at_work_meanwhile(done, monkeypatch):
    asked = itertools.count(1)
    held = []
    monkeypatch.setattr(fcntl, "lockf", lambda file, how: held.append(file))

    def stop():
        assert not held[0].closed, "the lock is let go"
        return next(asked) == 3

    with pytest.raises(Preempted, match="stopped while verifying"):
        list(verifying.damages(done.config, stop))
    assert next(asked) == 4 and held[0].closed


def test_the_command_stops_verifying_and_says_which_flags_it_does_not_look_at(done, capsys):
    asked = iter([False, True])
    assert command(done.config, "verify", "allow_other_versions", stop_requested=lambda: next(asked)) == 75
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "--allow_other_versions says nothing to --verify, which runs nothing"
    assert said[1].startswith("stopped while verifying; nothing was changed")


def test_ends_of_lines_that_stand_within_a_text_are_no_damage(done, tmp_path):
    workdir = copied(done.root, tmp_path / "run")
    (workdir / "digests.json").unlink()  # as of a run that is not finished
    write_jsonl(workdir / "rollouts" / "srppo" / "000009.jsonl", [{"response": "a\u2028b\u2029c\u0085d"}])
    config = dataclasses.replace(done.config, workdir=str(workdir))
    assert list(verifying.damages(config)) == []
    (workdir / "rollouts" / "srppo" / "000009.jsonl").write_text("{}\nx\n")
    (line,) = verifying.damages(config)
    assert "000009.jsonl cannot be read" in line


def test_only_the_resting_work_directory_of_this_config_is_verified(done, tmp_path, capsys, monkeypatch):
    def busy(*_):
        raise BlockingIOError

    assert command(dataclasses.replace(done.config, workdir=str(tmp_path)), "verify") == 2
    assert command(dataclasses.replace(done.config, seed=1), "verify") == 2
    monkeypatch.setattr(fcntl, "lockf", busy)
    assert command(done.config, "verify") == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    words = [
        "holds no config.json of a run, so there is nothing to verify",
        "seed: 0 there, 1 now",
        "is in use by another",
    ]
    assert [part in line for part, line in zip(words, told, strict=True)] == [True] * 3


def test_the_same_command_again_changes_nothing_and_makes_no_phase(done, capsys):
    log = done.root / "metrics.jsonl"
    written = log.read_text()
    log.write_text(written.replace('"objective/kl": 0.', '"objective/kl": 1.', 1))
    before = {path: path.stat().st_mtime_ns for path in (done.root / "phases").rglob("manifest.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_mesh", lambda *_: make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        again = experiment.run(done.config)
    for key in ("arms", "rounds", "iterations", "prompts", "params_sha256"):
        assert again[key] == done.summary[key], key
    assert "no longer has the lines of srppo/iteration1 as they were written" in capsys.readouterr().err
    log.write_text(written)
    assert before == {path: path.stat().st_mtime_ns for path in (done.root / "phases").rglob("manifest.json")}


def test_iterations_keep_finite_numbers(tmp_path):
    line = {"phase": "ppo", "arm": "srppo", "round": 1, "step": 7}
    metrics = {"loss": 0.5, "grad_norm": None, "nonfinite": {"grad_norm": "nan"}}
    other = {"phase": "sft", "arm": "", "round": 0, "step": 1, "loss": 2.0}
    for name, row in (("sft", other), ("iteration7", line | metrics)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    found = iteration_metrics(tmp_path / name for name in ("sft", "iteration7", "without"))
    assert found == [{"arm": "srppo", "iteration": 7, "loss": 0.5}]
