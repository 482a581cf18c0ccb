"""Stored items as files: written as they come, mapped into memory where they are read. With them lies the report."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax.data.items import KEY_BYTES, Item, prompt_key
from sera_jax.data.report import Count, LoadReport
from sera_jax.data.stored import Items, Stored

REPORT = "report.json"
_KINDS, _BY_SOURCE = ("bad", "dropped", "noted"), ("sources", "forms")  # of a report
_CONTENT_BYTES = 32
_AT_ONCE = 4096  # items that are written together
_LIBRARIES = ("tokenizers", "transformers", "jinja2")  # which make tokens of a text
_ARRAYS: dict[str, tuple[type, int]] = {  # dtype, and columns; 0 of a plain list
    "tokens": (np.int32, 0),
    "ids": (np.uint8, 0),
    "id_ends": (np.int64, 0),
    "contents": (np.uint8, _CONTENT_BYTES),
    "keys": (np.uint8, KEY_BYTES),
    "openings": (np.uint8, _CONTENT_BYTES),
    "opening_ends": (np.int64, 0),
}


class Keeper:
    """Writes items into a folder as they come; holds the last few alone.

    Args:
        responses: of each item.
    """

    def __init__(self, folder: pathlib.Path, responses: int) -> None:
        self._files = {name: _Growing(folder / f"{name}.npy", *how) for name, how in _ARRAYS.items()}
        self._files["lengths"] = _Growing(folder / "lengths.npy", np.int32, 1 + responses)
        self._waiting: list[Item] = []
        self._ids = self._openings = 0

    def add(self, item: Item) -> None:
        self._waiting.append(item)
        if len(self._waiting) >= _AT_ONCE:
            self._write()

    def close(self) -> None:
        self._write()
        for file in self._files.values():
            file.close()

    def _write(self) -> None:
        items, self._waiting = self._waiting, []
        if not items:
            return
        ids = [item.id.encode() for item in items]
        openings = [bytes.fromhex(key) for item in items for key in item.openings]
        parts = [part for item in items for part in (item.prompt, *item.responses)]
        id_ends = self._ids + np.cumsum([len(name) for name in ids])
        opening_ends = self._openings + np.cumsum([len(item.openings) for item in items])
        self._ids, self._openings = int(id_ends[-1]), int(opening_ends[-1])
        made: dict[str, Any] = {
            "tokens": np.concatenate(parts),
            "lengths": np.array([len(part) for part in parts]),
            "ids": np.frombuffer(b"".join(ids), np.uint8),
            "id_ends": id_ends,
            "contents": np.frombuffer(bytes.fromhex("".join(item.content for item in items)), np.uint8),
            "keys": np.frombuffer(b"".join(prompt_key(item.prompt) for item in items), np.uint8),
            "openings": np.frombuffer(b"".join(openings), np.uint8),
            "opening_ends": opening_ends,
        }
        for name, values in made.items():
            self._files[name].append(values)


class _Growing:
    """A .npy file that grows along its first axis; its header has room for any length."""

    def __init__(self, path: pathlib.Path, dtype: type, columns: int = 0) -> None:
        self._file, self._dtype, self._columns, self._count = path.open("wb"), np.dtype(dtype), columns, 0
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._count += values.size // (self._columns or 1)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        shape = (self._count, self._columns) if self._columns else (self._count,)
        about = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, about)


def keep(
    folder: pathlib.Path,
    responses: int,
    names: Sequence[str],
    read: Callable[[Callable[[Item], None]], LoadReport],
) -> None:
    """Write what `read` gives to the function that it is given, items of so many responses, and its report.

    Args:
        names: of the sources, which are not written down: the same rows elsewhere are the same files here.
    """
    keeper = Keeper(folder, responses)
    report = read(keeper.add)
    keeper.close()
    fields = dataclasses.asdict(report)
    for kind in _KINDS:
        for entry in fields[kind].values():
            of = max(
                (k for k, n in enumerate(names) if entry["first"].startswith(n)),
                key=lambda k: len(names[k]),
                default=-1,
            )
            entry["first"] = [of, entry["first"][len(names[of]) if of >= 0 else 0 :]]
    for about in _BY_SOURCE:
        fields[about] = {names.index(name): found for name, found in fields[about].items()}
    (folder / REPORT).write_text(json.dumps(fields | {"spec": ""}, indent=1), encoding="utf-8")


def kept(folder: pathlib.Path, spec: str, names: Sequence[str]) -> tuple[Items, LoadReport]:
    """What `keep` wrote, of sources that now have these names: tokens stay on disk until they are asked for."""
    arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in [*_ARRAYS, "lengths"]}
    stored = Stored(**arrays)
    fields = json.loads((folder / REPORT).read_text(encoding="utf-8")) | {"spec": spec}
    for kind in _KINDS:
        for reason, entry in fields[kind].items():
            of, rest = entry["first"]
            fields[kind][reason] = Count(**entry | {"first": (names[of] if of >= 0 else "") + rest})
    for about in _BY_SOURCE:
        fields[about] = {names[int(of)]: found for of, found in fields[about].items()}
    return Items(stored, np.arange(len(stored))), LoadReport(**fields)


def decided_by() -> dict[str, str]:
    """What decides the tokens of a row besides the row, the tokenizer and the settings: the source of this package, and
    the libraries that render and encode."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {"source": digest.hexdigest()} | {name: importlib.metadata.version(name) for name in _LIBRARIES}
