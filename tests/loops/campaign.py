"""Runs that are killed at random moments again and again until they finish, and the table of what became of them."""

import collections
import dataclasses
import itertools
import pathlib
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable

from tests.loops.kills import Start, finish

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
SAME = "same bytes"
# Before the process hears SIGTERM, it dies of it (-15); nothing is done by then. A tenth of a second where idle.
HEARD_SECONDS = 2.0
TRAINING = re.compile(r"pretrain|sft|round\d+|\w+/(round|iteration)\d+")
MOMENTS = ("start", "training", "sampling, scoring, data", "between phases")


@dataclasses.dataclass
class Kill:
    """One signal that ended a process.

    Attributes:
        run: of which run, by number. after: seconds from the process's start.
        phase: what was under way; "start" before the process began a phase, "between phases" after.
        code: the exit code. outcome: what the run ended in: `SAME`, or what went wrong.
    """

    run: int
    signal: str
    after: float
    phase: str
    code: int
    outcome: str = ""

    @property
    def moment(self) -> str:
        """One of `MOMENTS`."""
        if self.phase in MOMENTS:
            return self.phase
        return "training" if TRAINING.fullmatch(self.phase) else "sampling, scoring, data"


def under_way(workdir: pathlib.Path, begun: float) -> str:
    """The phase that a process which started at `begun` (s since the epoch) works on."""
    found = {}
    for path in (workdir / "phases").rglob("*"):
        try:
            found[path] = path.stat().st_mtime
        except FileNotFoundError:  # renamed or removed while we looked
            continue
    ours = [path for path, changed in found.items() if changed >= begun]
    unfinished = [path for path in ours if path.suffix == ".partial"]
    if unfinished:
        newest = max(unfinished, key=lambda path: found[path])
        return str(newest.relative_to(workdir / "phases").with_suffix(""))
    return "between phases" if ours else "start"


def torn(start_in: Start, workdir: pathlib.Path, seconds: float, draw: random.Random, most: int) -> Iterable[Kill]:
    """Kill the run in `workdir` until it finishes, or `most` times: then it goes on undisturbed.

    Args:
        seconds: how long an undisturbed run takes; each process has its signal uniformly within, from its start.

    Raises:
        AssertionError: a process ended otherwise than it should.
    """
    for kills in itertools.count():
        number, delay = draw.choice(SIGNALS), draw.uniform(0, seconds)
        begun = time.time()
        process = start_in(workdir)
        phase = signalled_after(process, delay, number, workdir, begun) if kills < most else ""
        code, err = finish(process)
        if code == 0:  # also where the signal came after the last step that can be stopped
            return
        expected = {-signal.SIGKILL} if number == signal.SIGKILL else {75}
        if number == signal.SIGTERM and delay < HEARD_SECONDS:
            expected.add(-signal.SIGTERM)
        yield Kill(0, number.name, round(delay, 2), phase, code)
        assert phase and code in expected, f"exit code {code} after {number.name}: {err[-1000:]}"


def signalled_after(
    process: subprocess.Popen, delay: float, number: signal.Signals, workdir: pathlib.Path, begun: float
) -> str:
    """Send the signal after so many seconds; the phase that was under way, or "" where the process ended before."""
    try:
        process.wait(timeout=delay)  # what it says in so short a time does not fill its pipes
    except subprocess.TimeoutExpired:
        phase = under_way(workdir, begun)
        process.send_signal(number)
        return phase
    return ""


def campaign(
    start_in: Start, check: Callable[[pathlib.Path], None], folder: pathlib.Path, seconds: float, seed: str, count: int
) -> list[Kill]:
    """`count` kills over as many runs as it takes; a run that went wrong is left in `folder`.

    Args:
        check: raises AssertionError where the work directory of a finished run is not as it should be.
    """
    draw, kills, run = random.Random(seed), [], 0
    while len(kills) < count:
        run, workdir, ours, outcome = run + 1, folder / str(run + 1), [], SAME
        try:
            for kill in torn(start_in, workdir, seconds, draw, count - len(kills)):
                ours.append(kill)
            check(workdir)
        except (AssertionError, ValueError, OSError, subprocess.TimeoutExpired) as error:
            outcome = f"{type(error).__name__}: {error}"[:2000]
        kills += [dataclasses.replace(kill, run=run, outcome=outcome) for kill in ours]
        print(f"{seed}: run {run}, {len(ours)} kills, {outcome}", flush=True)
        assert ours or outcome == SAME, outcome  # or nothing would be counted, for ever
    return kills


HEADINGS = ("run", *(number.name for number in SIGNALS), *MOMENTS, "ended in the same bytes")


def row(name: str, kills: list[Kill]) -> tuple:
    """The table's row, under `HEADINGS`: how many kills of each kind, by the moment they fell into."""
    by = collections.Counter([kill.signal for kill in kills] + [kill.moment for kill in kills])
    same = sum(kill.outcome == SAME for kill in kills)
    return (name, *(by[heading] for heading in HEADINGS[1:-1]), f"{same} of {len(kills)}")


def table(rows: Iterable[tuple]) -> str:
    """Rows under `HEADINGS`, as Markdown."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
