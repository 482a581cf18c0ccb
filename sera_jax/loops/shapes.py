"""Shapes of pair batches that earlier rounds made, so that later ones use them again and compile nothing."""

from __future__ import annotations

import dataclasses
import pathlib

from sera_jax.checkpoint.papers import read_json, write_json
from sera_jax.data.packing import RowSpec
from sera_jax.data.planning import NO_SHAPES, Shapes

FILE = "shapes.json"  # of a round's product: what its batches were planned for


@dataclasses.dataclass
class PairShapes:
    """What the rounds so far were planned for; `window`: no item of theirs is longer."""

    known: Shapes = NO_SHAPES
    window: int = 0


def write(folder: pathlib.Path, shapes: Shapes) -> None:
    write_json(folder / FILE, dataclasses.asdict(shapes))


def read(folder: pathlib.Path) -> Shapes | None:
    """What `write` wrote; None where nothing did."""
    found = read_json(folder / FILE)
    return Shapes(tuple(found["sizes"]), RowSpec(**found["spec"])) if found else None
