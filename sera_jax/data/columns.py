"""data.columns: fields of other names as those that are read. `prompt:question,system:meta.persona,chosen:answers.0`"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

# What a column may become. A field may also be left out on purpose, whatever its name: `tools:` (nothing after it).
TARGETS = ("prompt", "system", "history", "messages", "chosen", "rejected", "response", "label", "text", "id", "source")
PAIRS = ("best_worst", "all")
THOUGHTS = ("keep", "drop", "refuse")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        columns: of data.columns; "" reads every row by its own shape.
        thoughts: of data.thoughts: what becomes of <think>...</think> in an answer.
        pairs: of data.pairs: which pairs of a rated or ranked list.
    """

    columns: str = ""
    thoughts: str = "keep"
    pairs: str = "best_worst"

    def __post_init__(self) -> None:
        parse_columns(self.columns)
        if self.thoughts not in THOUGHTS:
            raise ValueError(f"data.thoughts must be one of {', '.join(THOUGHTS)}, got {self.thoughts!r}")
        if self.pairs not in PAIRS:
            raise ValueError(f"data.pairs must be one of {', '.join(PAIRS)}, got {self.pairs!r}")

    def named(self) -> dict[str, str]:
        """The fields, for what a product was made from; those younger than such products only where they count."""
        return {k: v for k, v in dataclasses.asdict(self).items() if (k, v) != ("pairs", "best_worst")}

    def renamed(self, value: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """(the row with its columns under their new names, those of data.columns that it has as text).

        A row that has none of the columns is unchanged: it belongs to another source.
        """
        row, found = dict(value), []
        for name, path in parse_columns(self.columns) if self.columns else ():
            if not path:
                if row.pop(name, None) is not None:
                    found.append(f"{name}:")
            elif (part := at(value, path)) is not None:
                found.append(f"{name}:{path}")
                row[name] = part
                if (top := _top(value, path)) != name:
                    row.pop(top, None)
        return (row, ",".join(found)) if found else (value, "")


@functools.cache
def parse_columns(columns: str) -> tuple[tuple[str, str], ...]:
    """(name, path) of each column; raises ValueError."""
    pairs = []
    for part in columns.split(",") if columns else ():
        name, colon, path = (piece.strip() for piece in part.partition(":"))
        if not colon or not name or (path and name not in TARGETS):
            raise ValueError(
                f"data.columns={columns!r}: {part.strip()!r} is not NAME:FIELD, where NAME is one of "
                f"{', '.join(TARGETS)} (or FIELD: with nothing after the colon, to leave a field out)"
            )
        if any(name == other for other, _ in pairs):
            raise ValueError(f"data.columns={columns!r} names {name!r} twice")
        pairs.append((name, path))
    return tuple(pairs)


def at(value: Any, path: str) -> Any:
    """What lies at a dotted path, list places counted from 0; None where nothing does."""
    if isinstance(value, Mapping) and path in value:
        return value[path]
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.lstrip("-").isdigit() and -len(value) <= int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _top(value: Mapping[str, Any], path: str) -> str:
    return path if path in value else path.split(".")[0]
