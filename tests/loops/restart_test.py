"""A run that is killed and started again ends as one that was not: parameters, products, summary, metrics.

The real command in a process of its own, and real signals.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from sera_jax.writer import read_records
from tests.loops.tiny import tiny_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
OVERRIDES = {
    "sera.arms": "daa,sera",
    "sera.rounds": 3,
    **{f"{group}.save_steps": 1 for group in ("pretrain", "sft", "train")},
}
DEADLINE_SECONDS = 300


def start(workdir, **changes):
    flags = tiny_flags(workdir, **OVERRIDES, **changes)
    # one device, as a user has it; the compile cache of the tests makes a restart cheap
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "sera_jax.main", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(exit code, standard error)."""
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, err


def signal_when(process, there, number):
    """Send `number` as soon as `there()` is true; False if the process ended before."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not there():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the moment to kill at never came"
        time.sleep(0.002)
    process.send_signal(number)
    return True


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The work directory of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    code, err = finish(start(workdir))
    assert code == 0, err
    return workdir


def products(workdir):
    """Every file of every phase but the raw arrays, which their checksums stand for; without what tells the time."""
    found = {}
    for path in sorted((workdir / "phases").rglob("*")):
        name = path.relative_to(workdir / "phases")
        if not path.is_file() or "arrays" in name.parts:
            continue
        found[str(name)] = path.read_bytes()
        if name.name == "manifest.json":
            found[str(name)] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
    return found


def metrics(workdir):
    records = read_records(workdir / "metrics.jsonl")[0]
    lines = {
        (r["phase"], r["arm"], r["round"], r["step"]): {k: v for k, v in r.items() if k != "time"} for r in records
    }
    assert len(lines) == len(records), "a step was written twice"
    return lines


def assert_same_end(workdir, whole):
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (workdir, whole))
    for key in ("params_sha256", "arms", "rounds"):
        assert ours[key] == theirs[key], key
    ours, theirs = products(workdir), products(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert metrics(workdir) == metrics(whole)
    assert (workdir / "generations.jsonl").read_bytes() == (whole / "generations.jsonl").read_bytes()
    assert list((workdir / "checkpoints").rglob("checksums.json")) == []
    assert list((workdir / "phases").rglob("*.partial")) == []


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


class Moment(NamedTuple):
    """When to kill: as soon as `there` is true of the work directory, and before `phase` is done."""

    there: Callable[[pathlib.Path], bool]
    phase: str


def producing(phase):
    return Moment(lambda workdir: (workdir / "phases" / f"{phase}.partial").exists(), phase)


def saved(phase, step):
    return Moment(lambda workdir: (workdir / "checkpoints" / phase / str(step)).exists(), phase)


def writing(phase, step):
    """orbax is at work on a checkpoint."""

    def there(workdir):
        return any((workdir / "checkpoints" / phase).glob(f"{step}.orbax-checkpoint-tmp*"))

    return Moment(there, phase)


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
    "writing the policy": Moment(
        lambda workdir: (workdir / "phases" / "sera" / "round2.partial" / "params").exists(), "sera/round2"
    ),
    "evaluation": producing("sera/round3/generations"),
}


def killed_at(moment, folder):
    """The work directory of a run killed at that moment; a process that was too fast for the eye is tried again."""
    for attempt in range(5):
        workdir = folder / str(attempt)
        process = start(workdir)
        signal_when(process, lambda workdir=workdir: moment.there(workdir), signal.SIGKILL)
        code, err = finish(process)
        if code == -signal.SIGKILL and not (workdir / "phases" / moment.phase / "manifest.json").exists():
            return workdir
    raise AssertionError(f"never killed within {moment.phase}: {err}")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_in_any_phase_ends_as_one_that_was_not(whole, tmp_path, moment):
    workdir = killed_at(MOMENTS[moment], tmp_path)
    code, err = finish(start(workdir))
    assert code == 0, err
    assert_same_end(workdir, whole)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(whole, tmp_path):
    kills = 0
    for moment in MOMENTS.values():
        process = start(tmp_path)
        signal_when(process, lambda moment=moment: moment.there(tmp_path), signal.SIGKILL)
        code, err = finish(process)
        kills += code == -signal.SIGKILL
        if code == 0:  # too fast for the eye at this moment, and so at its end
            break
    assert kills >= 2, "several kills in one work directory"
    code, err = finish(start(tmp_path))
    assert code == 0, err
    assert_same_end(tmp_path, whole)
