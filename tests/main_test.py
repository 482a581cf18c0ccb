"""The command itself, as a process: what it answers to a broken config, a full disk, and a signal before it works."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = {
    "syntax": ("def get_config(:\n", "1: invalid syntax"),
    "import": ("\nimport nosuch\n", "2: ModuleNotFoundError: No module named 'nosuch'"),
    "zero": ("def get_config():\n    return 1 / 0\n", "2: ZeroDivisionError: division by zero"),
}


def start(*flags):
    command = [sys.executable, "-m", "sera_jax.main", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def refused(process):
    """The one line that the process ended with, and exit code 2."""
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


def test_a_config_file_that_cannot_be_run_is_a_line_with_its_place(tmp_path):
    running = {}
    for name, (text, _) in CONFIGS.items():
        (tmp_path / f"{name}.py").write_text(text)
        running[name] = start(f"--config={tmp_path / name}.py")
    running["absent"] = start(f"--config={tmp_path}/absent.py")
    for name, (_, words) in CONFIGS.items():
        assert refused(running[name]) == f"{tmp_path / name}.py:{words}"
    assert refused(running["absent"]).endswith(f"No such file or directory: '{tmp_path}/absent.py'")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_a_line_that_says_what_to_do(tmp_path):
    (tmp_path / "config.json.tmp").symlink_to("/dev/full")
    line = refused(start("--config=configs/quickstart.py", f"--config.workdir={tmp_path}"))
    assert line == "the disk is full; make room and start the same command again: it goes on from there"


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no device that is always full")
def test_what_a_config_sets_may_be_unset_as_another_field_demands(tmp_path):
    (tmp_path / "config.json.tmp").symlink_to("/dev/full")
    flags = ["--config=configs/quickstart_srppo.py", f"--config.workdir={tmp_path}", "--config.ppo.critic=head"]
    first, second = start(*flags), start(*flags, "--config.ppo.critic_learning_rate=None")
    assert "config.ppo.critic_learning_rate=0.001" in refused(first)
    assert "the disk is full" in refused(second), "the config is taken"


def test_a_process_that_the_others_leave_alone_says_so_in_a_line(tmp_path):
    joined = ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1", "--connect_seconds=1"]
    line = refused(start("--config=configs/quickstart.py", f"--config.workdir={tmp_path}", *joined))
    assert line.startswith("process 1 of 2 at localhost:1: not all processes were there within 1 seconds")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="asks Linux which signals are heard")
def test_a_signal_is_heard_before_the_libraries_are_loaded_and_nothing_is_begun(tmp_path):
    process = start("--config=configs/quickstart.py", f"--config.workdir={tmp_path / 'run'}")
    status = pathlib.Path(f"/proc/{process.pid}/status")

    def heard():
        mask = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        return int(mask, 16) >> (signal.SIGTERM - 1) & 1

    while not heard():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped before anything was done; the same command starts it" in err
    assert not (tmp_path / "run").exists()


def test_a_signal_at_the_interpreters_end_leaves_the_exit_code():
    script = (
        "import os, signal, sys; from sera_jax.main import StopOnSignal; stop = StopOnSignal()\n"
        "class Late:  # its instance goes with the modules, after Python has let go of its handlers\n"
        "    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGTERM): kill(own, number)\n"
        "late = Late(); sys.exit(75)"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 75, process.stderr
