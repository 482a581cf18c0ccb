"""Text files of rows: JSON Lines, JSON arrays, CSV; plain, gzip or zstd. Their contents tell which, but for CSV."""

from __future__ import annotations

import collections
import csv
import gzip
import io
import json
import mmap
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sera_jax.data.rawrows import LFS_PREFIX, RawRow, Source, lfs_failure

GZIP_MAGIC, ZSTD_MAGIC, BOM = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf"
MAX_ROW_BYTES = 4 << 20  # about a million tokens: a mistake in the file, not a row to train on
MAX_DEPTH = 100  # lists and objects within one another; Python's own recursion ends at some 900
_SCANNED = 1 << 24  # bytes that are searched at a time
CSV_NAMES = (".csv", ".tsv")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[\]{},"]', re.DOTALL)  # a lone quote opens a text that never ends


def text_source(path: str, head: bytes) -> Source | None:
    """The source of a text file that begins with `head`; None where it is of no kind that is read."""
    name = path.lower()
    for packed in (".gz", ".zst", ".zstd"):
        name = name.removesuffix(packed)
    data, failure = _contents(path, head)
    start = bytes(data[:4096]).removeprefix(BOM).lstrip()
    if failure is None and bytes(data[: len(LFS_PREFIX)]) == LFS_PREFIX:
        return JsonSource(path, b"", lfs_failure(path), [])
    if not start and failure is None:
        return JsonSource(path, data, None, None)
    if name.endswith(CSV_NAMES) and not start.startswith((b"{", b"[")):
        return CsvSource(path, bytes(data), failure)
    if start.startswith(b"["):
        first = start.split(b"\n")[0].strip()
        if not (_is_json(first) and b"\n" in start and _more_lines(data)):
            spans, ended = _spans(data, 1)
            if not ended and _has_object_lines(data):
                return JsonSource(path, data, failure, None)
            if failure is None and not ended:
                line = len(spans) + 1
                failure = RawRow(path, line, None, "corrupt_array", f"the array is not closed after {len(spans)} rows")
            return JsonSource(path, data, failure, spans)
    if start.split(b"\n")[0].strip() == b"{" and failure is None and not _has_object_lines(data):
        return JsonSource(path, data, None, _spans(data, 0)[0])
    if name.endswith((".jsonl", ".ndjson", ".json")) or start.startswith((b"{", b"[")) or failure is not None:
        return JsonSource(path, data, failure, None)
    return None


class JsonSource(Source):
    """One JSON object a line, or between `spans` of bytes: the elements of an array, pretty-printed objects."""

    def __init__(self, path: str, data: bytes | mmap.mmap, failure: RawRow | None, spans: list[tuple[int, int]] | None):
        self.path, self._data, self.failure = path, data, failure
        if not len(data) and failure is None:
            self.failure = RawRow(path, 1, None, "empty_file", "the file holds nothing")
        if spans is None:
            ends = _line_ends(data)
            starts = np.concatenate([[0], ends + 1])
            starts = starts[:-1] if starts[-1] == len(data) else starts
            stops = np.append(starts[1:] - 1, len(data)) if len(starts) else starts
            self._spans = np.stack([starts, stops], 1)
        else:
            self._spans = np.array(spans, np.int64).reshape(-1, 2)
            if not spans and self.failure is None:
                self.failure = RawRow(path, 1, None, "empty_file", "the array holds no row")

    def __len__(self) -> int:
        return len(self._spans)

    def rows(self, indices: Sequence[int] | np.ndarray) -> Iterator[RawRow]:
        for index in indices:
            start, stop = self._spans[index].tolist()
            yield self._row(int(index) + 1, start, stop)

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
        if not text or text.isspace():
            return RawRow(self.path, line, None, "blank_line")
        try:
            value = _DECODER.decode(text)
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


class CsvSource(Source):
    """A table as text with a header; commas, or what stands in the header where no comma does (tab, semicolon).

    Every cell is a text, an empty one too.
    """

    def __init__(self, path: str, data: bytes, failure: RawRow | None):
        self.path, self.failure = path, failure
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        text = data.decode("utf-8-sig", "surrogateescape")
        first = text.split("\n", 1)[0]
        mark = next((m for m in (",", "\t", ";") if m in first), ",")
        self._table: list[list[str]] = []
        try:
            self._table = [
                line for line in csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True) if line
            ]
        except csv.Error as error:
            self.failure = RawRow(path, 1, None, "ragged_csv", str(error))
        self._names = self._table.pop(0) if self._table else []
        if len(set(self._names)) < len(self._names):
            self.failure, self._table = RawRow(path, 1, None, "duplicate_field", "two columns of one name"), []
        if not self._table and self.failure is None:
            self.failure = RawRow(path, 1, None, "empty_file", "the file holds a header and no row")

    def __len__(self) -> int:
        return len(self._table)

    def rows(self, indices: Sequence[int] | np.ndarray) -> Iterator[RawRow]:
        for index in indices:
            cells, line = self._table[index], int(index) + 1
            if len(cells) != len(self._names):
                what = f"{len(cells)} cells, the header has {len(self._names)}"
                yield RawRow(self.path, line, None, "ragged_csv", what)
            elif any("\udc80" <= c <= "\udcff" for cell in cells for c in cell if c > "\ud7ff"):
                yield RawRow(self.path, line, None, "non_utf8", "a cell with bytes that are not UTF-8")
            else:
                yield RawRow(self.path, line, dict(zip(self._names, cells)))


def _contents(path: str, head: bytes) -> tuple[bytes | mmap.mmap, RawRow | None]:
    """(the bytes, unpacked, what can be had of them; why not all of them)."""
    if not head:
        return b"", None
    if not head.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), None
    parts: list[bytes] = []
    try:
        with _unpacked(path, head) as stream:
            while part := stream.read(1 << 20):
                parts.append(part)
    except (EOFError, OSError, zlib.error) as error:
        line = sum(part.count(b"\n") for part in parts) + 1
        return b"".join(parts), RawRow(path, line, None, "corrupt_gzip", str(error))
    return b"".join(parts), None


def _unpacked(path: str, head: bytes) -> Any:
    if head.startswith(GZIP_MAGIC):
        return gzip.open(path, "rb")
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"reading {path!r} needs pyarrow: pip install pyarrow, or unpack it (zstd -d)") from error
    return pyarrow.CompressedInputStream(path, "zstd")


def _line_ends(data: bytes | mmap.mmap) -> np.ndarray:
    """i64[lines]: where the line feeds are."""
    view = np.frombuffer(data, np.uint8)
    parts = [
        start + np.flatnonzero(view[start : start + _SCANNED] == ord("\n")) for start in range(0, len(view), _SCANNED)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _more_lines(data: bytes | mmap.mmap) -> bool:
    """Whether the first line, JSON by itself, has others after it: JSON Lines of lists, and no array."""
    return bool(bytes(data[data.find(b"\n") :]).strip())


def _has_object_lines(data: bytes | mmap.mmap) -> bool:
    """Whether one of the first lines after the first is an object by itself: JSON Lines with a damaged first one."""
    lines = bytes(data[: 1 << 20]).split(b"\n")[1:50]
    return any(line.startswith(b"{") and _is_json(line) for line in lines)


def _spans(data: bytes | mmap.mmap, depth_of_rows: int) -> tuple[list[tuple[int, int]], bool]:
    """(spans of the values at a depth: 1 within an array, 0 one after the other; whether all brackets are closed)."""
    spans, depth, start = [], 0, 0
    for match in _TOKEN.finditer(data):
        token, at = match.group(), match.start()
        if token == b'"':  # of a text that never ends
            return spans, False
        if token in (b"[", b"{"):
            if depth == depth_of_rows == 0:
                start = at
            depth += 1
            if depth == depth_of_rows == 1:
                start = at + 1
        elif token in (b"]", b"}"):
            depth -= 1
            if depth == depth_of_rows == 0:
                spans.append((start, match.end()))
            elif depth == 0:
                spans.append((start, at))
                rest = bytes(data[match.end() :]).strip()
                return [span for span in spans if bytes(data[span[0] : span[1]]).strip()], not rest
        elif token == b"," and depth == depth_of_rows == 1:
            spans.append((start, at))
            start = at + 1
    if depth_of_rows == 0 and depth:
        spans.append((start, len(data)))  # not JSON, which its row will say
    return spans, depth == 0 and depth_of_rows == 0


class _Twice(ValueError):
    """A field stands twice in an object: which of its values is meant?"""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise _Twice(next(name for name, count in counts.items() if count > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for v in level for part in (v.values() if isinstance(v, dict) else v)]
        level = [part for part in level if isinstance(part, dict | list)]
        if not level:
            return False
    return True
