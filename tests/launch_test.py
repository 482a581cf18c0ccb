"""The launchers, run with an interpreter and schedulers that only record what they are asked for: what would run, with
which arguments, and which exit code comes back."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def script(path: pathlib.Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def bin_(tmp_path):
    """A folder that comes first on PATH."""
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def start(name, bin_, *flags, **environment):
    own = {"PATH": f"{bin_}:{os.environ['PATH']}", "LOGS": str(bin_.parent / "logs"), **environment}
    return subprocess.Popen(
        [LAUNCH / name, *flags], env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def launched(name, bin_, *flags, **environment):
    """(exit code, standard output, standard error)."""
    process = start(name, bin_, *flags, **environment)
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


@each_script
def test_launchers_hold_no_hyper_parameters(path):
    code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    fields = [word for line in code for word in line.split() if word.startswith("--config.")]
    assert all(field.startswith("--config.workdir=") for field in fields)


@each_script
def test_launchers_pass_shellcheck(path):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (requirements-test.txt has it)")
    done = subprocess.run([program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_launcher_without_an_environment_says_what_to_do(bin_):
    code, _, err = launched("local.sh", bin_, PYTHON=str(bin_ / "absent"))
    assert code == 1 and "make env" in err


# sera_jax.main of a process: it says what it was given. sera_jax.status is the real one.
STAND_IN = f"""
if [ "$2" = sera_jax.status ]; then exec {sys.executable} "$@"; fi
index=${{@: -1}}; index=${{index#*=}}
for word; do case $word in --progress_dir=*) progress=${{word#*=}} ;; esac; done
trap 'exit 75' TERM
sign() {{ # when it last got anywhere, and after how many turns
  printf '{{"process": %d, "processes": 2, "host": "h", "pid": %d, "time": %s, "moved": %s, "turn": %d}}' \\
    "$index" $$ "$(date +%s.%N)" "$1" "$2" >"$progress/$index"
  mv "$progress/$index" "$progress/process-$index.json"
}}
"""


def local(bin_, body, *flags, gpus=4, **environment):
    """launch/local.sh with processes that do `body`, as process `$index`, on a machine of so many GPUs."""
    script(bin_ / "python", STAND_IN + body)
    script(bin_ / "nvidia-smi", f"seq {gpus}")
    return start("local.sh", bin_, *flags, PYTHON="python", PORT="1234", **environment)


def end_of(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def test_the_local_launcher_gives_each_process_its_number_its_gpus_and_a_log(bin_):
    code, _, err = end_of(local(bin_, 'echo "$@ on $JAX_LOCAL_DEVICE_IDS"; exit 75', "--processes=2", "--config=a b"))
    assert code == 75, err
    logs = bin_.parent / "logs"
    for index, devices in enumerate(("0,1", "2,3")):
        said = (logs / f"process-{index}.log").read_text()
        joined = f"--coordinator_address=localhost:1234 --num_processes=2 --process_id={index}"
        assert said == f"-m sera_jax.main --config=a b --progress_dir={logs}/progress {joined} on {devices}\n"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--processes=3", "does not divide the 4 GPUs"),
        ("--processes=0", "give how many"),
        ("--silent_seconds=1m", "give whole seconds"),
    ],
)
def test_the_local_launcher_refuses_what_cannot_be(bin_, flag, words):
    code, _, err = end_of(local(bin_, "exit 0", flag))
    assert code == 2 and words in err


def test_the_local_launcher_names_the_silent_process_and_ends_the_others(bin_):
    """Process 1 is stuck after 5 turns, and the other waits for it in the sixth."""
    body = "moved=$(date +%s.%N); while :; do sign $moved $((6 - index)); sleep 0.2; done"
    code, _, err = end_of(local(bin_, body, "--processes=2", "--silent_seconds=2"))
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("process ")]
    assert line.startswith("process 1 of 2 (h, pid ") and "is alive but got nowhere for" in line
    assert "the same command goes on" in err


def test_the_local_launcher_lets_those_that_get_on_be(bin_):
    body = "for turn in $(seq 20); do sign $(date +%s.%N) $turn; sleep 0.2; done"
    code, _, err = end_of(local(bin_, body, "--processes=2", "--silent_seconds=2"))
    assert code == 0, err


def test_a_signal_stops_all_and_the_launcher_ends_as_they_do(bin_):
    process = local(bin_, 'touch "$progress/there-$index"; while :; do sleep 0.1; done', "--processes=2")
    there = bin_.parent / "logs" / "progress"
    deadline = time.monotonic() + 60
    while len(list(there.glob("there-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 75


def test_the_exit_code_is_that_of_the_first_process_that_has_one(bin_):
    assert end_of(local(bin_, "exit $((index * 2))", "--processes=4"))[0] == 2
