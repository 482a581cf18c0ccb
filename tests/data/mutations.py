"""Rows as files of the field have them, and damage done to them: by seed, a line of bytes that a loader is given."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from sera_jax.data import forms

HUMAN = "\n\nHuman: Name a herb.\n\nAssistant: Basil.\n\nHuman: And a tree?\n\nAssistant:"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a herb."},
    {"role": "assistant", "content": "Basil."},
    {"role": "user", "content": "And a tree?"},
]
OAK, SAND = {"role": "assistant", "content": "An oak, naïve 🌳."}, {"role": "assistant", "content": "Sand."}

_OWN: dict[str, list[dict[str, Any]]] = {
    "preference": [
        {"prompt": "Name a tree.", "chosen": "An oak.", "rejected": "Sand.", "source": "a", "score_chosen": 5},
        {"prompt": TURNS, "chosen": [OAK], "rejected": [SAND]},
        {"chosen": [*TURNS, OAK], "rejected": [*TURNS, SAND], "id": "row"},
        {"prompt": "And a tree?", "chosen": [*TURNS[3:], OAK], "rejected": [*TURNS[3:], SAND]},
        {"chosen": HUMAN + " An oak.", "rejected": HUMAN + " Sand."},
        {"prompt": HUMAN, "chosen": " An oak.", "rejected": " Sand."},
        {"prompt": "Name a tree.", "output_1": "An oak.", "output_2": "Sand.", "preference": 1},
        {"prompt": "Name a tree.", "response_0": "Sand.", "response_1": "An oak.", "preferred": 1},
    ],
    "demonstration": [
        {"prompt": "Name a tree.", "response": "An oak.", "extra": {"tags": ["a", 1, None]}},
        {"prompt": "Name a tree.", "completion": "An oak."},
        {"prompt": TURNS, "response": "An oak."},
        {"prompt": HUMAN, "response": HUMAN + " An oak."},
        {"messages": [*TURNS, OAK]},
    ],
    "prompt": [
        {"prompt": "Name a tree.", "topic": "plants"},
        {"prompt": TURNS},
        {"prompt": HUMAN},
        {"messages": TURNS},
        {"messages": [*TURNS, OAK], "id": 7},
        {"chosen": HUMAN + " An oak.", "rejected": HUMAN + " Sand."},
        {"chosen": [*TURNS, OAK], "rejected": [*TURNS, SAND]},
    ],
}
FORMS: dict[str, list[dict[str, Any]]] = {
    kind: rows + [form.example for form in forms.FORMS if kind in (form.kind, "prompt") and form.kind != "text"]
    for kind, rows in _OWN.items()
}


def nested(depth: int, of: Any = 0) -> Any:
    for _ in range(depth):
        of = [of]
    return of


MESSAGES = [OAK, {"role": "user", "content": "b"}, {"role": "robot", "content": "b"}, {"role": "user"}]
MESSAGES += [TURNS, [OAK], [*TURNS, OAK], {"role": ["user"], "content": ["b"]}, {"role": ["user"], "content": "b"}]
VALUES: list[Callable[[random.Random], Any]] = [
    lambda r: copy.copy(r.choice([None, True, False, 0, -1, 1.5, [], {}, "", " ", "\n\n", [None], [0], {"a": 1}])),
    lambda r: int("9" * 400) * r.choice([1, -1]),
    lambda r: r.choice([float("nan"), float("inf"), -float("inf"), 1e308, 1e-320]),
    lambda r: r.choice(["\ud800", "a\udfffb", "\ufffd", "\ufeff", "\x00", "\x1b[31m", "\u2028", "\x85", "e\u0301"]),
    lambda r: r.choice(["x", "é🌳", "word ", "\n", "Human: ", "\u0301", "<|im_end|>"]) * r.choice([1, 500, 20000]),
    lambda r: r.choice([HUMAN, "Human: a", "\n\nAssistant:", "Assistants: b", "{{ x }}", "{% raw %}", "<eos>"]),
    lambda r: nested(r.choice([2, 70, 300, 900, 950, 990])),
    lambda r: copy.deepcopy(r.choice(MESSAGES)),
]
NAMES = ["prompt", "chosen", "rejected", "response", "messages", "id", "source", "preference", "role", "content"]
NAMES += [
    "conversations",
    "system",
    "history",
    "tools",
    "label",
    "weight",
    "from",
    "value",
    "rank",
    "answers",
    "winner",
]
NAMES += ["score_chosen", "score_rejected", "sera_prompt_format", "extra", "\ud800", "", "a\nb", "\x1b[2J", "x" * 3000]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value within a row, but the row itself and what lies deep."""
    if len(path) > 4:
        return []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    return found + [place for key, part in parts for place in places(part, (*path, key))]


def damage(row: dict[str, Any], r: random.Random) -> None:
    """One change of a row, in place."""
    *path, last = r.choice(places(row) or [("prompt",)])
    parent: Any = row
    for key in path:
        parent = parent[key]
    kind = r.randrange(6)
    if kind == 0 and (isinstance(parent, list) or last in parent):
        del parent[last]
    elif kind == 1 and isinstance(parent, dict):
        parent[r.choice(NAMES)] = parent.pop(last, None)
    elif kind == 2 and isinstance(parent, list):
        parent.insert(r.randrange(len(parent) + 1), r.choice(parent))
    elif kind == 3:
        row[r.choice(NAMES)] = r.choice(VALUES)(r)
    elif kind == 4 and isinstance(parent, dict) and isinstance(parent.get(last), str):
        added = r.choice(VALUES)(r)
        parent[last] = r.choice(["", " "]) + parent[last] + (added if isinstance(added, str) else "")
    elif isinstance(parent, dict) or parent:
        parent[last] = r.choice(VALUES)(r)


def spoil(line: bytes, r: random.Random) -> bytes:
    """One change of a line's bytes. None makes two lines of it, so that places can be counted."""
    cut = r.randrange(len(line) + 1)
    kind = r.randrange(9)
    if kind == 0:
        return line[:cut]
    if kind == 1:
        return line[:cut] + bytes([r.choice([0, 0xFF, 0xC0, 0x80, 0xED])]) + line[cut:]
    if kind == 2:
        return b"\xef\xbb\xbf" + line
    if kind == 3:
        return line + b"\r"
    if kind == 4:
        return line[:-1] + b', "prompt": "Another.", "prompt": "A third."}'
    if kind == 5:
        return line.decode("utf-8", "replace").encode(r.choice(["utf-16-be", "latin-1"]), "replace").replace(b"\n", b"")
    if kind == 6:
        return r.choice([b"[", b"{"]) * r.choice([3, 500, 100_000])
    if kind == 7:
        return (
            b'{"prompt": "a", "response": "b", "chosen": "c", "rejected": "d", "n": ' + b"[" * 995 + b"]" * 995 + b"}"
        )
    return r.choice([b"", b"  ", b"null", b"NaN", b"[1]", b'"a"', b"{}", b"9" * 5000, b"'a'", b"\x00", line + line])


def dumped(row: Any, r: random.Random) -> bytes:
    """JSON, escaped or as UTF-8; nesting that the writer of json refuses is written by hand."""
    try:
        text = json.dumps(row, ensure_ascii=r.random() < 0.5)
    except RecursionError:
        text = '{"prompt": ' + "[" * 2000 + "]" * 2000 + "}"
    return text.encode("utf-8", "surrogatepass")


def line_of(kind: str, r: random.Random) -> bytes:
    """A line for the loader of `kind`: two in three damaged, some of them more than once."""
    row = copy.deepcopy(r.choice(FORMS[kind]))
    for _ in range(r.choice([0, 0, 1, 1, 1, 2])):
        damage(row, r)
    line = dumped(row, r)
    return spoil(line, r) if r.random() < 0.2 else line
