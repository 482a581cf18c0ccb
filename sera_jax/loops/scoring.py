"""Batches of rows through a scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sera_jax.data.batches import ScoreBatches
from sera_jax.data.items import Item, lengths_of
from sera_jax.data.packing import Packed
from sera_jax.loops.endings import NonFinite, Preempted
from sera_jax.models.decoder import Params
from sera_jax.training.score import place_rows


class Scored(NamedTuple):
    """A batch, its number, and the f32[R, K] scores of its slots."""

    number: int
    packed: Packed
    values: np.ndarray


def scored(
    score: Callable[..., jax.Array],
    params: Params,
    batches: ScoreBatches,
    numbers: Iterable[int],
    mesh: Mesh,
    check_stop: Callable[[], None],
) -> Iterator[Scored]:
    """The batches of these numbers, in their order. While the devices work on one the next is laid, and the scores of
    the one before are fetched.

    Args:
        check_stop: asked before each; a Preempted of it is raised once all that was begun is handed out.
    """
    waiting: tuple[int, Packed, jax.Array] | None = None
    stopped: Preempted | None = None
    for number in numbers:
        try:
            check_stop()
        except Preempted as stop:
            stopped = stop
            break
        packed = batches[number]
        coming = number, packed, score(params, place_rows(packed.rows, mesh))
        if waiting is not None:
            yield _fetched(*waiting)
        waiting = coming
    if waiting is not None:
        yield _fetched(*waiting)
    if stopped is not None:
        raise stopped


def _fetched(number: int, packed: Packed, values: jax.Array) -> Scored:
    return Scored(number, packed, jax.device_get(values))


def refuse_nonfinite(flat: np.ndarray, items: Sequence[Item], what: str, look_at: str) -> None:
    """Raises NonFinite for the first of the scores f32[...] of all responses of all items that is not finite."""
    for bad in np.flatnonzero(~np.isfinite(flat))[:1]:
        index = int(np.searchsorted(np.cumsum(lengths_of(items).counts), bad, side="right"))
        raise NonFinite(f"{what} of record {items[index].id!r} is not finite; look at {look_at}")
