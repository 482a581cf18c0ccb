"""JSON on disk, whole or absent, some of it sealed with a digest of itself; and the digests that name what it holds."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from sera_jax import hosts, whole


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists, what JSON does not know is its text."""
    return json.loads(json.dumps(value, default=str))


def first_difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Where two sets of inputs, which are not the same, part: the first field by name."""
    field, (old, new) = next(iter(differences(there, now).items()))
    return f"first difference {field}: {old!r} there, {new!r} now"


def differences(there: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """field -> its value there and now, of every field that differs, by name."""
    old, new = flatten(there), flatten(now)
    return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def file_digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON so that the file is whole or absent; the first process does."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True, default=str).encode())


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


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with a digest of itself, which tells when it is no longer what was written."""
    return value | {"digest": digest_of(value)}


def is_whole(found: dict[str, Any]) -> bool:
    """Whether an object is as `sealed` made it."""
    return found.get("digest") == digest_of({name: value for name, value in found.items() if name != "digest"})


def load_sealed(path: pathlib.Path, way_out: str, *names: str) -> dict[str, Any]:
    """`load_json` of what `sealed` made. Raises ValueError also where it is not what was written."""
    found = load_json(path, way_out, *names, "digest")
    if not is_whole(found):
        raise ValueError(f"{path} is not what was written; {way_out}")
    return found


def write_jsonl(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line so that the file is whole or absent; the first process does."""
    write_whole(path, b"".join(_line(row) + b"\n" for row in rows))


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a user's own field may hold, can be written escaped only
        return json.dumps(row, default=str).encode()


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Write a file so that it is whole or absent; the first process does."""
    if not hosts.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write_bytes(path, data)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """path -> value of nested dicts, parts joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, part in value.items():
        out.update(flatten(part, f"{prefix}.{key}" if prefix else str(key)))
    return out
