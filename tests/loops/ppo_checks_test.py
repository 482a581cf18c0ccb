"""What stops Self-Rewarding PPO, and what is counted: a refusal names the value, the limit and the way out."""

import json
import math
import pathlib
import shutil
import types

import jax
import pytest

from sera_jax import experiment, main
from sera_jax.checkpoint import Workdir
from sera_jax.config import to_config_dict, to_dict
from sera_jax.experiment.assembly import read_corpus
from sera_jax.experiment.methods import parse
from sera_jax.loops import ppo_segment
from sera_jax.loops.ppo import Learner
from sera_jax.loops.ppo_checks import check_rewards
from sera_jax.loops.runtime import NonFinite
from sera_jax.loops.srppo import SRPPO_ARM, iterate
from sera_jax.writer import read_records
from tests.loops.srppo_lab import one_device, ppo_lines, run_arm, study_of
from tests.loops.tiny import tiny_srppo

FINE = {
    "coherent_reward/mean": 0.5,
    "coherent_reward/largest": 0.1,
    "objective/kl": 1.0,
    "objective/rlhf_reward": 0.4,
    "rollout/decode_score_gap": 1e-6,
}


@pytest.fixture
def command(monkeypatch, capsys):
    """The command with a ConfigDict in place of its flags: (exit code, standard error)."""

    def run(raw):
        root = pathlib.Path(raw.workdir)
        if (root / "phases").exists():  # made by a run of another config: as if by one of this
            shutil.move(root / "phases", root / "aside")
            Workdir(root, to_dict(parse(raw)))._lock.close()
            shutil.move(root / "aside", root / "phases")
        monkeypatch.setattr(main, "_CONFIG", types.SimpleNamespace(value=raw))
        monkeypatch.setattr(main, "_TRACEBACK", types.SimpleNamespace(value=False))
        monkeypatch.setattr(main, "_OTHER_VERSIONS", types.SimpleNamespace(value=False))
        monkeypatch.setattr(main, "_VERIFY", types.SimpleNamespace(value=False))
        monkeypatch.setattr(experiment, "make_mesh", one_device)
        with pytest.raises(SystemExit) as stopped:
            main.main(["main"])
        return stopped.value.code, capsys.readouterr().err

    return run


def with_phases(lab, folder, *names):
    """A work directory in which these phases of the lab are done; a flattened config of the lab's fields there."""
    for name in names:
        shutil.copytree(lab.root / "phases" / name, folder / "phases" / name)
    raw = to_config_dict(lab.config)
    raw.workdir = str(folder)
    return raw


def refused(code, err, *words):
    assert code == 2
    assert "Traceback" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert [word for word in words if word not in message] == []


def test_an_sft_that_moved_nothing_is_refused_before_any_rollout(lab, tmp_path, command):
    raw = with_phases(lab, tmp_path, "world", "init", "pretrain")
    raw.sft.learning_rate = 1e-30
    code, err = command(raw)
    refused(code, err, "the SFT model equals the base", "config.sft.learning_rate=1e-30", "raise the rate")
    assert "pretrain: step" not in err, "a phase that was done is found again"
    assert not (tmp_path / "rollouts").exists()


def test_a_loss_that_is_not_finite_stops_the_command_with_the_way_out(lab, tmp_path, command):
    raw = with_phases(lab, tmp_path, "world", "init", "pretrain", "sft")
    raw.train.learning_rate, raw.ppo.arms = 1e30, ("srppo",)
    code, err = command(raw)
    refused(
        code, err, "srppo, iteration 1: the loss or gradient of the policy is not finite", "(1e+30)", "--config.wor"
    )
    assert ppo_lines(tmp_path, "srppo") == []
    assert not (tmp_path / "phases" / "srppo" / "iteration2").exists()
    assert not (tmp_path / "summary.json").exists()


def test_what_the_config_rules_out_is_an_error_of_the_command(lab, tmp_path, command):
    raw = with_phases(lab, tmp_path)
    raw.sampling.temperature = 0.7
    refused(*command(raw), "config.sampling.temperature=0.7", "set temperature=1")
    raw.sampling.temperature, raw.train.batch_size = 1.0, 15
    refused(*command(raw), "config.train.batch_size=15", "use a multiple of 2")
    raw.train.batch_size, raw.world.prompts = 16, 0
    refused(*command(raw), "config.ppo.prompt_overlap=0.5", "config.world.prompts=0", "set prompt_overlap=1")
    assert list(tmp_path.iterdir()) == [], "nothing is made before the config is read"


def test_prompts_longer_than_the_limit_are_counted_on_screen_and_on_disk(tmp_path):
    said, limit = [], 8
    config = tiny_srppo(
        tmp_path,
        world__prompts=30,
        ppo__prompt_overlap=0.5,
        data__max_prompt_length=limit,
        data__truncation_mode="drop",
    )
    corpus = read_corpus(config, Workdir(tmp_path, {}), said.append)
    for name, items in (("demonstrations", corpus.demonstrations), ("prompts", corpus.prompts)):
        report = json.loads((tmp_path / "data" / f"{name}.json").read_text())
        dropped = report["dropped"]["prompt_too_long"]
        assert 0 < dropped["count"] < report["rows"] == report["kept"] + dropped["count"]
        assert f"at most {limit}" in dropped["detail"]
        (table,) = [text for text in said if text.startswith(f"{name}: ")]
        assert f"{dropped['count']}  prompt_too_long" in table
        assert max(len(item.prompt) for item in items) <= limit


def test_a_policy_that_runs_away_stops_the_run(lab, tmp_path):
    study = study_of(lab, tmp_path, ppo__max_kl=0.01, train__learning_rate=0.03)
    with pytest.raises(
        ValueError, match=r"srppo, iteration \d: objective/kl=.* exceeds config\.ppo\.max_kl=0\.01"
    ) as said:
        run_arm(study)
    for way_out in ("raise config.ppo.kl_coef (0.05)", "lower config.train.learning_rate", "new --config.workdir"):
        assert way_out in str(said.value)
    steps = [r["step"] for r in read_records(tmp_path / "metrics.jsonl")[0]]
    assert steps and f"iteration {steps[-1] + 1}:" in str(said.value), "the iterations before are in the log"
    with pytest.raises(ValueError) as again:  # the same command again says the same
        run_arm(study_of(lab, tmp_path, ppo__max_kl=0.01, train__learning_rate=0.03))
    assert str(again.value) == str(said.value)


def test_a_sampler_that_disagrees_with_the_scorer_stops_the_run(lab, tmp_path):
    with pytest.raises(
        ValueError, match=r"iteration 1: .* config\.ppo\.max_decode_score_gap=1e-12; use config\.model\.dtype=float32"
    ):
        run_arm(study_of(lab, tmp_path, ppo__max_decode_score_gap=1e-12), ends=(1,))
    assert ppo_lines(tmp_path, "srppo") == []


def test_a_reward_of_nothing_is_refused_and_one_of_something_is_not(lab):
    ppo = lab.config.ppo
    check_rewards(FINE, ppo, "srppo, iteration 1")
    with pytest.raises(ValueError, match=r"srppo, iteration 1: .* 0 for every token: the SFT model equals the base"):
        check_rewards(FINE | {"coherent_reward/largest": 0.0, "coherent_reward/mean": 0.0}, ppo, "srppo, iteration 1")
    check_rewards(FINE | {"coherent_reward/mean": 0.0}, ppo, "a mean of 0 says nothing")


@pytest.mark.parametrize("name", [name for name in FINE if name != "coherent_reward/largest"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_named(lab, name, value):
    with pytest.raises(NonFinite, match=rf"reinforce, iteration 3: {name} is {value}; .* new --config\.workdir"):
        check_rewards(FINE | {name: value}, lab.config.ppo, "reinforce, iteration 3")


@pytest.mark.parametrize(
    "name, field", [("objective/kl", "max_kl"), ("rollout/decode_score_gap", "max_decode_score_gap")]
)
def test_at_its_limit_a_run_goes_on_and_beyond_it_stops(lab, name, field):
    limit = getattr(lab.config.ppo, field)
    check_rewards(FINE | {name: limit}, lab.config.ppo, "srppo, iteration 2")
    with pytest.raises(ValueError, match=rf"config\.ppo\.{field}={limit}"):
        check_rewards(FINE | {name: 1.01 * limit}, lab.config.ppo, "srppo, iteration 2")


def test_a_kl_estimate_that_stays_below_0_is_warned_of_once(lab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ppo_segment, "_BELOW_ZERO", 2)
    study = study_of(lab, tmp_path)

    def odd(learner, state, iteration):
        state, metrics = iterate(learner, state, iteration)
        return state, metrics | {"objective/kl": -0.5}

    with jax.set_mesh(study.run.mesh), study.run.writer:
        learner = Learner(study, SRPPO_ARM)
        ppo_segment.train_segment(learner, odd, ppo_segment.Segment(1, 3, 1), study.sft)
    assert capsys.readouterr().err.count("warning: objective/kl has been below 0 for 2 iterations") == 1
