"""What a phase under way has done so far, in pieces: written as it goes, read back where the phase is begun again.

A piece is a file of arrays, whole or absent, that begins with a digest of its bytes. Pieces are found by what they were
computed from, so those of other inputs or another plan are left alone; once the phase is finished all of its pieces go.
A phase shorter than SECONDS writes none, unless it is stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import pathlib
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np

from sera_jax import hosts
from sera_jax.checkpoint.papers import digest_of, plain, write_whole

SECONDS = 60.0  # between two pieces, at least: a kill loses about as much
_BELOW, _FILES = "checkpoints/pieces", "*.npz"


class Pieces:
    """Those of the phase `name`, made from `inputs`: JSON-able, the plan among them. Of several processes the first
    writes, and all read the same."""

    def __init__(self, root: pathlib.Path, name: str, inputs: dict[str, Any]) -> None:
        self._folder = _home(root, name) / digest_of(plain(inputs))[:16]
        self._added: dict[str, list[np.ndarray]] = {}
        self._next = 0  # number of the piece that is written next
        self._since = time.monotonic()

    def read(self) -> dict[str, np.ndarray]:
        """All rows of each array, in the order in which they were added; {} where there is no piece.

        Raises:
            ValueError: a piece is not what was written.
        """
        names = hosts.on_first(lambda: [path.name for path in sorted(self._folder.glob(_FILES))])
        found = [_read(self._folder / name) for name in names]
        self._next = 1 + max((int(pathlib.Path(name).stem) for name in names), default=-1)
        return {name: np.concatenate([piece[name] for piece in found]) for name in found[0]} if found else {}

    def add(self, **rows: np.ndarray) -> None:
        """More rows of each array; they are written with others once SECONDS have gone by since the last piece."""
        if not hosts.is_first():
            return
        for name, array in rows.items():
            self._added.setdefault(name, []).append(array)
        if time.monotonic() - self._since >= SECONDS:
            self._write()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """An error or a stop within leaves all that was added until then on disk."""
        try:
            yield
        except BaseException:
            self._write()
            raise

    def _write(self) -> None:
        if self._added:
            file = io.BytesIO()
            np.savez(file, **{name: np.concatenate(arrays) for name, arrays in self._added.items()})
            data = file.getvalue()
            write_whole(self._folder / f"{self._next:06d}.npz", hashlib.sha256(data).digest() + data)
            self._next += 1
        self._added, self._since = {}, time.monotonic()


def forget(root: pathlib.Path, name: str) -> None:
    """Removes all pieces of a phase that is finished; the first process does."""
    if hosts.is_first():
        shutil.rmtree(_home(root, name), ignore_errors=True)


def files(root: pathlib.Path) -> list[pathlib.Path]:
    """The pieces of a work directory."""
    return sorted((root / _BELOW).rglob(_FILES))


def damages_of_piece(path: pathlib.Path) -> Iterator[str]:
    """A line where the piece is not what was written, with the way out."""
    try:
        _read(path)
    except ValueError as error:
        yield str(error)


def _home(root: pathlib.Path, name: str) -> pathlib.Path:
    """One folder a phase, never within that of another, whose name may begin this one's."""
    return root / _BELOW / urllib.parse.quote(name, safe="")


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    size = hashlib.sha256().digest_size
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}), though another process sees it; start again") from error
    if hashlib.sha256(data[size:]).digest() != data[:size]:
        raise ValueError(
            f"{path} is not what was written; delete it and start the same command again, which does that part anew"
        )
    with np.load(io.BytesIO(data[size:])) as arrays:
        return dict(arrays)
