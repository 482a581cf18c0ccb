"""Whose a work directory is: whether it holds results, and which process is at work in it."""

from __future__ import annotations

import errno
import fcntl
import pathlib
from typing import Any

ADDRESSED = "corpus"  # below phases/: what is found by what it was made from, and is no config's
METRICS = "metrics.jsonl"  # its lines follow log.logging_steps, which is no part of what a run is


class StaleWorkdir(ValueError):
    """The work directory holds results of another configuration or of other inputs."""


def lock(root: pathlib.Path) -> Any:
    """Hold the work directory for this process; the operating system lets go of it when the process ends, however."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = (root / "lock").open("w")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ValueError(
            f"config.workdir={str(root)!r} is no folder that can be written ({error}); choose another --config.workdir"
        ) from error
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise StaleWorkdir(
            f"{root} is in use by another process; wait for it, stop it, or choose another --config.workdir"
        ) from None
    except OSError:
        pass  # a mounted bucket may know no locks
    return held


def has_results(root: pathlib.Path) -> bool:
    """Whether anything was made there: a run that is refused before leaves the folder free for another."""
    folders = (path for name in ("phases", "checkpoints") for path in (root / name).glob("*"))
    made = any(path.name != ADDRESSED for path in folders)
    metrics = root / METRICS
    return made or (metrics.exists() and metrics.stat().st_size > 0)
