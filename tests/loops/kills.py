"""The real command in a process of its own, real signals, and what a run that went on must have in common with one
that nothing disturbed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sera_jax.checkpoint import pieces
from sera_jax.checkpoint.phases import UNFINISHED
from sera_jax.experiment.saved import find_policy
from sera_jax.mesh import make_mesh
from sera_jax.writer import read_records
from tests.xla_flags import xla_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DEADLINE_SECONDS = 600
MAIN = ("-m", "sera_jax.main")
# The same, but arrays are written while the next phase is made, as where they lie on devices.
BEHIND = """
import runpy, sys
from sera_jax.checkpoint.phases import Workdir
Workdir.writes_behind = property(lambda self: True, lambda self, _: None)
sys.argv = sys.argv[1:]
runpy.run_module("sera_jax.main", run_name="__main__")
"""
WRITING_BEHIND = ("-c", BEHIND, "sera_jax.main")

Start = Callable[[pathlib.Path], subprocess.Popen]


def start(flags: list[str], devices: int = 1, program: tuple[str, ...] = MAIN) -> subprocess.Popen:
    """`python -m sera_jax.main` as a user has it, on simulated devices; the tests' compile cache makes it cheap."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(devices),
    }
    return subprocess.Popen(
        [sys.executable, *program, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(exit code, standard error)."""
    try:
        _, err = process.communicate(timeout=DEADLINE_SECONDS)
    finally:
        process.kill()  # where it hangs
    return process.returncode, err


def wait_for(process, there):
    """Whether `there()` came true before the process ended."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not there():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the moment to kill at never came"
        time.sleep(0.002)
    return True


def signal_when(process, there, number, delay=0.0):
    """Send `number` as soon as `there()` is true, or so many seconds after; False if the process ended before."""
    if not wait_for(process, there):
        return False
    time.sleep(delay)
    process.send_signal(number)
    return True


class Moment(NamedTuple):
    """When to kill: `delay` seconds after `there` is true of the work directory, and before `phase` is done."""

    there: Callable[[pathlib.Path], bool]
    phase: str
    delay: float = 0.0


def producing(phase):
    return Moment(lambda workdir: (workdir / "phases" / f"{phase}.partial").exists(), phase)


ENDS = (".partial", "")  # of the folder of a product that is not whole: before arrays are written, and while they are


def holding(phase, part):
    """A part of the product is there, the product is not whole."""
    return Moment(lambda workdir: any((workdir / "phases" / f"{phase}{end}" / part).exists() for end in ENDS), phase)


def saved(phase, step):
    return Moment(lambda workdir: (workdir / "checkpoints" / phase / str(step)).exists(), phase)


def writing(phase, step):
    """orbax is at work on a checkpoint."""

    def there(workdir):
        try:
            return any((workdir / "checkpoints" / phase).glob(f"{step}.orbax-checkpoint-tmp*"))
        except FileNotFoundError:  # the phase ended and took its checkpoints away while we looked
            return False

    return Moment(there, phase)


def killed_at(start_in: Start, moment: Moment, folder: pathlib.Path) -> pathlib.Path:
    """The work directory of a run killed at that moment; a process that was too fast for the eye is tried again."""
    err = ""
    for attempt in range(5):
        workdir = folder / str(attempt)
        process = start_in(workdir)
        signal_when(process, lambda workdir=workdir: moment.there(workdir), signal.SIGKILL, moment.delay)
        code, err = finish(process)
        if code == -signal.SIGKILL and not (workdir / "phases" / moment.phase / "manifest.json").exists():
            return workdir
    raise AssertionError(f"never killed within {moment.phase}: {err}")


def killed_again_and_again(start_in: Start, moments: list[Moment], workdir: pathlib.Path) -> int:
    """How often a run in one work directory was killed, at one moment after the other."""
    kills = 0
    for moment in moments:
        process = start_in(workdir)
        signal_when(process, lambda moment=moment: moment.there(workdir), signal.SIGKILL, moment.delay)
        code, _ = finish(process)
        kills += code == -signal.SIGKILL
        if code == 0:  # too fast for the eye at this moment, and so at its end
            break
    return kills


_OF_THIS_RUN = ("seconds", "arrays", "digest")  # in a manifest


def products(workdir):
    """Every file of every phase but the raw arrays, which their checksums stand for; without what tells the time, and
    the sizes of the raw arrays."""
    found: dict[str, Any] = {}
    for path in sorted((workdir / "phases").rglob("*")):
        name = path.relative_to(workdir / "phases")
        if not path.is_file() or "arrays" in name.parts:
            continue
        found[str(name)] = path.read_bytes()
        if name.name == "manifest.json":
            found[str(name)] = {k: v for k, v in json.loads(path.read_text()).items() if k not in _OF_THIS_RUN}
    return found


def texts(workdir):
    """The rollouts and generations, by file."""
    files = [workdir / "generations.jsonl", *(workdir / "rollouts").rglob("*")]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files if path.is_file()}


def metrics(workdir):
    """The lines of metrics.jsonl by their place, without what tells the time."""
    records = read_records(workdir / "metrics.jsonl")[0]
    lines = {
        (r["phase"], r["arm"], r["round"], r["step"]): {
            k: v for k, v in r.items() if k != "time" and not k.startswith("timing_s/")
        }
        for r in records
    }
    assert len(lines) == len(records), "a step was written twice"
    return lines


def summary(workdir):
    """The summary without what tells of the process (seconds, memory, what it compiled) and of the folder."""
    found = json.loads((workdir / "summary.json").read_text())
    found = {k: v for k, v in found.items() if k not in ("wall_seconds", "peak_memory_bytes", "compilations")}
    return found | {"config": found["config"] | {"workdir": ""}}


def assert_same_end(workdir, whole):
    """Summary, products, log and texts are the same, every policy can be read, and nothing unfinished is left."""
    ours, theirs = summary(workdir), summary(whole)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if ours[key] != theirs[key]] == []
    ours, theirs = products(workdir), products(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert metrics(workdir) == metrics(whole)
    assert texts(workdir) == texts(whole)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for checksums in (workdir / "phases").rglob("params/checksums.json"):  # which reading compares with the arrays
        find_policy(checksums.parent.parent).params(mesh)
    assert list((workdir / "checkpoints").rglob("checksums.json")) == []
    assert pieces.files(workdir) == []
    assert list((workdir / "phases").rglob("*.partial")) == []
    assert list((workdir / "phases").rglob(UNFINISHED)) == []
