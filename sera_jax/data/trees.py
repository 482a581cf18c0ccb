"""Open Assistant's flat files, of which a row is a message, as the trees of `forms`: a prompt with its replies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sera_jax.data.rawrows import RawRow, Source

EXAMPLE = (
    {"message_id": "m1", "parent_id": None, "message_tree_id": "m1", "role": "prompter", "text": "Name a herb."},
    {"message_id": "m2", "parent_id": "m1", "message_tree_id": "m1", "role": "assistant", "text": "Sand.", "rank": 1},
    {"message_id": "m3", "parent_id": "m1", "message_tree_id": "m1", "role": "assistant", "text": "Basil.", "rank": 0},
)
_NEEDS = EXAMPLE[0].keys() - {"parent_id"}  # which the first message of a tree may lack
_AT_ONCE = 1024


class TreesSource(Source):
    """The trees of a source of messages, in the order of their prompts.

    Beside them are the rows that belong to none: those that cannot be read, messages that were deleted, messages whose
    parent is not there, and all that stand under such messages.
    """

    def __init__(self, messages: Source) -> None:
        self._messages, self.path, self.failure = messages, messages.path, messages.failure
        self._rows: list[int] = []  # of the messages: prompts, and rows that belong to no tree
        self._names: list[str | None] = []  # of the prompts
        self._replies: dict[str, list[int]] = {}
        self._deleted: set[int] = set()  # rows that were, or stand under one that was
        names: dict[int, str] = {}
        deleted: list[str] = []
        for index, row in enumerate(messages.rows(range(len(messages)))):
            name, parent = _names(row)
            if name is not None:
                names[index] = name
            elif row.value is not None and is_message(row.value) and row.value.get("deleted") is True:
                deleted.append(row.value["message_id"])
            if name is not None and parent is not None:
                self._replies.setdefault(parent, []).append(index)
            else:
                self._rows.append(index)
                self._names.append(name)
        self._deleted = self._under(deleted, names)
        there = {name for index, name in names.items() if index not in self._deleted}
        lost = self._under([parent for parent in self._replies if parent not in there], names)
        for index in sorted(self._deleted | lost):
            self._rows.append(index)
            self._names.append(None)

    def _under(self, parents: Iterable[str], names: Mapping[int, str]) -> set[int]:
        """All replies to these messages, and theirs."""
        waiting, found = list(parents), set()
        while waiting:
            fresh = set(self._replies.get(waiting.pop(), ())) - found
            found |= fresh
            waiting += [names[index] for index in fresh]
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def files(self) -> list[str]:
        return self._messages.files()

    def rows(self, indices: Sequence[int] | np.ndarray) -> Iterator[RawRow]:
        for start in range(0, len(indices), _AT_ONCE):
            some = [int(index) for index in indices[start : start + _AT_ONCE]]
            names = [self._names[index] for index in some]
            replies = [() if name is None else self._replies.get(name, ()) for name in names]
            wanted = sorted({self._rows[index] for index in some}.union(*replies))
            found = dict(zip(wanted, self._messages.rows(wanted), strict=True))
            for index, name, under in zip(some, names, replies, strict=True):
                row = found[self._rows[index]]
                if self._rows[index] in self._deleted:
                    row = dataclasses.replace(row, value={**(row.value or {}), "deleted": True})
                yield row if name is None else _tree(row, [found[reply].value for reply in under])


def of_messages(source: Source) -> Source:
    """The source, or, where its first row is a message of Open Assistant's flat file, the trees of it."""
    return TreesSource(source) if len(source) and is_message(source[0].value) else source


def is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() >= _NEEDS


def _names(row: RawRow) -> tuple[str | None, str | None]:
    """Those of the message and of its parent, None of a prompt; (None, None) of a row that belongs to no tree."""
    value = row.value or {}
    name, parent = value.get("message_id"), value.get("parent_id")
    if not is_message(value) or value.get("deleted") is True or not isinstance(name, str):
        return None, None
    return (name, parent) if parent is None or isinstance(parent, str) else (None, None)


def _tree(row: RawRow, replies: Sequence[Any]) -> RawRow:
    assert row.value is not None
    return RawRow(row.path, row.line, {"prompt": {**row.value, "replies": list(replies)}})
