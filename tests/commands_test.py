"""The commands around the package: what CI runs, the launchers, the list of make targets."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def script(path: pathlib.Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("failing", [None, "test", "parity", "check"])
def test_ci_runs_all_three_targets_and_fails_when_any_fails(tmp_path, failing):
    script(tmp_path / "make", f'echo "ran $1"; [ "$1" != "{failing}" ]')
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (failing is None)
    assert [line for line in done.stdout.splitlines() if line.startswith("ran")] == [
        "ran test",
        "ran parity",
        "ran check",
    ]
    for target in ("test", "parity", "check"):
        assert f"make {target}: {'FAILED' if target == failing else 'passed'}" in done.stdout


def test_a_launcher_without_an_environment_says_what_to_do(tmp_path):
    environment = {**os.environ, "PYTHON": str(tmp_path / "absent")}
    done = subprocess.run([ROOT / "launch" / "local.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "make env" in done.stderr


def launched(tmp_path, *flags):
    """launch/local.sh with an interpreter that only says what it was given, on a machine of four GPUs."""
    script(tmp_path / "python", 'echo "$@ on $JAX_LOCAL_DEVICE_IDS"; exit 75')
    script(tmp_path / "nvidia-smi", "seq 4")
    own = {"PYTHON": "python", "LOGS": str(tmp_path / "logs"), "PORT": "1234"}
    environment = {**os.environ, **own, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run([ROOT / "launch" / "local.sh", *flags], env=environment, capture_output=True, text=True)


def test_the_local_launcher_gives_each_process_its_number_its_gpus_and_a_log(tmp_path):
    done = launched(tmp_path, "--processes=2", "--config=a b")
    assert done.returncode == 75, done.stderr
    for index, devices in enumerate(("0,1", "2,3")):
        said = (tmp_path / "logs" / f"process-{index}.log").read_text()
        joined = f"--coordinator_address=localhost:1234 --num_processes=2 --process_id={index}"
        assert said == f"-m sera_jax.main --config=a b {joined} on {devices}\n"


@pytest.mark.parametrize(("count", "words"), [("3", "does not divide the 4 GPUs"), ("0", "give how many")])
def test_the_local_launcher_refuses_a_count_of_processes_that_cannot_be(tmp_path, count, words):
    done = launched(tmp_path, f"--processes={count}")
    assert done.returncode == 2 and words in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_launchers_hold_no_hyper_parameters(path):
    code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    fields = [word for line in code for word in line.split() if word.startswith("--config.")]
    assert all(field.startswith("--config.workdir=") for field in fields)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    assert listed == {"help", "quickstart", "env", "test", "slow", "parity", "check", "format", "docs", "clean"}
