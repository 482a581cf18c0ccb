"""Parquet and Arrow files: tables that are read in groups of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sera_jax.data.rawrows import LFS_PREFIX, RawRow, Source, lfs_failure, row_of

PARQUET_MAGIC = b"PAR1"
ARROW_MAGICS = (b"ARROW1", b"\xff\xff\xff\xff")  # a file; a stream, as the datasets library writes


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"reading {path!r} needs pyarrow: pip install pyarrow, or convert it to .jsonl") from error
    return pyarrow


class TableSource(Source):
    """A file of groups of rows; a subclass opens it and reads a group."""

    damage = "corrupt_parquet"

    def __init__(self, path: str):
        pyarrow = _pyarrow(path)
        self.path = path
        self._file: Any = None
        groups: list[int] = []
        with open(path, "rb") as file:
            head = file.read(len(LFS_PREFIX))
        if head == LFS_PREFIX:
            self.failure = lfs_failure(path)
        else:
            try:
                groups = self._open(pyarrow)
            except (pyarrow.ArrowException, OSError) as error:
                self.failure = RawRow(path, 1, None, self.damage, str(error))
        self._stops = np.cumsum(groups, dtype=np.int64)
        if self.failure is None and not len(self):
            self.failure = RawRow(path, 1, None, "empty_file", "the file holds no row")
        self._group = -1
        self._table: Any = None

    def _open(self, pyarrow: Any) -> list[int]:
        """Open the file; the number of rows of each group."""
        raise NotImplementedError

    def _group_of(self, group: int) -> Any:
        """The group's rows, as something with `slice` and `to_pylist`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def rows(self, indices: Sequence[int] | np.ndarray) -> Iterator[RawRow]:
        for index in indices:
            group = int(np.searchsorted(self._stops, index, side="right"))
            first = int(self._stops[group - 1]) if group else 0
            if group != self._group:
                self._table, self._group = self._read(group), group
            try:
                if isinstance(self._table, Exception):
                    raise self._table
                (value,) = self._table.slice(index - first, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield RawRow(self.path, index + 1, None, "non_utf8", f"byte {error.object[error.start]:#04x} of a text")
            except (ValueError, OSError, NotImplementedError) as error:  # as pyarrow names damage
                yield RawRow(self.path, index + 1, None, self.damage, str(error))
            else:
                yield row_of(self.path, index + 1, value)

    def _read(self, group: int) -> Any:
        """The group's table, or why it cannot be read: asked once, not for each of its rows."""
        try:
            return self._group_of(group)
        except (ValueError, OSError, NotImplementedError) as error:
            return error


class ParquetSource(TableSource):
    """A Parquet file, read by row group."""

    def _open(self, pyarrow: Any) -> list[int]:
        self._file = pyarrow.parquet.ParquetFile(self.path)
        return [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]

    def _group_of(self, group: int) -> Any:
        return self._file.read_row_group(group)


class ArrowSource(TableSource):
    """An Arrow file or stream, read by record batch; it is mapped into memory."""

    damage = "corrupt_arrow"

    def _open(self, pyarrow: Any) -> list[int]:
        mapped = pyarrow.memory_map(self.path)
        if mapped.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(mapped)
            self._file = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        else:
            mapped.seek(0)
            self._file = list(pyarrow.ipc.open_stream(mapped))
        return [batch.num_rows for batch in self._file]

    def _group_of(self, group: int) -> Any:
        return self._file[group]
