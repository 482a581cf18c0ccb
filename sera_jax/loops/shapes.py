"""Shapes of batches that rounds share."""

from __future__ import annotations

import dataclasses

from sera_jax.data.batches import PairLoader
from sera_jax.data.planning import NO_SHAPES, Shapes


@dataclasses.dataclass
class PairShapes:
    """Shapes of pair batches that earlier rounds made, so that later ones use them again and compile nothing.

    It grows where a loader is made, not where it trains, so a restart that skips a round still arrives at the same
    shapes.
    """

    known: Shapes = NO_SHAPES
    window: int = 0

    def note(self, loader: PairLoader, window: int) -> None:
        self.known, self.window = loader.shapes, max(self.window, window)
