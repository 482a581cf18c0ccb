"""Where rows come from: JSON, CSV, Parquet and Arrow files, folders and globs of them, and tfds data sets.

A source knows its length and reads any of its rows by index, so a host reads only its own. A row that cannot be read
is a `RawRow` with `error` set, never an exception and never nothing; what makes a whole file unreadable is the
source's `failure`. The contents of a file, not its name, tell what it is. The spec of a source is one of

    path/to/rows                          JSON Lines, a JSON array of objects, Parquet, Arrow; JSON also as gzip or zstd
    path/to/rows.csv, rows.tsv            with a header; also as gzip or zstd
    path/to/train-*.parquet               all files of that name, in order
    path/to/folder                        its files of one split; of `datasets.save_to_disk`, its Arrow files
    path/to/prepared                      a prepared tfds directory (it holds dataset_info.json)
    tfds:NAME[:split]                     a dataset of the tfds data directory; NAME may be a prepared directory
    hub:NAME[:CONFIG][:SPLIT][@REVISION]  a data set of the Hugging Face hub, see `repository`
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sera_jax.data.folders import FilesSource, files_of, is_glob, is_saved_dataset, matching
from sera_jax.data.rawrows import LFS_PREFIX, RawRow, Source, row_of
from sera_jax.data.tables import ARROW_MAGICS, PARQUET_MAGIC, ArrowSource, ParquetSource
from sera_jax.data.text_files import GZIP_MAGIC, MAX_DEPTH, MAX_ROW_BYTES, ZSTD_MAGIC, text_source

MAX_WEIGHT = 100.0
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".json", ".csv", ".arrow")
_READ_AT_ONCE = 1024
__all__ = ["MAX_DEPTH", "MAX_ROW_BYTES", "RawRow", "Source", "open_source", "parse_mixture", "read_rows"]
# NAME[:split]; a version after a colon (NAME:1.0.0) belongs to the name, a slice (train[1:3]) to the split
_TFDS_SPEC = re.compile(r"(.+?)(?::([A-Za-z_]\w*(?:\[[^\]]*\])?(?:\+\w+(?:\[[^\]]*\])?)*))?")


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
                yield row_of(self.path, index + 1, value)


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
    if not path.exists() and not is_glob(spec):
        raise ValueError(f"{field}: {spec!r} does not exist (looked in {path.absolute().parent})")
    if path.is_dir() and not is_saved_dataset(path) and (path / "dataset_info.json").is_file():
        return _open_tfds(f"tfds:{spec}", field)
    files = [spec] if path.is_file() else [str(found) for found in files_of(spec, field)]
    return open_file(files[0], field) if len(files) == 1 else FilesSource(spec, [open_file(f, field) for f in files])


def open_file(path: str, field: str = "input") -> Source:
    """The source of one file, by its contents; raises ValueError where they are of no kind that is read."""
    with open(path, "rb") as file:
        head = file.read(512)
    name = path.lower()
    if head.startswith(PARQUET_MAGIC) or (name.endswith(".parquet") and (not head or head.startswith(LFS_PREFIX))):
        return ParquetSource(path)
    if head.startswith(ARROW_MAGICS):
        return ArrowSource(path)
    if name.endswith((".parquet", ".arrow")) and not head.startswith((LFS_PREFIX, GZIP_MAGIC, ZSTD_MAGIC)):
        return ParquetSource(path) if name.endswith(".parquet") else ArrowSource(path)
    source = text_source(path, head)
    if source is None:
        raise ValueError(
            f"{field}: cannot tell what {path!r} holds (it begins with {head[:12]!r}); JSON Lines, JSON arrays, CSV "
            "with a name that ends in .csv, Parquet and Arrow are read"
        )
    return source


def is_there(spec: str) -> bool:
    """Whether there is a file, a folder, or a file of a glob; of a tfds name or an address nothing is asked."""
    return spec.startswith(("tfds:", "hub:")) or pathlib.Path(spec).exists() or bool(is_glob(spec) and matching(spec))


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
    """sha256 over the bytes of the source (of every file of a folder or glob, in order)."""
    digest = hashlib.sha256()
    path, named = pathlib.Path(spec), spec.startswith(("tfds:", "hub:"))
    if path.is_file():
        files = [spec]
    elif not named and (is_glob(spec) or is_saved_dataset(path) or not (path / "dataset_info.json").is_file()):
        if not path.exists() and not is_glob(spec):
            open_source(spec, field=field)  # which says so
        files = files_of(spec, field)
    elif isinstance(source := open_source(spec, field=field), TfdsSource):
        root = pathlib.Path(source.path.rpartition(":")[0])
        digest.update(source.path.rpartition(":")[2].encode())
        files = sorted(path for path in root.rglob("*") if path.is_file())
    else:
        files = source.files()
    for path in files:
        about = os.stat(path)
        digest.update(_file_digest(str(path), about.st_size, about.st_mtime_ns))
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _file_digest(path: str, size: int, changed: int) -> bytes:
    """sha256 of a file of this size that was changed at that time: once in a process."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


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
