"""A work directory of phases: each writes its product once, under a manifest, and is skipped when it is there.

A product appears by one rename, so it is whole or absent. Its manifest holds what it was made from; a product made from
something else is an error, never reused and never overwritten.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable
from typing import Any

from sera_jax import memory
from sera_jax.checkpoint.code import differences, versions, with_present
from sera_jax.config.identity import is_identity


class StaleWorkdir(ValueError):
    """The work directory holds results of another configuration or of other inputs."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A finished phase: its folder, a digest of what went in and came out, and how long it took."""

    path: pathlib.Path
    digest: str
    seconds: float

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists, what JSON does not know is its text."""
    return json.loads(json.dumps(value, default=str))


def first_difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Where two sets of inputs, which are not the same, part: the first field by name."""
    field, (old, new) = next(iter(_differences(there, now).items()))
    return f"first difference {field}: {old!r} there, {new!r} now"


def _differences(there: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """field -> its value there and now, of every field that differs, by name."""
    old, new = _flatten(there), _flatten(now)
    return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def file_digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON so that the file is whole or absent."""
    _write_whole(path, json.dumps(value, indent=1, sort_keys=True, default=str))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object of a file that only remembers: {} where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_json(path: pathlib.Path, way_out: str, *names: str) -> dict[str, Any]:
    """The object of a file that must be there, and must hold these names.

    Raises:
        ValueError: it cannot be read, or is not that; the message ends in the way out.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {way_out}") from error
    if not isinstance(found, dict) or not found.keys() >= set(names):
        raise ValueError(f"{path} is damaged: it is no object with {', '.join(names) or 'names'}; {way_out}")
    return found


def write_jsonl(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line so that the file is whole or absent."""
    _write_whole(path, "".join(_line(row) + "\n" for row in rows))


def _line(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    # half of a surrogate pair, as a user's own field may hold, can be written escaped only
    return text if _is_utf8(text) else json.dumps(row, default=str)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _write_whole(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.with_name(path.name + ".tmp")
    with torn.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    torn.replace(path)


class Workdir:
    """`root/config.json`, `root/phases/NAME/` per finished phase, `root/checkpoints/NAME/` while one is training.

    Attributes:
        notes: lines for the user: fields and versions that changed since the run was started and that may.
        code: the versions that were at work in it, the present ones last.
        watch: called with the name of every phase that is asked for, and whether its product lies there already.
    """

    def __init__(self, root: pathlib.Path, config: dict[str, Any], *, allow_other_versions: bool = False):
        """Open or make the work directory.

        Args:
            allow_other_versions: go on with results of another numerics version or minor release of a library.

        Raises:
            StaleWorkdir: when it was made with a configuration of another identity (`config.identity`), by other
                versions, or another process is at work in it.
            ValueError: no such folder can be made or written, or its config.json cannot be read.
        """
        self.root = root
        self._lock = _lock(root)
        self.done: dict[str, Product] = {}
        self.fresh: list[str] = []
        self.notes: list[str] = []
        self.watch: Callable[[str, bool], None] = lambda name, finished: None
        config = plain({k: v for k, v in config.items() if k != "workdir"})
        history = []
        if _has_results(root):
            self._check_config(config)
            history = _history(read_json(root / "versions.json").get("history"))
            self._check_versions(history, allow_other_versions)
        self.code = with_present(history, allow_other_versions)
        write_json(root / "config.json", config)
        write_json(root / "versions.json", {"history": self.code})

    def _check_config(self, config: dict[str, Any]) -> None:
        """Refuse a config of another identity than that of the results; note what else differs."""
        root, path = self.root, self.root / "config.json"
        if not path.exists():
            raise StaleWorkdir(
                f"{root} holds results but no config.json, so nothing says whose they are; "
                "choose another --config.workdir, or delete this one"
            )
        way_out = "put back what the run was started with, or choose another --config.workdir"
        differ = _differences(load_json(path, way_out), config)
        changed = [k for k in differ if is_identity(k)]
        if changed:
            shown = "; ".join("{}: {!r} there, {!r} now".format(k, *differ[k]) for k in changed[:5])
            raise StaleWorkdir(
                f"{root} was made with another configuration ({len(changed)} fields differ: {shown}); "
                "choose another --config.workdir, or delete this one"
            )
        self.notes += [
            f"config: {k} was {old!r}, now {new!r} (no part of the run's identity)" for k, (old, new) in differ.items()
        ]

    def _check_versions(self, history: list[dict[str, Any]], allowed: bool) -> None:
        """Refuse to go on with the results of code that computes otherwise; note what else differs."""
        grave, slight = differences(history[-1] if history else {}, versions())
        if grave and not allowed:
            raise StaleWorkdir(
                f"{self.root} was made by other versions ({'; '.join(grave)}), which may compute other numbers; "
                "install those, choose another --config.workdir, or go on with --allow_other_versions (it is recorded)"
            )
        self.notes += [f"versions: {difference}" for difference in [*grave, *slight]]

    def checkpoints(self, name: str) -> pathlib.Path:
        return self.root / "checkpoints" / name

    def phase(self, name: str, inputs: dict[str, Any], produce: Callable[[pathlib.Path], None]) -> Product:
        """The product of phase `name`: as it lies there, or made now by `produce(folder)`.

        Args:
            inputs: JSON-able; everything the product depends on (digests of products, settings).
            produce: writes its files into the folder it is given.

        Raises:
            StaleWorkdir: the product there was made from other inputs.
            ValueError: a file of the product is not what the manifest says, or the manifest cannot be read.
        """
        inputs = plain(inputs)
        folder = self.root / "phases" / name
        manifest_path = folder / "manifest.json"
        if manifest_path.exists():
            product = self._open(name, inputs, folder)
            shutil.rmtree(self.checkpoints(name), ignore_errors=True)  # a kill may have come between rename and this
            self.watch(name, True)
        else:
            self.watch(name, False)
            torn = folder.with_name(folder.name + ".partial")
            shutil.rmtree(torn, ignore_errors=True)
            torn.mkdir(parents=True)
            start = time.monotonic()
            with memory.named(f"phase {name}", memory.WAY_OUT):
                produce(torn)
            memory.trim()
            manifest = {
                "inputs": inputs,
                "files": {
                    str(path.relative_to(torn)): file_digest(path)
                    for path in sorted(torn.rglob("*"))
                    if path.is_file() and "arrays" not in path.relative_to(torn).parts
                },
                "seconds": round(time.monotonic() - start, 3),
                "versions": versions(),
            }
            write_json(torn / "manifest.json", manifest)
            torn.replace(folder)
            shutil.rmtree(self.checkpoints(name), ignore_errors=True)
            product = _product(folder, manifest)
            self.fresh.append(name)
        self.done[name] = product
        return product

    def _open(self, name: str, inputs: dict[str, Any], folder: pathlib.Path) -> Product:
        again = f"delete {folder} and start the same command again to make it anew"
        manifest = load_json(folder / "manifest.json", again, "inputs", "files", "seconds")
        if manifest["inputs"] != inputs:
            raise StaleWorkdir(
                f"{folder} was made from other inputs ({first_difference(manifest['inputs'], inputs)}); "
                f"choose another --config.workdir, or delete {folder}, the phases after it and {self.root}/checkpoints"
            )
        for file, expected in manifest["files"].items():
            path = folder / file
            if not path.exists() or file_digest(path) != expected:
                raise ValueError(
                    f"{path} is {'missing' if not path.exists() else 'not what its manifest says'}; {again}"
                )
        return _product(folder, manifest)


def _history(found: Any) -> list[dict[str, Any]]:
    """What a file lists as versions, whatever it holds."""
    return [seen for seen in found if isinstance(seen, dict)] if isinstance(found, list) else []


def _has_results(root: pathlib.Path) -> bool:
    """Whether anything was made there: a run that is refused before leaves the folder free for another."""
    made = any(any((root / name).glob("*")) for name in ("phases", "checkpoints"))
    metrics = root / "metrics.jsonl"
    return made or (metrics.exists() and metrics.stat().st_size > 0)


def _lock(root: pathlib.Path) -> Any:
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


def _product(folder: pathlib.Path, manifest: dict[str, Any]) -> Product:
    return Product(folder, digest_of([manifest["inputs"], manifest["files"]]), manifest["seconds"])


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, part in value.items():
        out.update(_flatten(part, f"{prefix}.{key}" if prefix else str(key)))
    return out
