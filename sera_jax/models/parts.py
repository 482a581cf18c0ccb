"""Parameters in parts: a tree of nested dicts divided by the names of its leaves, and put together again.

What is trained and what is frozen, a decoder and the head on it: every such division is made here, by one rule, a
regular expression over whole paths such as `layers/block/q/kernel`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Tree = dict[str, Any]


def split(tree: Mapping[str, Any], pattern: str) -> tuple[Tree, Tree]:
    """The leaves whose whole path matches `pattern`, and the rest; dicts left empty are dropped."""
    rule = re.compile(pattern)

    def divide(node: Mapping[str, Any], prefix: str) -> tuple[Tree, Tree]:
        matching: Tree = {}
        rest: Tree = {}
        for name, part in node.items():
            path = f"{prefix}{name}"
            if isinstance(part, Mapping):
                inner, outer = divide(part, f"{path}/")
                matching |= {name: inner} if inner else {}
                rest |= {name: outer} if outer else {}
            else:
                (matching if rule.fullmatch(path) else rest)[name] = part
        return matching, rest

    return divide(tree, "")


def paths(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every leaf by its whole path."""
    out: dict[str, Any] = {}
    for name, part in tree.items():
        out |= paths(part, f"{prefix}{name}/") if isinstance(part, Mapping) else {f"{prefix}{name}": part}
    return out


def nested(leaves: Mapping[str, Any]) -> Tree:
    """The tree of leaves by whole paths."""
    out: Tree = {}
    for path, leaf in leaves.items():
        node: Any = leaf
        for name in reversed(path.split("/")):
            node = {name: node}
        out = merge(out, node)
    return out


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> Tree:
    """Both trees as one.

    Raises:
        ValueError: a leaf stands in both.
    """
    out: Tree = dict(first)
    for name, part in second.items():
        if name not in out:
            out[name] = part
        elif isinstance(part, Mapping) and isinstance(out[name], Mapping):
            out[name] = merge(out[name], part)
        else:
            raise ValueError(f"{name!r} stands in both trees; split one of them first")
    return out
