"""Signs of life: what a stamp says of a process that gets on, one that is stuck and one that is gone; who is named."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from sera_jax import compiling, hosts, stamps, status
from sera_jax.stamps import Stamp

NOW = 10_000.0


def stamp(process, *, wrote=1.0, moved=1.0, **fields):
    """Of one of three, which wrote and moved so many seconds ago."""
    return Stamp(process, 3, "host", 100 + process, NOW - wrote, NOW - moved, **fields)


def named(*found, seconds=60.0):
    return [one.process for one in stamps.silent(found, NOW, seconds)]


def until(there):
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def fresh(monkeypatch):
    """A process that has said nothing of itself yet."""
    monkeypatch.setattr(stamps, "_now", Stamp(0, 1))
    monkeypatch.setattr(stamps, "_compiling", set())


def test_nobody_is_silent_where_all_get_on_or_have_ended():
    assert named(stamp(0), stamp(1, moved=59.0), stamp(2, moved=900.0, wrote=900.0, ended=True)) == []


def test_the_one_that_the_others_wait_for_is_named():
    stuck = {"moved": 70.0, "turn": 8}
    assert named(stamp(0, moved=65.0, turn=9), stamp(1, **stuck), stamp(2, moved=65.0, turn=9)) == [1]
    assert named(stamp(0, moved=65.0, turn=8), stamp(1, **stuck), stamp(2)) == [0, 1], "nothing tells them apart"


def test_one_that_no_longer_writes_is_named_before_those_that_wait():
    assert named(stamp(0, moved=70.0, turn=8), stamp(1, moved=70.0, wrote=69.0, turn=9), stamp(2, moved=70.0)) == [1]


def test_a_line_says_who_where_and_in_what_way():
    stuck = stamp(1, moved=70.0, phase="the SFT model", step=12, at="data/batches.py:40")
    words = "process 1 of 3 (host, pid 101) {} for 7{} s, in the SFT model at step 12 (data/batches.py:40)"
    assert stamps.in_words([stuck], NOW) == words.format("is alive but got nowhere", 0)
    frozen = dataclasses.replace(stuck, time=NOW - 71.0, moved=NOW - 74.0)
    assert stamps.in_words([frozen], NOW) == words.format("gave no sign of life", 1)
    assert stamps.in_words([Stamp(2, 3, moved=NOW - 70)], NOW).endswith(
        "2 of 3 gave no sign of life for 70 s since it was started"
    )
    assert stamps.in_words([stuck] * 5, NOW).endswith("; 2 more")


def test_a_process_that_is_stuck_still_writes_and_says_in_which_line(fresh, tmp_path):
    with stamps.kept(tmp_path / "progress", 1, 2, seconds=0.01):
        stamps.moved(phase="the SFT model", step=3, turn=True)
        before = time.time()
        until(lambda: stamps.read(tmp_path / "progress") and stamps.read(tmp_path / "progress")[0].time > before + 0.05)
        (found,) = stamps.read(tmp_path / "progress")
        assert (found.process, found.processes, found.phase, found.step, found.turn) == (1, 2, "the SFT model", 3, 1)
        assert found.moved <= before < found.time and not found.ended
    (found,) = stamps.read(tmp_path / "progress")
    assert found.ended
    assert [path.name for path in (tmp_path / "progress").iterdir()] == ["process-1.json"]


def test_the_line_is_the_innermost_one_of_the_package(monkeypatch):
    inside, go = threading.Event(), threading.Event()

    def wait():
        inside.set()
        go.wait()
        return True

    thread = threading.Thread(target=lambda: hosts.on_first(wait))
    thread.start()
    inside.wait()
    try:
        file, line = stamps._line_of(thread.ident).split(":")
    finally:
        go.set()
        thread.join()
    source = pathlib.Path(hosts.__file__).read_text().splitlines()
    assert file == "hosts.py" and "act()" in source[int(line) - 1]


def test_while_a_program_compiles_the_process_gets_on(fresh, tmp_path):
    """It is JAX's own events that are listened to: a program that takes long to trace, its compilation longer."""
    from jax import monitoring

    folder = tmp_path / "progress"
    with compiling.said(print, after_seconds=60), stamps.kept(folder, 0, 2, seconds=0.01):
        monitoring.record_scalar(compiling.COMPILATION, 0.0, fun_name="f")
        before = time.time()
        until(lambda: stamps.read(folder) and stamps.read(folder)[0].moved > before + 0.05)
        monitoring.record_event_duration_secs(compiling.COMPILATION, 0.1, fun_name="f")
        after = time.time()
        until(lambda: stamps.read(folder)[0].time > after + 0.05)
        assert stamps.read(folder)[0].moved <= after


def test_a_lone_process_leaves_no_sign(tmp_path):
    with stamps.kept(tmp_path / "progress", 0, 1):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_once_and_changes_nothing(fresh, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with stamps.kept(tmp_path / "file", 0, 2, seconds=0.001):
        until(lambda: not any(thread.name == "stamps" for thread in threading.enumerate()))
    assert capsys.readouterr().err.count("warning: no more signs of life in") == 1


def test_where_nothing_can_be_renamed_a_stamp_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no such operation")))
    stamps._write(tmp_path / "process-0.json", "{}")
    assert (tmp_path / "process-0.json").read_text() == "{}"


def write(folder, *found):
    folder.mkdir(exist_ok=True)
    for one in found:
        (folder / f"process-{one.process}.json").write_text(json.dumps(dataclasses.asdict(one)))


def test_stamps_of_an_earlier_job_of_another_size_are_not_read(tmp_path):
    write(tmp_path, stamp(0), stamp(1), dataclasses.replace(stamp(2, wrote=500.0), processes=4))
    (tmp_path / "process-7.json").write_text('{"torn')
    assert [one.process for one in stamps.read(tmp_path)] == [0, 1]


def test_a_process_of_this_host_that_is_no_more_has_ended(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for host, pid, code in (
        (socket.gethostname(), gone.stdout, 0),
        (socket.gethostname(), os.getpid(), 3),
        ("h", 1, 3),
    ):
        write(tmp_path, Stamp(0, 2, host, int(pid)))
        assert status.main([str(tmp_path)]) == code


@pytest.fixture
def now(monkeypatch):
    monkeypatch.setattr(status.time, "time", lambda: NOW)


def test_the_command_prints_a_table_and_names_the_silent_one(tmp_path, now, capsys):
    found = [stamp(0), stamp(1, moved=700.0, phase="the SFT model", step=12), stamp(2, ended=True)]
    write(tmp_path / "progress", *found)
    assert status.main([str(tmp_path)]) == 3
    out, err = capsys.readouterr()
    assert [line.split()[:6] for line in out.splitlines()] == [
        ["process", "host", "pid", "wrote", "moved", "step"],
        ["0", "host", "100", "1", "s", "1"],
        ["1", "host", "101", "1", "s", "700"],
        ["2", "host", "102", "1", "s", "ended"],
    ]
    assert "process 1 of 3 (host, pid 101) is alive but got nowhere for 700 s" in err and len(err.splitlines()) == 1
    assert status.main([str(tmp_path / "progress"), "--silent_seconds=800"]) == 0
    assert status.main([str(tmp_path / "elsewhere")]) == 2


def test_watching_ends_when_all_have_ended_or_one_was_never_seen(tmp_path, monkeypatch, capsys):
    write(tmp_path, stamp(0, ended=True), stamp(1, ended=True))
    assert status.main([str(tmp_path), "--watch", "--processes=2"]) == 0
    moments = iter([NOW, NOW, NOW + 61])
    monkeypatch.setattr(status.time, "time", lambda: next(moments))
    monkeypatch.setattr(status.time, "sleep", lambda _: None)
    assert status.main([str(tmp_path), "--watch", "--processes=3", "--silent_seconds=60"]) == 3
    assert "process 2 of 3 gave no sign of life for 61 s" in capsys.readouterr().err
