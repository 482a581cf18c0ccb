"""Which tensors a checkpoint of a config has, and which of our parameters lie in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params
from sera_jax.models.families import family_of
from sera_jax.models.family import Tensor


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of our parameters lie in one tensor of the file, in which layer, and its shape in the file."""

    tensors: tuple[Tensor, ...]
    layer: int | None
    shape: tuple[int, ...]


def places_of(cfg: ModelConfig) -> dict[str, Place]:
    """Every tensor of a checkpoint of this config, in the family's order, layer by layer."""
    shapes = abstract_params(cfg)
    places: dict[str, Place] = {}
    table: dict[str, list[Tensor]] = {}
    for tensor in family_of(cfg.family).tensors:
        if leaf_at(shapes, tensor.path) is not None:
            table.setdefault(tensor.name, []).append(tensor)
    of_layers = [name for name in table if table[name][0].stacked]
    names = list(table)
    first, last = names.index(of_layers[0]), names.index(of_layers[-1]) + 1

    def add(name: str, layer: int | None) -> None:
        parts = table[name]
        shape = list(leaf_at(shapes, parts[0].path).shape[0 if layer is None else 1 :])
        if parts[0].rows is not None:
            shape[-1] = sum(len(part.rows(cfg)) for part in parts if part.rows)
        shape = tuple(reversed(shape)) if parts[0].transpose else tuple(shape)
        places[name.format(layer=layer)] = Place(tuple(parts), layer, shape)

    for name in names[:first]:
        add(name, None)
    for layer in range(cfg.num_hidden_layers):
        for name in names[first:last]:
            add(name, layer)
    for name in names[last:]:
        add(name, None)
    return places


def leaf_at(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf at `a/b/c`, or None."""
    node: Any = tree
    for part in path.split("/"):
        if part not in node:
            return None
        node = node[part]
    return node
