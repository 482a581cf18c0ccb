"""Several processes that run one job end as one process with as many devices does.

The real command in processes of their own, on simulated devices, and real signals.
"""

import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from sera_jax import stamps
from sera_jax.checkpoint.pieces import files
from sera_jax.experiment.saved import find_policy
from sera_jax.mesh import make_mesh
from tests.loops import kills
from tests.loops.alike import assert_alike, run_on
from tests.loops.kills import ROOT, Moment, finish, holding, metrics, producing, saved, signal_when, wait_for
from tests.loops.tiny import TINY, TINY_SRPPO, tiny_config, tiny_flags
from tests.tolerances import TOLERANCES
from tests.xla_flags import xla_flags

SAVING = {f"{group}.save_steps": 1 for group in ("pretrain", "sft", "train")}
SERA = {**TINY, **SAVING, "world.pretrain": 64, "sera.arms": ("sera",), "sera.rounds": 2, "sampling.temperature": 0.0}
# of so many iterations that a stop, which is agreed upon within some seconds, finds it at work
SRPPO = {**TINY_SRPPO, **SAVING, "world.pretrain": 64, "ppo.iterations": 24, "ppo.eval_iterations": 12}
METHODS = {"SeRA": (SERA, "pretrain/1"), "Self-Rewarding PPO": (SRPPO, "srppo/iteration12/1")}


def start(workdir, tiny, processes, devices, program=kills.MAIN):
    """The processes of a job, each with so many devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = tiny_flags(workdir, tiny=tiny)
    if processes == 1:
        return [kills.start(flags, devices)]
    joined = [*flags, f"--coordinator_address={address}", f"--num_processes={processes}"]
    return [kills.start([*joined, f"--process_id={index}"], devices, program) for index in range(processes)]


def launch(workdir, tiny, **environment):
    """Two processes of four devices by launch/local.sh, which waits a minute for one that is silent."""
    own = {"PYTHON": sys.executable, "XLA_FLAGS": xla_flags(4), **environment}
    command = [ROOT / "launch" / "local.sh", "--processes=2", "--silent_seconds=60", *tiny_flags(workdir, tiny=tiny)]
    return subprocess.Popen(command, env=os.environ | own, stderr=subprocess.PIPE, text=True)


def ends(job):
    """The exit codes, and what the processes said."""
    codes, said = zip(*map(finish, job), strict=True)
    return list(codes), "\n".join(said)


def assert_ends_as(workdir, whole):
    """All as on as many devices of one process; losses and parameters closer than that."""
    assert_alike(workdir, whole)
    close = TOLERANCES["processes"]
    theirs = metrics(whole)
    for at, line in metrics(workdir).items():
        if "loss" in line:
            np.testing.assert_allclose(line["loss"], theirs[at]["loss"], close["rtol"], close["atol"], err_msg=str(at))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for checksums in (whole / "phases").rglob("params/checksums.json"):
        name = checksums.parent.parent.relative_to(whole / "phases")
        found = (find_policy(root / "phases" / name).params(mesh) for root in (workdir, whole))
        for ours, other in zip(*map(jax.tree.leaves, map(jax.device_get, found)), strict=True):
            assert np.linalg.norm(ours - other) <= close["rtol"] * np.linalg.norm(other), name


def test_a_job_of_two_processes_of_which_one_is_stopped_goes_on_and_ends_as_one_process(tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "job"
    run_on(4, tiny_config(whole, tiny=SERA))
    job = start(workdir, SERA, 2, 2)
    assert signal_when(job[1], (workdir / "checkpoints" / "pretrain" / "1").exists, signal.SIGTERM)
    codes, said = ends(job)
    assert codes == [75, 75], said
    assert [(one.process, one.ended) for one in stamps.read(workdir / "progress")] == [(0, True), (1, True)]
    assert "the same command goes on" in said
    codes, said = ends(start(workdir, SERA, 2, 2))
    assert codes == [0, 0], said
    assert "Traceback" not in said
    assert_ends_as(workdir, whole)


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    """(the fields, a checkpoint amid its training, the work directory of the whole run in one process)."""
    tiny, amid = METHODS[request.param]
    whole = tmp_path_factory.mktemp("whole")
    codes, said = ends(start(whole, tiny, 1, 8))
    assert codes == [0], said
    return tiny, amid, whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "program"), [(2, 4, kills.MAIN), (4, 2, kills.MAIN), (2, 4, kills.WRITING_BEHIND)]
)
def test_a_job_of_several_processes_ends_as_one_process(run, tmp_path, processes, devices, program):
    tiny, _, whole = run
    codes, said = ends(start(tmp_path, tiny, processes, devices, program))
    assert set(codes) == {0}, said
    assert_ends_as(tmp_path, whole)


# sera_jax.main, but a row is a batch to score, and each leaves a piece.
IN_PIECES = """
import runpy, sys
from sera_jax.checkpoint import pieces
from sera_jax.loops import runtime
pieces.SECONDS, runtime.CPU_SCORE_TOKENS = 0, 128
sys.argv = sys.argv[1:]
runpy.run_module("sera_jax.main", run_name="__main__")
"""


@pytest.mark.slow
def test_all_processes_go_on_from_the_same_pieces(tmp_path):
    """Of a phase of scoring that is stopped, and one of sampling that is killed."""
    program, tiny = ("-c", IN_PIECES, "sera_jax.main"), {**SERA, "sampling.slots": 4}
    whole, workdir = tmp_path / "whole", tmp_path / "job"
    codes, said = ends(start(whole, tiny, 2, 2, program))
    assert codes == [0, 0], said
    for phase, number in (("sft%2Fpool", signal.SIGTERM), ("round1%2Fcandidates", signal.SIGKILL)):
        job = start(workdir, tiny, 2, 2, program)
        assert signal_when(job[1], lambda: any((workdir / "checkpoints/pieces" / phase).rglob("*.npz")), number)  # noqa: B023
        codes, said = ends(job)
        assert codes == [75, 75] if number == signal.SIGTERM else codes[1] == -number and codes[0] not in (0, 75), said
    codes, said = ends(start(workdir, tiny, 2, 2, program))
    assert codes == [0, 0], said
    assert "goes on from step" in said
    assert kills.products(workdir) == kills.products(whole)
    assert files(workdir) == []


# sera_jax.main, but process 1 waits for ever where it should ask whether to stop, once a file is there.
STUCK = """
import os, runpy, sys, time
from sera_jax import hosts
together = hosts.stopping_together
def stuck_together(asked):
    stop = together(asked)
    def ask():
        while hosts.index() == 1 and os.path.exists({there!r}):
            time.sleep(1)
        return stop()
    return ask
hosts.stopping_together = stuck_together
sys.argv = sys.argv[2:]
runpy.run_module("sera_jax.main", run_name="__main__")
"""


@pytest.mark.slow
def test_a_process_that_is_alive_but_stuck_is_the_one_that_is_named(tmp_path):
    """Nothing else notices it: its threads go on, and so do JAX's heartbeats."""
    workdir = tmp_path / "job"
    (tmp_path / "stuck.py").write_text(STUCK.format(there=str(workdir / "checkpoints" / METHODS["SeRA"][1])))
    watch = f'[ "$2" != sera_jax.status ] || exec {sys.executable} "$@"'
    (tmp_path / "python").write_text(f'#!/bin/bash\n{watch}\nexec {sys.executable} {tmp_path}/stuck.py "$@"\n')
    (tmp_path / "python").chmod(0o755)
    job = launch(workdir, SERA, PYTHON=str(tmp_path / "python"), LOGS=str(tmp_path / "logs"), PYTHONPATH=str(ROOT))
    code, said = finish(job)
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if line.startswith("process ") and " is alive but " in line]
    assert line.startswith("process 1 of 2 (") and "pretraining the base model" in line, said


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_job_of_which_a_process_hangs_is_ended_by_its_launcher_and_goes_on(run, tmp_path, index):
    tiny, amid, whole = run
    workdir, logs = tmp_path / "job", tmp_path / "logs"
    job = launch(workdir, tiny, LOGS=str(logs))
    assert wait_for(job, (workdir / "checkpoints" / amid).exists)
    pid = stamps.read(logs / "progress")[index].pid
    os.kill(pid, signal.SIGSTOP)
    code, said = finish(job)
    assert code not in (0, 75), said
    words = f"process {index} of 2 ({socket.gethostname()}, pid {pid}) gave no sign of life for"
    assert words in said or f"process {index} has not ended with the others: killed" in said, said
    code, said = finish(launch(workdir, tiny, LOGS=str(logs)))
    assert code == 0, said
    assert_ends_as(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "stopped"), [(signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)])
@pytest.mark.parametrize("then", [(2, 4), (1, 8)])
def test_a_job_whose_second_process_is_hit_goes_on_also_with_another_count(run, tmp_path, number, stopped, then):
    tiny, amid, whole = run
    job = start(tmp_path, tiny, 2, 4)
    assert signal_when(job[1], (tmp_path / "checkpoints" / amid).exists, number)
    codes, said = ends(job)
    assert codes[1] == stopped, said
    assert codes[0] == 75 if number == signal.SIGTERM else codes[0] not in (0, 75), said
    codes, said = ends(start(tmp_path, tiny, *then))
    assert set(codes) == {0}, said
    assert_ends_as(tmp_path, whole)


MOMENTS = {  # in the order of the run
    "SeRA": [
        producing("world"),
        saved("pretrain", 1),
        saved("sft", 1),
        producing("sft/pool"),
        saved("round1", 1),
        holding("round1", "params"),
        producing("round1/pool"),
        producing("round1/candidates"),
        producing("round1/candidates_by_sft"),
        saved("sera/round2", 1),
        producing("sera/round2/generations"),
    ],
    "Self-Rewarding PPO": [
        saved("pretrain", 1),
        holding("pretrain", "params"),
        saved("sft", 1),
        producing("sft/generations"),
        producing("srppo/iteration12"),
        Moment(lambda workdir: (workdir / "rollouts" / "srppo" / "000001.jsonl").exists(), "srppo/iteration12"),
        saved("srppo/iteration12", 1),
        holding("srppo/iteration12", "params"),
        producing("srppo/iteration12/generations"),
    ],
}


@pytest.mark.slow
def test_a_job_of_which_one_process_after_the_other_is_killed_phase_after_phase_ends_as_one_process(
    run, tmp_path, request
):
    tiny, _, whole = run
    hit = set()
    for number, moment in enumerate(MOMENTS[request.node.callspec.params["run"]]):
        job = start(tmp_path, tiny, 2, 4)
        killed, other = job[number % 2], job[1 - number % 2]
        signal_when(killed, lambda moment=moment: moment.there(tmp_path), signal.SIGKILL)
        codes, said = ends([killed, other])
        if codes[0] == -signal.SIGKILL:
            assert codes[1] not in (0, 75), said
            if not (tmp_path / "phases" / moment.phase / "manifest.json").exists():
                hit.add(moment.phase)
    codes, said = ends(start(tmp_path, tiny, 2, 4))
    assert codes == [0, 0], said
    assert len(hit) >= 4, hit  # phases of a tiny run may be too fast for the eye
    assert_ends_as(tmp_path, whole)
