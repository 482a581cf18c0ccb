"""Damage to the files of a work directory, one at a time, and what became of the run."""

import json
import pathlib
import random
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import pytest

from sera_jax import experiment, main
from sera_jax.config import Config
from sera_jax.experiment import methods
from sera_jax.loops.runtime import Preempted, Runtime
from sera_jax.mesh import make_mesh
from tests.loops.flags import set_flags

# The kind of a file, by the first pattern that its path in the work directory matches.
KINDS = {
    "checkpoint: arrays": r"checkpoints/.*/state/.*(ocdbt|/d/)",
    "checkpoint: checksums, inputs, notes": r"checkpoints/.*/(sums|inputs|notes)/metadata",
    "checkpoint: orbax's own": r"checkpoints/",
    "phase: arrays": r"phases/.*/arrays/.*(ocdbt|/d/)",
    "phase: about arrays": r"phases/.*/arrays/",
    "phase: checksums.json": r"phases/.*checksums\.json",
    "phase: manifest.json": r"phases/.*manifest\.json",
    "phase: metrics.jsonl": r"phases/.*metrics\.jsonl",
    "phase: data and tokenizer": r"phases/world/",
    "phase: corpus": r"phases/corpus/",
    "phase: scores": r"phases/.*\.npy",
    "phase: samples, pairs, costs": r"phases/",
    "metrics.jsonl": r"metrics\.jsonl",
    "config.json": r"config\.json",
    "model.json": r"model\.json",
    "versions.json": r"versions\.json",
    "digests.json": r"digests\.json",
    "tokenizer": r"tokenizer/",
    "summary.json": r"summary\.json",
    "generations, rollouts": r"(generations\.jsonl|rollouts/)",
    "reports on data": r"data/",
    "export": r"huggingface/",
}
FACTS = ("params_sha256", "arms", "rounds", "iterations", "prompts")  # of a summary: what a run found out
OUTCOMES = ("refused", "by --verify", "harmless", "OTHER", "CRASH")


class Outcome(NamedTuple):
    """What became of a damaged work directory; `said` is the line that named the damage."""

    found: str
    said: str = ""


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), "")


def files_by_kind(workdir: pathlib.Path) -> dict[str, list[str]]:
    """Every file but the empty lock."""
    found: dict[str, list[str]] = {}
    for path in sorted(workdir.rglob("*")):
        if path.is_file() and path.stat().st_size:
            name = str(path.relative_to(workdir))
            found.setdefault(kind_of(name), []).append(name)
    assert "" not in found, found[""]
    return found


def flip(path: pathlib.Path, rng: random.Random) -> str:
    """One bit, anywhere."""
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))
    return f"bit {bit} of byte {place}"


def shorten(path: pathlib.Path, rng: random.Random) -> str:
    how = rng.choice(["cut", "emptied", "removed"])
    data = path.read_bytes()
    path.unlink()
    if how != "removed":
        path.write_bytes(data[: rng.randrange(1, len(data))] if how == "cut" and len(data) > 1 else b"")
    return how


def one_device(*_: Any) -> Any:
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


_COMPILED: dict[Any, dict[tuple, Any]] = {}


def _share_programs(run: Runtime) -> None:
    """As `Runtime.__post_init__`, but runs of one shape compile nothing again."""
    _POST_INIT(run)
    run._compiled = _COMPILED.setdefault((run.cfg, run.chunk_tokens), run._compiled)


_POST_INIT = Runtime.__post_init__


def command(config: Config, *asked: str, stop_requested: Callable[[], bool] = lambda: False) -> int:
    """The command in this process, on one device: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_mesh", one_device)
        patch.setattr(Runtime, "__post_init__", _share_programs)
        patch.setattr(methods, "parse", lambda raw: config)
        set_flags(patch, **dict.fromkeys(asked, True))
        try:
            main.main(["main"], stop_requested=stop_requested)
        except SystemExit as ended:
            return int(str(ended.code))
    return 0


def interrupted(config: Config, checkpoint: str) -> None:
    """A run that is stopped as soon as it has this checkpoint."""
    saved = pathlib.Path(config.workdir) / "checkpoints" / checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_mesh", one_device)
        with pytest.raises(Preempted):
            experiment.run(config, stop_requested=saved.exists)


def facts(workdir: pathlib.Path) -> dict[str, Any]:
    summary = json.loads((workdir / "summary.json").read_text())
    return {name: summary.get(name) for name in FACTS}


def outcome(config: Config, expected: dict[str, Any], capture: Any) -> Outcome:
    """Verify the work directory of `config`, then start its command."""
    workdir = pathlib.Path(config.workdir)
    capture.readouterr()
    try:
        damaged = command(config, "verify")
        told = capture.readouterr()
        if damaged not in (0, 2) or "Traceback" in told.err:
            return Outcome("CRASH", told.err)
        code = command(config)
    except Exception as error:  # whatever it is, a user would see its traceback
        return Outcome("CRASH", repr(error))
    shown = capture.readouterr().err
    if "Traceback" in shown or code not in (0, 2):
        return Outcome("CRASH", shown)
    if code == 2:
        lines = [line for line in shown.splitlines() if line.startswith("error: ")]
        helps = len(lines) == 1 and str(workdir) in lines[0] and re.search("delete|choose|start|put back", lines[0])
        return Outcome("refused" if helps else "CRASH", "\n".join(lines))
    if facts(workdir) != expected:
        return Outcome("OTHER", shown)
    return Outcome("by --verify", (told.out + told.err).splitlines()[0]) if damaged else Outcome("harmless")


def copied(source: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    shutil.rmtree(place, ignore_errors=True)
    return pathlib.Path(shutil.copytree(source, place))
