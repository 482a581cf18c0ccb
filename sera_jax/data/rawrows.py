"""A row as it lies in its source, and what a source is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

LFS_PREFIX = b"version https://git-lfs.github.com/spec/"


class NotText(str):
    """Stands for bytes that are no UTF-8 text: nothing where nobody reads the field, else the row is refused."""


@dataclasses.dataclass(frozen=True)
class RawRow:
    """One row as it lies in its source.

    Attributes:
        path: file or directory it comes from.
        line: 1-based line (JSONL) or row number.
        value: the row's fields, or None where it could not be read.
        error: reason why not (a key of `reasons.BAD_REASONS`, or `blank_line`), else None.
        detail: what was seen, for the report.
    """

    path: str
    line: int
    value: dict[str, Any] | None
    error: str | None = None
    detail: str = ""


class Source:
    """Rows with a length and random access. `failure` is set when (part of) the whole source is unreadable."""

    path: str
    failure: RawRow | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, indices: Sequence[int] | np.ndarray) -> Iterator[RawRow]:
        """The rows at `indices` (0-based), in that order."""
        raise NotImplementedError

    def files(self) -> list[str]:
        """The files that the rows lie in."""
        return [self.path]

    def __getitem__(self, index: int) -> RawRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.path}, which has {len(self)} rows")
        return next(self.rows([index]))


def lfs_failure(path: str) -> RawRow:
    """What a git-LFS pointer in place of the file is."""
    return RawRow(path, 1, None, "git_lfs_pointer", "a git-LFS pointer, not the data; run git lfs pull")


def row_of(path: str, line: int, value: dict[str, Any]) -> RawRow:
    """The row of a table's values, as json.loads would have given it."""
    return RawRow(path, line, _plain(value))


def _plain(value: Any) -> Any:
    """Bytes -> str, numpy -> Python, through dicts and lists; dates and the like as text."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            return NotText(f"byte {value[error.start]:#04x} of {len(value)} bytes")
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
        return _plain(value) if isinstance(value, bytes | list) else value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)
