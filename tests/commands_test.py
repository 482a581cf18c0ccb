"""The commands around the package: what CI runs, the list of make targets."""

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


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets():
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    assert listed == {
        "help",
        "quickstart",
        "env",
        "test",
        "slow",
        "parity",
        "bench",
        "check",
        "format",
        "docs",
        "clean",
    }
