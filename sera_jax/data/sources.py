"""Where rows come from: JSONL (plain or gzip), Parquet, and tfds datasets read without TensorFlow.

A source knows its length and reads any of its rows by index, so a host reads only its own. A row that cannot be read
is a `RawRow` with `error` set, never an exception and never nothing; what makes a whole file unreadable is the
source's `failure`. The spec of a source is one of

    path/to/rows.jsonl, rows.jsonl.gz     one JSON object a line, UTF-8
    path/to/rows.parquet
    path/to/prepared                      a prepared tfds directory (it holds dataset_info.json)
    tfds:NAME[:split]                     a dataset of the tfds data directory; NAME may be a prepared directory
    hub:NAME[:CONFIG][:SPLIT][@REVISION]  a data set of the Hugging Face hub, see `repository`
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import hashlib
import json
import math
import mmap
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

LFS_PREFIX = b"version https://git-lfs.github.com/spec/"
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"
MAX_ROW_BYTES = 4 << 20  # about a million tokens: a mistake in the file, not a row to train on
MAX_DEPTH = 100  # lists and objects within one another; Python's own recursion ends at some 900
MAX_WEIGHT = 100.0
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_READ_AT_ONCE = 1024
# NAME[:split]; a version after a colon (NAME:1.0.0) belongs to the name, a slice (train[1:3]) to the split
_TFDS_SPEC = re.compile(r"(.+?)(?::([A-Za-z_]\w*(?:\[[^\]]*\])?(?:\+\w+(?:\[[^\]]*\])?)*))?")


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

    def __getitem__(self, index: int) -> RawRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.path}, which has {len(self)} rows")
        return next(self.rows([index]))


class JsonlSource(Source):
    """One JSON object a line. The bytes, not the name, tell whether the file is compressed."""

    def __init__(self, path: str):
        self.path = path
        with open(path, "rb") as file:
            head = file.read(len(LFS_PREFIX))
            file.seek(0)
            if head.startswith(GZIP_MAGIC):
                self._data: bytes | mmap.mmap = self._decompress(file)
            elif head:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                self._data = b""
        if self._data[: len(LFS_PREFIX)] == LFS_PREFIX:
            self._data, self.failure = b"", _lfs_failure(path)
        elif not len(self._data) and self.failure is None:
            self.failure = RawRow(path, 1, None, "empty_file", "the file holds nothing")
        ends = np.flatnonzero(np.frombuffer(self._data, np.uint8) == ord("\n"))
        starts = np.concatenate([[0], ends + 1])
        self._starts = starts[:-1] if starts[-1] == len(self._data) else starts

    def _decompress(self, file: Any) -> bytes:
        parts: list[bytes] = []
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                while part := stream.read(1 << 20):
                    parts.append(part)
        except (EOFError, OSError, zlib.error) as error:
            line = sum(part.count(b"\n") for part in parts) + 1
            self.failure = RawRow(self.path, line, None, "corrupt_gzip", str(error))
        return b"".join(parts)

    def __len__(self) -> int:
        return len(self._starts)

    def rows(self, indices: Sequence[int] | np.ndarray) -> Iterator[RawRow]:
        for index in indices:
            start = int(self._starts[index])
            stop = int(self._starts[index + 1]) - 1 if index + 1 < len(self._starts) else len(self._data)
            yield self._row(index + 1, start, stop)

    def _row(self, line: int, start: int, stop: int) -> RawRow:
        if stop - start > MAX_ROW_BYTES:
            return RawRow(self.path, line, None, "enormous_row", f"{stop - start} bytes, at most {MAX_ROW_BYTES}")
        raw = self._data[start:stop]
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            return RawRow(
                self.path, line, None, "non_utf8", f"byte {raw[error.start]:#04x} at column {error.start + 1}"
            )
        if not text.strip():
            return RawRow(self.path, line, None, "blank_line")
        try:
            value = json.loads(text, object_pairs_hook=_each_once)
        except _Twice as error:
            return RawRow(self.path, line, None, "duplicate_field", f"{str(error)[:60]!r}")
        except RecursionError:
            return RawRow(self.path, line, None, "deep_row", f"{text[:60]!r}")
        except ValueError as error:
            return RawRow(self.path, line, None, "invalid_json", f"{error} in {text[:60]!r}")
        if not isinstance(value, dict):
            return RawRow(self.path, line, None, "not_an_object", f"a JSON {type(value).__name__}: {text[:60]!r}")
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            return RawRow(self.path, line, None, "deep_row", f"{text[:60]!r}")
        return RawRow(self.path, line, value)


class ParquetSource(Source):
    """A Parquet file, read by row group."""

    def __init__(self, path: str):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(f"reading {path!r} needs pyarrow: pip install pyarrow, or convert it to .jsonl") from error
        self.path = path
        self._file: Any = None
        groups: list[int] = []
        with open(path, "rb") as file:
            head = file.read(len(LFS_PREFIX))
        if head == LFS_PREFIX:
            self.failure = _lfs_failure(path)
        else:
            try:
                self._file = pyarrow.parquet.ParquetFile(path)
                groups = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
            except (pyarrow.ArrowException, OSError) as error:
                self.failure = RawRow(path, 1, None, "corrupt_parquet", str(error))
        self._stops = np.cumsum(groups, dtype=np.int64)
        if self.failure is None and not len(self):
            self.failure = RawRow(path, 1, None, "empty_file", "the file holds no row")
        self._group = -1
        self._table: Any = None

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
                yield _not_text(self.path, index + 1, error)
            except (ValueError, OSError, NotImplementedError) as error:  # as pyarrow names damage
                yield RawRow(self.path, index + 1, None, "corrupt_parquet", str(error))
            else:
                yield _row_of(self.path, index + 1, value)

    def _read(self, group: int) -> Any:
        """The group's table, or why it cannot be read: asked once, not for each of its rows."""
        try:
            return self._file.read_row_group(group)
        except (ValueError, OSError, NotImplementedError) as error:
            return error


class TfdsSource(Source):
    """A split of a tfds dataset in a random-access format (array_record, parquet); TensorFlow is never imported."""

    def __init__(self, builder: Any, split: str | None, spec: str):
        splits: list[str] = sorted(builder.info.splits)
        if not splits:
            raise ValueError(f"{spec!r} is not prepared: no split found in {builder.data_path}")
        if split is None:
            split = splits[0] if len(splits) == 1 else "train"
        if re.split(r"[\[+]", split)[0] not in [*splits, "all"]:
            raise ValueError(f"{spec!r} has no split {split!r}; its splits: {', '.join(splits)}")
        try:
            self._data = builder.as_data_source(split=split)
        except (NotImplementedError, ImportError, ValueError) as error:
            raise ValueError(
                f"{spec!r} cannot be read by index ({error}); prepare it with file_format='array_record', "
                "or convert it with python -m sera_jax.data.prepare"
            ) from error
        if len(self._data) != (named := builder.info.splits[split].num_examples):  # Parquet ignores slices
            raise ValueError(
                f"{spec!r} names {named} rows, but its format gives {len(self._data)}; name a whole split, or convert "
                "it with python -m sera_jax.data.prepare"
            )
        self.path = f"{builder.data_path}:{split}"
        if not len(self._data):
            self.failure = RawRow(self.path, 1, None, "empty_file", "the split holds no row")

    def __len__(self) -> int:
        return len(self._data)

    def rows(self, indices: Sequence[int] | np.ndarray) -> Iterator[RawRow]:
        for start in range(0, len(indices), _READ_AT_ONCE):  # single reads are several times slower than batches
            batch = [int(i) for i in indices[start : start + _READ_AT_ONCE]]
            for index, value in zip(batch, self._data.__getitems__(batch), strict=True):
                yield _row_of(self.path, index + 1, value)


def open_source(spec: str, *, field: str = "input") -> Source:
    """The source that `spec` names; `field` is the configuration field it was typed in, for the message.

    Raises:
        ValueError: nothing lies there, or nothing that can be read.
    """
    if spec.startswith("tfds:"):
        return _open_tfds(spec, field)
    if spec.startswith("hub:"):
        from sera_jax.data import repository  # which stands above

        return repository.open_rows(spec, field)
    path = pathlib.Path(spec)
    if "://" in spec:
        raise ValueError(f"{field}: {spec!r} is a remote address; mount the bucket or copy the file, and give its path")
    if not path.exists():
        raise ValueError(f"{field}: {spec!r} does not exist (looked in {path.absolute().parent})")
    if path.is_dir():
        if not (path / "dataset_info.json").is_file():
            raise ValueError(
                f"{field}: {spec!r} is a directory without dataset_info.json, so not a prepared tfds dataset; give the "
                "file itself, several files separated by commas, or prepare them with python -m sera_jax.data.prepare"
            )
        return _open_tfds(f"tfds:{spec}", field)
    if path.name.endswith(".parquet"):
        return ParquetSource(spec)
    if path.name.endswith(SUFFIXES):
        return JsonlSource(spec)
    raise ValueError(f"{field}: cannot tell what {spec!r} holds; its name must end in {', '.join(SUFFIXES)}")


def read_rows(spec: str, *, host: int = 0, host_count: int = 1, field: str = "input") -> Iterator[RawRow]:
    """Rows `host`, `host + host_count`, ... of the source, and its failure, if any, last (on every host)."""
    if not 0 <= host < host_count:
        raise ValueError(f"host must be in 0..{host_count - 1} for {host_count} hosts, got {host}")
    source = open_source(spec, field=field)
    yield from source.rows(range(host, len(source), host_count))
    if source.failure is not None:
        yield source.failure


def parse_mixture(spec: str, *, field: str = "input") -> list[tuple[str, float]]:
    """`a.jsonl=0.5,b.jsonl` -> [("a.jsonl", 0.5), ("b.jsonl", 1.0)].

    A weight is how often each row of the source is taken: 0.5 takes a reproducible half of the rows, 2 takes every row
    twice, 2.5 twice and a reproducible half of them once more.

    Raises:
        ValueError: nothing named, a source named twice, a weight that is no number or not in (0, 100].
    """
    mixture: list[tuple[str, float]] = []
    for part in spec.split(","):
        name, equals, number = part.strip().rpartition("=")
        if not equals or "/" in number or number.endswith(SUFFIXES):  # an equals sign of the path itself
            name, number = part.strip(), "1"
        name = name.strip()
        if not name:
            raise ValueError(f"{field}: {spec!r} names no source at {part!r}; write a.jsonl or a.jsonl=0.5,b.jsonl")
        try:
            weight = float(number)
        except ValueError:
            raise ValueError(f"{field}: the weight {number!r} of {name!r} is not a number") from None
        if not (math.isfinite(weight) and 0 < weight <= MAX_WEIGHT):
            raise ValueError(
                f"{field}: the weight of {name!r} is {number}; it must be above 0 and at most {MAX_WEIGHT:g} "
                "(leave the source out to take none of it)"
            )
        if any(name == other for other, _ in mixture):
            raise ValueError(f"{field}: {name!r} is named twice; write {name}=2 to take its rows twice")
        mixture.append((name, weight))
    return mixture


def content_hash(spec: str, *, field: str = "input") -> str:
    """sha256 over the bytes of the source (every file of a prepared directory, in name order)."""
    source = open_source(spec, field=field)
    if parts := getattr(source, "parts", ()):
        return hashlib.sha256("".join(content_hash(part.path) for part in parts).encode()).hexdigest()
    digest = hashlib.sha256()
    root = pathlib.Path(source.path.rpartition(":")[0] if isinstance(source, TfdsSource) else source.path)
    if isinstance(source, TfdsSource):
        digest.update(source.path.rpartition(":")[2].encode())
    for path in sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _open_tfds(spec: str, field: str) -> TfdsSource:
    match = _TFDS_SPEC.fullmatch(spec.removeprefix("tfds:"))
    name, split = match.groups() if match else ("", None)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(f"{field}: {spec!r} needs tensorflow-datasets: pip install tensorflow-datasets") from error
    try:
        if (pathlib.Path(name) / "dataset_info.json").is_file():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name)
    except Exception as error:  # tfds raises many kinds for a name it does not know
        raise ValueError(
            f"{field}: no tfds dataset {name!r}: {str(error).strip().splitlines()[0]}; give a prepared directory, or "
            "set TFDS_DATA_DIR to where it is prepared"
        ) from error
    return TfdsSource(builder, split, spec)


class _Twice(ValueError):
    """A field stands twice in an object: which of its values is meant?"""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise _Twice(next(name for name, count in counts.items() if count > 1))
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for v in level for part in (v.values() if isinstance(v, dict) else v)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def _lfs_failure(path: str) -> RawRow:
    return RawRow(path, 1, None, "git_lfs_pointer", "a git-LFS pointer, not the data; run git lfs pull")


def _row_of(path: str, line: int, value: dict[str, Any]) -> RawRow:
    try:
        return RawRow(path, line, _plain(value))
    except UnicodeDecodeError as error:
        return _not_text(path, line, error)


def _not_text(path: str, line: int, error: UnicodeDecodeError) -> RawRow:
    return RawRow(path, line, None, "non_utf8", f"byte {error.object[error.start]:#04x} of a text field")


def _plain(value: Any) -> Any:
    """Bytes -> str, numpy -> Python, through dicts and lists: what json.loads would have given."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
        return _plain(value) if isinstance(value, bytes | list) else value
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
