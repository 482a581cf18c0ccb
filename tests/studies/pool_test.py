"""Processes a few at a time: on cores of their own, one of each start first, ended with what started them."""

import os
import pathlib
import sys
import time

import pytest

from sera_jax.studies import pool
from sera_jax.studies.pool import Job, slots, work

PINNED = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system pins no process")


def job(tmp_path, name, code, start="") -> Job:
    return Job(name, [sys.executable, "-S", "-c", code], tmp_path / name, start or name)


def run(jobs, places, stop=lambda: False):
    ended = {}
    work(jobs, places, stop, lambda job, code, seconds: ended.update({job.name: code}))
    return ended


@PINNED
@pytest.mark.parametrize("cores, threads, processes, expected", [
    (8, 1, 0, [{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}]),
    (8, 3, 0, [{0, 1, 2}, {3, 4, 5}]),
    (8, 2, 2, [{0, 1}, {2, 3}]),
    (2, 4, 0, [set()]),
    (2, 1, 3, [set(), set(), set()]),
])  # fmt: skip
def test_no_two_runs_have_a_core_in_common(monkeypatch, cores, threads, processes, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert slots(processes, threads) == expected


@PINNED
def test_a_run_has_the_cores_of_its_place_and_we_keep_ours(tmp_path):
    before = os.sched_getaffinity(0)
    core = max(before)
    code = "import os; print(os.sched_getaffinity(0))"
    assert run([job(tmp_path, "a", code)], [frozenset({core})]) == {"a": 0}
    assert (tmp_path / "a" / "output.txt").read_text().strip() == str({core})
    assert os.sched_getaffinity(0) == before


def test_every_job_ends_once_with_its_own_code(tmp_path):
    jobs = [job(tmp_path, f"j{code}", f"import sys; sys.exit({code})") for code in range(5)]
    assert run(jobs, [frozenset()] * 2) == {f"j{code}": code for code in range(5)}


def test_one_job_of_a_start_makes_it_and_the_others_wait_for_that_only(tmp_path):
    """The second of a start may begin while the first still runs, but not before that has its SFT model."""
    made, seen = tmp_path / "first" / "phases" / "sft" / "manifest.json", tmp_path / "seen"
    first = (
        f"import os, time\ntime.sleep(0.3)\nos.makedirs({str(made.parent)!r})\nopen({str(made)!r}, 'w')\n"
        f"for _ in range(1000):\n  if os.path.exists({str(seen)!r}): break\n  time.sleep(0.01)\nelse: os._exit(1)"
    )
    second = f"import os\nassert os.path.exists({str(made)!r})\nopen({str(seen)!r}, 'w')"
    other = f"import os\nassert not os.path.exists({str(made)!r})"
    jobs = [
        job(tmp_path, "first", first, "s"),
        job(tmp_path, "second", second, "s"),
        job(tmp_path, "other", other, "t"),
    ]
    assert run(jobs, [frozenset()] * 2) == {"first": 0, "second": 0, "other": 0}


def test_a_stop_is_passed_on_and_waited_for_and_nothing_else_begins(tmp_path):
    code = (
        "import signal, sys, time, pathlib\n"
        "def leave(*_): time.sleep(0.2); pathlib.Path(sys.argv[1]).touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "pathlib.Path(sys.argv[1] + '.ready').touch()\n"
        "time.sleep(60)"
    )
    jobs = [job(tmp_path, name, code) for name in "abc"]
    jobs = [Job(j.name, [*j.command, str(tmp_path / f"{j.name}.saved")], j.workdir, j.start) for j in jobs]
    ready = [tmp_path / "a.saved.ready", tmp_path / "b.saved.ready"]
    ended = run(jobs, [frozenset()] * 2, stop=lambda: all(path.exists() for path in ready))
    assert ended == {"a": 75, "b": 75}
    assert (tmp_path / "a.saved").exists()
    assert not (tmp_path / "c").exists()


def test_what_runs_is_ended_when_we_fail(tmp_path):
    def stop():
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt
        return False

    code = (
        f"import os, time, pathlib; p = pathlib.Path({str(tmp_path / 'pid.tmp')!r}); p.write_text(str(os.getpid())); "
    )
    code += f"p.rename({str(tmp_path / 'pid')!r}); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run([job(tmp_path, "a", code)], [frozenset()], stop)
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    "text, line",
    [
        ("x\nerror: no pair is left\n(--traceback shows where)\n", "error: no pair is left"),
        ("Traceback\nMemoryError\n\n", "MemoryError"),
        ("", "it said nothing"),
    ],
)
def test_the_last_line_is_the_error_where_there_is_one(tmp_path, text, line):
    pathlib.Path(tmp_path / pool.OUTPUT).write_text(text)
    assert pool.last_line(tmp_path) == line
