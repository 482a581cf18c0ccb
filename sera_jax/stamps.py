"""Signs of life of a run of several processes: each keeps a small file, `process-3.json`, that says where it is.

The main thread says when it gets anywhere, which costs it a few assignments; a thread beside it writes the file every
few seconds. So a stamp tells three things apart. A process that is frozen, or gone, leaves an old `time`. One whose
main thread waits for something that does not come still writes, with an old `moved`, and `at` says in which line. A
compilation may take minutes in which the main thread says nothing; JAX says when one begins and ends, and while one is
under way `moved` is now.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from sera_jax import whole

SECONDS = 5.0  # between two stamps
SILENT_SECONDS = 600.0  # longer than anything that says nothing is known to take
FOLDER = "progress"  # in the work directory
_PACKAGE = pathlib.Path(__file__).parent
_NAMED = 3  # processes that a line names


@dataclasses.dataclass
class Stamp:
    """What a process last said of itself.

    Attributes:
        time, moved: seconds since 1970 by its host's clock: when it wrote this, and when it last got anywhere.
        phase, step: where in the run it is.
        turn: how many of the points that all processes come to in one order it has come to: who hangs has fewer than
            those who wait for it, or as many.
        at: the line of this package that its main thread is in.
        ended: whether it left by itself, with whatever exit code.
    """

    process: int
    processes: int
    host: str = ""
    pid: int = 0
    time: float = 0.0
    moved: float = 0.0
    phase: str = ""
    step: int = 0
    turn: int = 0
    at: str = ""
    ended: bool = False


_now = Stamp(0, 1)  # of this process
_compiling: set[int] = set()  # threads


def moved(*, phase: str | None = None, step: int | None = None, turn: bool = False) -> None:
    """Say that the main thread got somewhere: to a phase, to a step, to where all processes come (`turn`)."""
    if phase is not None:
        _now.phase, _now.step = phase, 0
    if step is not None:
        _now.step = step
    _now.turn += turn
    _now.moved = time.time()


def compiles(begins: bool) -> None:
    """A compilation begins, or ends, in the thread that calls this."""
    (_compiling.add if begins else _compiling.discard)(threading.get_ident())
    _now.moved = time.time()


@contextlib.contextmanager
def kept(folder: pathlib.Path, process: int, processes: int, *, seconds: float = SECONDS) -> Iterator[None]:
    """Within, this process keeps its stamp in the folder; one of several, since a lone one needs no sign of life.

    A folder that cannot be written is said once, and changes nothing.
    """
    if processes == 1:
        yield
        return
    _now.process, _now.processes, _now.host, _now.pid = process, processes, socket.gethostname(), os.getpid()
    moved()
    main, end = threading.get_ident(), threading.Event()

    def write() -> None:
        _now.time = time.time()
        if _compiling:
            _now.moved = _now.time
        _now.at = _line_of(main)
        _write(folder / f"process-{process}.json", json.dumps(dataclasses.asdict(_now)))

    def go_on() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write()
            while not end.wait(seconds):
                write()
            _now.ended = True
            write()
        except OSError as error:
            print(f"warning: no more signs of life in {folder} ({error})", file=sys.stderr, flush=True)

    _now.ended = False
    thread = threading.Thread(target=go_on, name="stamps", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join(timeout=seconds)  # no longer: the file system may be what hangs


def read(folder: pathlib.Path) -> list[Stamp]:
    """The stamps in the folder, of the job that wrote the newest one; those that cannot be read are left out."""
    found = []
    for path in folder.glob("process-*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Stamp(**json.loads(path.read_text())))
    newest = max(found, key=lambda stamp: stamp.time, default=None)
    ours = [stamp for stamp in found if newest and stamp.processes == newest.processes]
    return sorted(ours, key=lambda stamp: stamp.process)


def silent(stamps: Sequence[Stamp], now: float, seconds: float) -> list[Stamp]:
    """Of those that got nowhere for so long, the ones that are furthest behind: the others wait for them."""
    still = [stamp for stamp in stamps if not stamp.ended and now - stamp.moved > seconds]
    gone = [stamp for stamp in still if _is_frozen(stamp, now)]
    behind = min((stamp.turn for stamp in still), default=0)
    return gone or [stamp for stamp in still if stamp.turn == behind]


def in_words(found: Sequence[Stamp], now: float) -> str:
    """The silent ones in one line."""
    words = [_in_words(stamp, now) for stamp in found[:_NAMED]]
    return "; ".join(words + [f"{len(found) - _NAMED} more"] * (len(found) > _NAMED))


def _in_words(stamp: Stamp, now: float) -> str:
    who = f"process {stamp.process} of {stamp.processes}"
    if not stamp.pid:
        return f"{who} gave no sign of life for {now - stamp.moved:.0f} s since it was started"
    did, since = ("is alive but got nowhere", stamp.moved)
    if _is_frozen(stamp, now):
        did, since = "gave no sign of life", stamp.time
    return (
        f"{who} ({stamp.host}, pid {stamp.pid}) {did} for {now - since:.0f} s, in {stamp.phase or 'the start'} at step "
        f"{stamp.step} ({stamp.at or 'outside of the package'})"
    )


def _is_frozen(stamp: Stamp, now: float) -> bool:
    """Of one that has got nowhere for long: whether it stopped writing when it stopped moving."""
    return now - stamp.time > (now - stamp.moved) / 2


def _line_of(thread: int) -> str:
    """The innermost line of this package that a thread is in, as `loops/optimise.py:88`."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _write(path: pathlib.Path, text: str) -> None:
    torn = path.with_name(path.name + ".tmp")
    torn.write_text(text)  # not brought to the disk: it is of the moment
    whole.appear(torn, path)
