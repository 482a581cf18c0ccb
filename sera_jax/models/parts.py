"""Parameters in parts: a tree of nested dicts divided by the names of its leaves, and put together again.

What is trained and what is frozen, a decoder and the head on it: every such division is made here, by one rule, a
regular expression over whole paths such as `layers/block/q/kernel`. Where the last layers alone are trained, theirs
lie apart (`layers/last`), beside the stack of all, whose own last layers are then out of use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]
LAYERS, BLOCK, LAST = "layers", "block", "last"  # the layers of a decoder, stacked; the last of them, apart


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


def split_layers(tree: Mapping[str, Any], pattern: str) -> tuple[Tree, Tree]:
    """`split`, where `pattern` may also name layers of a stack by their numbers: `layers/3/q/kernel`. Of a stack of
    which the last layers alone match, those are copied to `layers/last`, and all of it is in the rest. Where the tree
    has the same layers apart already, it is those.

    Raises:
        ValueError: it names layers that are not the last ones, or not the same of every stack that it divides.
    """
    if LAST in tree.get(LAYERS, {}):
        below = {**tree, LAYERS: {BLOCK: tree[LAYERS][BLOCK]}}
        matching, rest = split_layers(below, pattern)
        if _shapes(matching.get(LAYERS, {}).get(LAST, {})) != _shapes(tree[LAYERS][LAST]):
            return split_layers(joined(tree), pattern)
        return {**matching, LAYERS: {**matching[LAYERS], LAST: tree[LAYERS][LAST]}}, rest
    stacked, rule = f"{LAYERS}/{BLOCK}/", re.compile(pattern)
    hits = {
        path: [i for i in range(leaf.shape[0]) if rule.fullmatch(f"{LAYERS}/{i}/{path.removeprefix(stacked)}")]
        for path, leaf in paths(tree).items()
        if path.startswith(stacked) and not rule.fullmatch(path)
    }
    everywhere = [re.escape(path) for path, found in hits.items() if len(found) == paths(tree)[path].shape[0]]
    matching, rest = split(tree, "|".join([f"(?:{pattern})", *everywhere]))
    some = {path: found for path, found in hits.items() if found and path in paths(rest)}
    if not some:
        return matching, rest
    depth = max(paths(tree)[path].shape[0] for path in some)
    for path, found in some.items():
        if found != list(range(depth - len(found), depth)) or len(found) != len(next(iter(some.values()))):
            raise ValueError(
                f"layers {found} of {path}, {depth} in all: only the last layers can be trained alone, and as many of "
                "each; name them from the first of them to the last, as layers/(2|3)/.* of 4"
            )
    own = {path.replace(f"/{BLOCK}/", f"/{LAST}/", 1): paths(rest)[path][found[0] :] for path, found in some.items()}
    return merge(matching, nested(own)), rest


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in paths(tree).items()}


def last_layers(layers: Mapping[str, Any]) -> tuple[int, Tree, Tree]:
    """Of layers of which the last lie apart: how many those are; the others, and those, each as a stack."""
    own = layers[LAST]
    count = jax.tree.leaves(own)[0].shape[0]
    first = jax.tree.map(lambda x: x[: x.shape[0] - count], layers[BLOCK])
    under = {path: x[x.shape[0] - count :] for path, x in paths(layers[BLOCK]).items() if path not in paths(own)}
    return count, first, merge(own, nested(under))


def joined(params: Mapping[str, Any]) -> Tree:
    """The same parameters with all layers in one stack."""
    if LAST not in params[LAYERS]:
        return dict(params)
    _, first, last = last_layers(params[LAYERS])
    return {**params, LAYERS: {BLOCK: jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, last)}}
