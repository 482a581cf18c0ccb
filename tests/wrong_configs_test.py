"""Wrong command lines, as processes: each ends with exit code 2 and one line, before anything is trained."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.wrong_configs import by_hand, of_metadata

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROW = {"prompt": "Name a tree.", "chosen": "An oak.", "rejected": "Sand."}


def answers(lines, module="sera_jax.main"):
    """(exit code, standard error) of every command line."""
    command = [sys.executable, str(ROOT / "tests" / "forked.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, input=json.dumps([module, lines]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wrong(answer):
    """What is wrong with an answer to a wrong command line: "" where it is a refusal in one line."""
    code, err = answer
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    if code != 2 or "Traceback" in err or len(said) != 1 or len(said[0]) > 1500:
        return f"exit code {code}: {err[-1500:]}"
    return ""


def campaign(folder, *, every=1):
    """The answers to all wrong command lines, or to some of them."""
    given = [*([flag] for flag in of_metadata()), *by_hand(folder)][::every]
    (folder / "rows.jsonl").write_text("".join(json.dumps({**ROW, "prompt": f"Tree {n}?"}) + "\n" for n in range(40)))
    lines = []
    for number, flags in enumerate(given):
        base = [] if flags[0].startswith("--config=") else ["--config=configs/base.py", "--config.model.vocab_size=300"]
        base += [f"--config.workdir={folder / 'runs' / str(number)}", f"--config.data.train={folder / 'rows.jsonl'}"]
        lines.append([*base, *flags])
    failed = {" ".join(f)[:200]: wrong(a) for f, a in zip(given, answers(lines), strict=True) if wrong(a)}
    assert not failed, "\n\n".join(f"{flags}\n{why}" for flags, why in failed.items())
    assert not list(folder.glob("runs/*/checkpoints/*"))
    return len(given)


def test_a_wrong_command_line_ends_with_exit_code_2_and_one_line(tmp_path):
    assert campaign(tmp_path, every=20) > 20


@pytest.mark.slow
def test_every_wrong_command_line_ends_with_exit_code_2_and_one_line(tmp_path):
    assert campaign(tmp_path) > 300
