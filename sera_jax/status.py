"""`python -m sera_jax.status RUN`: where each process of a run of several is, and which one the others wait for.

RUN is the work directory, or the folder that --progress_dir named. Exit codes: 0 all get on, or have ended; 2 there is
nothing to read; 3 some are silent, and named. With --watch it looks until some are silent or all have ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import socket
import sys
import time
from collections.abc import Sequence

from sera_jax import stamps
from sera_jax.stamps import Stamp
from sera_jax.stop import EXIT_REFUSED

EXIT_SILENT = 3  # a Python that broke ends with 1
_LOOK_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, print the table, or watch."""
    args = _parser().parse_args(argv)
    root = pathlib.Path(args.run)
    folder = root / stamps.FOLDER if (root / stamps.FOLDER).is_dir() else root
    if args.watch:
        return _watch(folder, args.processes, args.silent_seconds)
    found = _read(folder)
    if not found:
        print(f"error: no process has left a sign of life in {folder}: only those of several do", file=sys.stderr)
        return EXIT_REFUSED
    print(table(found, time.time()))
    return _named(found, args.silent_seconds)


def _watch(folder: pathlib.Path, processes: int, seconds: float) -> int:
    began = time.time()
    while True:
        found = {stamp.process: stamp for stamp in _read(folder)}
        unseen = [Stamp(index, processes, moved=began) for index in range(processes) if index not in found]
        every = [*found.values(), *unseen]
        if every and all(stamp.ended for stamp in every):
            return 0
        if code := _named(every, seconds):
            return code
        time.sleep(_LOOK_SECONDS)


def _read(folder: pathlib.Path) -> list[Stamp]:
    """The stamps; of this host's processes, those that are no more have ended, though they did not say so."""
    here = socket.gethostname()
    return [
        dataclasses.replace(one, ended=one.ended or (one.host == here and not _is_there(one.pid)))
        for one in stamps.read(folder)
    ]


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _named(found: Sequence[Stamp], seconds: float) -> int:
    """Say which ones are silent."""
    now = time.time()
    if still := stamps.silent(found, now, seconds):
        print(stamps.in_words(still, now), file=sys.stderr, flush=True)
    return EXIT_SILENT if still else 0


def table(found: Sequence[Stamp], now: float) -> str:
    """A line for each process; seconds since it wrote, and since it got anywhere."""
    rows = [("process", "host", "pid", "wrote", "moved", "step", "in", "at")]
    for one in found:
        moved = "ended" if one.ended else f"{now - one.moved:.0f} s"
        wrote = f"{now - one.time:.0f} s"
        rows.append((f"{one.process}", one.host, f"{one.pid}", wrote, moved, f"{one.step}", one.phase, one.at))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sera_jax.status", description="Where the processes of a run are.", allow_abbrev=False
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="work directory of a run of several processes, or its --progress_dir")
    add(
        "--silent_seconds",
        type=float,
        default=stamps.SILENT_SECONDS,
        help="one that got nowhere for so long, and compiled nothing, is silent",
    )
    add("--watch", action="store_true", help="look until some are silent or all have ended")
    add("--processes", type=int, default=0, help="with --watch: how many there should be")
    return parser


if __name__ == "__main__":
    sys.exit(main())
