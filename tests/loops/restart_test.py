"""A run that is killed and started again ends as one that was not: parameters, products, summary, metrics.

The real command in a process of its own, and real signals.
"""

import signal

import pytest

from sera_jax.checkpoint.phases import UNFINISHED
from tests.loops import kills
from tests.loops.kills import Moment, assert_same_end, finish, holding, producing, saved, signal_when, writing
from tests.loops.tiny import tiny_flags

OVERRIDES = {
    "sera.arms": "daa,sera",
    "sera.rounds": 3,
    **{f"{group}.save_steps": 1 for group in ("pretrain", "sft", "train")},
}


def start(workdir, devices=1, program=kills.MAIN, **changes):
    return kills.start(tiny_flags(workdir, **OVERRIDES, **changes), devices, program)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The work directory of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    code, err = finish(start(workdir))
    assert code == 0, err
    return workdir


def test_a_run_that_is_stopped_and_then_killed_ends_as_one_that_was_not(whole, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    process = start(tmp_path)
    assert signal_when(process, (checkpoints / "pretrain" / "2").exists, signal.SIGTERM)
    code, err = finish(process)
    assert code == 75, err
    assert "stopped in pretrain after update" in err and "the same command goes on" in err
    assert not (tmp_path / "phases" / "pretrain").exists()

    process = start(tmp_path)
    assert signal_when(process, (checkpoints / "round1" / "2").exists, signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    assert not (tmp_path / "phases" / "sera").exists()

    code, err = finish(start(tmp_path))
    assert code == 0, err
    assert "pretrain: step" not in err, "a finished phase was done again"
    assert_same_end(tmp_path, whole)


def test_a_run_that_writes_behind_and_is_killed_and_stopped_ends_as_one_that_waits(whole, tmp_path):
    """It is killed while arrays of SFT are not there, and stopped with nothing of round 1 left to write."""
    behind = kills.WRITING_BEHIND
    killed = start(tmp_path, program=behind)
    assert signal_when(killed, (tmp_path / "phases" / "sft" / UNFINISHED).exists, signal.SIGKILL)
    assert finish(killed)[0] == -signal.SIGKILL
    assert not (tmp_path / "phases" / "sft" / "manifest.json").exists()

    stopped = start(tmp_path, program=behind)
    assert signal_when(stopped, (tmp_path / "phases" / "round1" / UNFINISHED).exists, signal.SIGTERM)
    code, err = finish(stopped)
    assert code == 75, err
    assert (tmp_path / "phases" / "round1" / "manifest.json").exists()

    code, err = finish(start(tmp_path, program=behind))
    assert code == 0, err
    assert_same_end(tmp_path, whole)


def test_another_config_in_the_same_folder_is_refused_by_field_with_the_way_out(whole):
    code, err = finish(start(whole, train__learning_rate=2e-3))
    assert code == 2
    assert "train.learning_rate: 0.001 there, 0.002 now" in err
    assert "choose another --config.workdir, or delete this one" in err
    assert "Traceback" not in err


def test_a_loss_that_is_not_finite_stops_the_command_with_code_2(tmp_path):
    code, err = finish(start(tmp_path, pretrain__learning_rate=1e30))
    assert code == 2
    assert "pretrain: the loss or gradient of update" in err and "Records of its batch: " in err
    assert "Traceback" not in err
    (saved,) = [p.name for p in (tmp_path / "checkpoints" / "pretrain").iterdir() if p.name.isdigit()]
    assert f"The last good state (update {saved}) is saved in" in err


MOMENTS = {
    "world": producing("world"),
    "pretraining": saved("pretrain", 3),
    "sft": saved("sft", 1),
    "scoring the reference": producing("sft/pool"),
    "training round 1": saved("round1", 2),
    "saving a checkpoint": writing("round1", 2),
    "scoring the margins": producing("round1/pool"),
    "sampling": producing("round1/candidates"),
    "scoring the candidates": producing("round1/candidates_by_sft"),
    "after selecting": Moment(lambda workdir: (workdir / "phases" / "sera" / "pairs2").exists(), "sera/round2"),
    "training round 2": saved("sera/round2", 1),
    "training round 3": saved("sera/round3", 1),
    "writing the policy": holding("sera/round2", "params"),
    "evaluation": producing("sera/round3/generations"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_in_any_phase_ends_as_one_that_was_not(whole, tmp_path, moment):
    workdir = kills.killed_at(start, MOMENTS[moment], tmp_path)
    code, err = finish(start(workdir))
    assert code == 0, err
    assert_same_end(workdir, whole)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(whole, tmp_path):
    assert kills.killed_again_and_again(start, list(MOMENTS.values()), tmp_path) >= 2, "in one work directory"
    code, err = finish(start(tmp_path))
    assert code == 0, err
    assert_same_end(tmp_path, whole)
