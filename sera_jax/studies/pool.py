"""Runs as processes, a few at a time, each on cores of its own."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from sera_jax import processor

OUTPUT = "output.txt"  # in a run's work directory: what it printed
_START_MADE = pathlib.Path("phases", "sft", "manifest.json")
_LOOK_SECONDS = 0.1

Cores = frozenset[int]  # empty: wherever the system puts it


@dataclasses.dataclass(frozen=True)
class Job:
    """A process to run.

    Attributes:
        start: jobs with the same one share the phases up to the SFT model, so one of them makes these first.
        environment: variables that it gets unless they are set already.
    """

    name: str
    command: Sequence[str]
    workdir: pathlib.Path
    start: str
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


def slots(processes: int, threads: int) -> list[Cores]:
    """The cores of each of the processes that run at a time; 0 processes: as many as there are cores for.

    Where there are not cores enough, or the system pins no process, none is pinned.
    """
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    count = processes or max(1, processor.cores() // threads)
    if count * threads > len(here):
        return [frozenset()] * count
    return [frozenset(here[i * threads : (i + 1) * threads]) for i in range(count)]


def work(
    jobs: Sequence[Job],
    places: Sequence[Cores],
    stop_requested: Callable[[], bool],
    ended: Callable[[Job, int, float], None],
) -> None:
    """Run the jobs in their order, one at a time in each place, until all have ended or a stop is asked for.

    A stop sends SIGTERM to what runs and waits for it; whatever ends this function ends what it started.

    Args:
        ended: called with each job that ended, its exit code (minus the signal that killed it) and its seconds.
    """
    waiting, free, running = list(jobs), list(places), {}
    stopping = False
    try:
        while running or (waiting and not stopping):
            if stop_requested() and not stopping:
                stopping = True
                for process in running:
                    _send(process, signal.SIGTERM)
            while free and not stopping and (job := next(_ready(waiting, [job for job, *_ in running.values()]), None)):
                waiting.remove(job)
                place = free.pop(0)
                running[_begin(job, place)] = (job, place, time.monotonic())
            time.sleep(_LOOK_SECONDS)
            for process in [process for process in running if process.poll() is not None]:
                job, place, began = running.pop(process)
                free.append(place)
                ended(job, process.returncode, time.monotonic() - began)
    finally:
        for process in running:
            _send(process, signal.SIGKILL)
            process.wait()


def last_line(workdir: pathlib.Path) -> str:
    """What a run that failed said last: its error, or its last line."""
    try:
        text = (workdir / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "it said nothing"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])


def _ready(waiting: Sequence[Job], running: Sequence[Job]) -> Iterator[Job]:
    """The jobs that may begin: all but those whose start a running job is still making."""
    making = {job.start for job in running if not (job.workdir / _START_MADE).exists()}
    return (job for job in waiting if job.start not in making)


def _begin(job: Job, cores: Cores) -> subprocess.Popen:
    """Start the job on these cores, in a session of its own: what is typed at the terminal reaches it through us."""
    job.workdir.mkdir(parents=True, exist_ok=True)
    before = os.sched_getaffinity(0) if cores else set()
    with (job.workdir / OUTPUT).open("w") as output:
        if cores:
            os.sched_setaffinity(0, cores)  # a child inherits it
        try:
            return subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**job.environment, **os.environ},
            )
        finally:
            if cores:
                os.sched_setaffinity(0, before)


def _send(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)
