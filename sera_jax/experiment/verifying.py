"""Reads a whole work directory and says what is no longer as it was written; writes nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sera_jax import config as config_lib
from sera_jax.checkpoint import StaleWorkdir, outputs, pieces, verify
from sera_jax.checkpoint.papers import plain
from sera_jax.checkpoint.phases import DIGESTS, check_config
from sera_jax.config import Config
from sera_jax.experiment.saved import load_description
from sera_jax.loops.runtime import Preempted
from sera_jax.writer import METRICS, digest_of_lines, key_of, read_records, without_clock

# What a finished run leaves beside phases and checkpoints.
OUTPUTS = (
    "config.json",
    "versions.json",
    "model.json",
    "tokenizer",
    "model_folders.json",
    "hub.json",
    METRICS,
    "tensorboard",
    "summary.json",
    "report.png",
    "generations.jsonl",
    "rollouts",
    "data",
    "huggingface",
)
_WRITTEN_ONCE = (METRICS, "tensorboard", "rollouts")


def damages(config: Config, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[str]:
    """A line on each thing in the work directory of `config` that is not what was written, with the way out. Until the
    last, no run can begin in it.

    Args:
        stop_requested: asked between phases and checkpoints.

    Raises:
        ValueError: there is no work directory, it is that of another config, or a process is at work in it.
        Preempted: stopped on request.
    """
    root = pathlib.Path(config.workdir)
    if not (root / "config.json").is_file():
        raise ValueError(
            f"config.workdir={config.workdir!r} holds no config.json of a run, so there is nothing to verify"
        )
    with _held(root):
        there = {name: value for name, value in config_lib.to_dict(config).items() if name != "workdir"}
        check_config(root, plain(there))
        yield from verify.strays(root)
        sound: tuple[list[pathlib.Path], ...] = ([], [], [])
        looked_at = (
            (verify.phases, verify.damages_of_phase),
            (verify.checkpoints, verify.damages_of_checkpoint),
            (pieces.files, pieces.damages_of_piece),
        )
        for (folders, damages_of), good in zip(looked_at, sound, strict=True):
            for folder in folders(root):
                if stop_requested():
                    raise Preempted("stopped while verifying; nothing was changed, the same command verifies it anew")
                yield from (found := list(damages_of(folder)))
                good += [] if found else [folder]
        yield from _damaged_lines(root, *sound[:2])
        yield from outputs.damages(root, _WRITTEN_ONCE)
        if not (root / DIGESTS).exists():  # not finished, or under way again
            yield from _damaged_description(root)
            yield from _unreadable(root)


def counted(config: Config) -> str:
    """How much there is to verify, in words."""
    root = pathlib.Path(config.workdir)
    return f"{len(verify.phases(root))} phases and {len(verify.checkpoints(root))} checkpoints"


@contextlib.contextmanager
def _held(root: pathlib.Path) -> Iterator[None]:
    """Nobody writes there meanwhile, others may read. Raises StaleWorkdir where a process is at work in it."""
    with contextlib.ExitStack() as stack:
        try:
            fcntl.lockf(stack.enter_context((root / "lock").open("rb")), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise StaleWorkdir(
                f"{root} is in use by another process; wait for it, or stop it, and verify it then"
            ) from None
        except OSError:
            pass  # no lock, or a mounted bucket that knows none
        yield


def _damaged_lines(
    root: pathlib.Path, phases: Sequence[pathlib.Path], checkpoints: Sequence[pathlib.Path]
) -> Iterator[str]:
    """Of metrics.jsonl, against the lines, or the digests of lines, that sound phases and checkpoints hold."""
    try:
        records, _ = read_records(root / METRICS)
    except ValueError as error:
        yield str(error)
        return
    spans: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        spans.setdefault(key_of(record), []).append(without_clock(record))
    for folder in phases:
        own, _ = read_records(folder / METRICS)
        if own and spans.get(key_of(own[0])) != own:
            yield (
                f"{root / METRICS} no longer has the lines of {folder.relative_to(root / 'phases')} as they were "
                f"written; {folder / METRICS}, from which the summary is made, has"
            )
    for folder in checkpoints:
        notes = verify.read_item(folder, "notes")
        before = [line for line in spans.get(tuple(notes["span"]), []) if line["step"] <= int(folder.name)]
        if digest_of_lines(before) != notes["lines"]:
            yield (
                f"{root / METRICS} no longer has the lines that came before {folder} as they were written; delete "
                f"{folder.parent} and start the same command again, which does that phase anew"
            )


def _damaged_description(root: pathlib.Path) -> Iterator[str]:
    try:
        if (root / "model.json").exists():
            load_description(root)
    except ValueError as error:
        yield str(error)


def _unreadable(root: pathlib.Path) -> Iterator[str]:
    """Of the JSON that no digest covers, as long as a run is not finished: what is not JSON."""
    for name in OUTPUTS:
        for path in (root / name, *sorted((root / name).rglob("*"))):
            lines = path.suffix == ".jsonl" and path.name != METRICS
            if path.is_file() and (lines or path.suffix == ".json"):
                try:
                    text = path.read_text(encoding="utf-8")
                    # other ends of lines that Unicode knows may stand within a text
                    for part in filter(None, text.split("\n")) if lines else [text]:
                        json.loads(part)
                except ValueError as error:
                    yield f"{path} cannot be read ({error}); delete it and start the same command again"
