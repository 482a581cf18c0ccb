"""Batches by step number: preference pairs, demonstrations, and pools that are scored once. Numpy only.

`loader.batch(step)` is a pure function of the loader's arguments and the step (epoch = step // steps_per_epoch), so a
restart needs no iterator state. Rows are ordered so that every array reshapes to [A, R / A, ...] for A microbatches of
similar work.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from sera_jax.core import Mean, PairBatch, Rows
from sera_jax.data.items import Item, PairItem, lengths_of
from sera_jax.data.packing import (
    Layout,
    Packed,
    RowSpec,
    build_rows,
    check_sizes,
    laid_tokens,
    merge_specs,
    pack,
    padding_fraction,
    spec_for,
)
from sera_jax.data.planning import NO_SHAPES, Shapes, Step, deal_rows
from sera_jax.data.steps import ORDERS, Entries, StepPlanner
from sera_jax.data.stored import Pairs, parts_of


@dataclasses.dataclass(frozen=True)
class Batch:
    """One training step of pairs.

    Attributes:
        step: the step asked for.
        batch: arrays (numpy); `batch.weight` has one nonzero entry for each pair.
        index: i32[R, Q] entry of the loader's `pairs` that each pair belongs to; -1 where the place is filling.
        ids: record id of each entry in the step, in row order.
        padding_fraction: share of the R x T tokens that is padding, rounding of R included.
        tokens: R x T.
        real_tokens: those that are not padding.
        metrics: what the log says of how the batch was made.
        spent: what making it cost, by kind (`loops.cost`).
    """

    step: int
    batch: PairBatch
    index: np.ndarray
    ids: list[str]
    padding_fraction: float
    tokens: int
    real_tokens: int
    metrics: Mapping[str, Mean] = dataclasses.field(default_factory=dict)
    spent: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def arrays(self) -> PairBatch:
        """What a training step takes."""
        return self.batch


@dataclasses.dataclass(frozen=True)
class ItemBatch:
    """One training step of demonstrations; fields as in `Batch`.

    Attributes:
        rows: the packed rows (numpy).
        weight: f32[R, K] 1 for each item's response, 0 for an empty slot.
        index: i32[R, K] entry of the loader's `items`; -1 where the slot is empty.
    """

    step: int
    rows: Rows
    weight: np.ndarray
    index: np.ndarray
    ids: list[str]
    padding_fraction: float
    tokens: int
    real_tokens: int
    metrics: Mapping[str, Mean] = dataclasses.field(default_factory=dict)
    spent: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def arrays(self) -> tuple[Rows, np.ndarray]:
        """What a training step takes."""
        return self.rows, self.weight


class _Loader:
    """What both loaders share: the plan, made where it is first asked for, its shapes, and laying a step's rows."""

    def __init__(self, entries: Entries, layout: Layout, *, batch_size: int, order: str, **how: Any) -> None:
        if not len(entries.items):
            raise ValueError("nothing to plan: no items were given; look at the loading report for what was dropped")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is unknown; choose one of {', '.join(ORDERS)}")
        check_sizes(entries.sizes, entries.items, layout.row_tokens, layout.share_prompt)
        self._layout = layout
        self.steps_per_epoch = -(-int(np.maximum(entries.counts, 1).sum()) // batch_size)
        self._plan = lambda: StepPlanner(entries, layout, batch_size=batch_size, order=order, **how)

    @functools.cached_property
    def _planner(self) -> StepPlanner:
        return self._plan()

    @property
    def shapes(self) -> Shapes:
        """What the batches are planned for, whatever the devices; hand it to the next round's loader as `known`."""
        return self._planner.shapes

    @property
    def compiled(self) -> set[tuple[int, int, int, int, int]]:
        """(R, T, M, K, Q) of every batch that there can be: as many compilations of the step."""
        return {(self._layout.laid(rows), *dataclasses.astuple(self.spec)) for rows in self.shapes.sizes}

    @property
    def spec(self) -> RowSpec:
        spec = self._planner.shapes.spec
        assert spec is not None
        return spec

    def _lay(self, step: int) -> tuple[Step, list[list[int]], Packed]:
        plan, size = self._planner.step(step)
        share_prompt = self._layout.share_prompt
        items = [unit.item for unit in plan.units]
        work = [sum(laid_tokens(items[i], share_prompt) for i in row) for row in plan.rows]
        rows = deal_rows(plan.rows, work, self._layout.dealt, size)
        return plan, rows, build_rows(items, rows, self.spec, size, share_prompt)


def _given_one_by_one(pairs: Sequence[PairItem]) -> Sequence[PairItem]:
    """Those that may be anything: stored ones have each a pair of weight 1."""
    return () if isinstance(pairs, Pairs) else pairs


class PairLoader(_Loader):
    """Batches of exactly `batch_size` preference pairs.

    A step holds `batch_size` pairs whatever their lengths (the last of an epoch those that are left); an entry with
    several pairs may be split over two steps, each with a copy of the prompt and the responses its pairs need.
    With order `shuffle`, an epoch is a fresh permutation in which a few entries are then exchanged between steps so
    that each step fills its rows (see `planning.balance`); with `given`, every epoch is in the order of `pairs`.

    Args:
        pairs: the pool; each entry has at least one pair and a positive weight.
        batch_size: pairs of a step.
        stream_indices: what names this loader's shuffle besides the seed, for instance the round.
        known: shapes of earlier rounds, which are compiled: their sizes of R count among `layout.max_shapes`, one more
            is made only if nothing fits; their row spec grows if an entry does not fit.
        order: `shuffle` or `given` (a curriculum).

    Raises:
        ValueError: an entry does not fit a row, has no pair or no positive weight; or a bad argument.
    """

    def __init__(
        self,
        pairs: Sequence[PairItem],
        layout: Layout,
        *,
        batch_size: int,
        seed: int,
        stream_indices: tuple[int, ...] = (),
        known: Shapes = NO_SHAPES,
        order: str = "shuffle",
    ) -> None:
        for pair in itertools.chain(*map(_given_one_by_one, parts_of(pairs))):
            if not pair.pairs or pair.weight <= 0:
                raise ValueError(
                    f"entry {pair.item.id!r} has {len(pair.pairs)} pairs and weight {pair.weight}; "
                    f"every entry needs a pair and a weight above 0, leave it out otherwise"
                )
        how = dict(batch_size=batch_size, seed=seed, stream_indices=stream_indices, known=known, order=order)
        super().__init__(Entries.of_pairs(pairs, layout.share_prompt), layout, **how)
        self._pairs = pairs

    def batch(self, step: int) -> Batch:
        """The batch of any step >= 0."""
        plan, rows, packed = self._lay(step)
        size, count = len(rows), self.spec.pairs
        chosen, rejected = (np.zeros((size, count), np.int32) for _ in range(2))
        weight = np.zeros((size, count), np.float32)
        index = np.full((size, count), -1, np.int32)
        ref_logp = np.zeros(packed.item.shape, np.float32)
        ids = []
        for r, row in enumerate(rows):
            base = q = 0
            for i in row:
                unit = plan.units[i]
                pair = self._pairs[unit.index]
                ids.append(unit.item.id)
                end = q + len(unit.pairs)
                chosen[r, q:end] = [base + c for c, _ in unit.pairs]
                rejected[r, q:end] = [base + j for _, j in unit.pairs]
                weight[r, q:end] = pair.weight
                index[r, q:end] = unit.index
                if pair.ref_logp is not None:
                    ref_logp[r, base : base + len(unit.kept)] = np.asarray(pair.ref_logp)[list(unit.kept)]
                base, q = base + len(unit.kept), end
        batch = PairBatch(packed.rows, chosen, rejected, weight, ref_logp)
        return Batch(step, batch, index, ids, *_token_counts(packed.rows))


class ItemLoader(_Loader):
    """Batches of exactly `batch_size` items with one response each: demonstrations, or texts to pretrain on.

    A text is an item whose prompt is the BOS token and whose response is the rest. Arguments as in `PairLoader`.

    Raises:
        ValueError: an item does not fit a row or has not exactly one response; or a bad argument.
    """

    def __init__(
        self,
        items: Sequence[Item],
        layout: Layout,
        *,
        batch_size: int,
        seed: int,
        stream_indices: tuple[int, ...] = (),
        known: Shapes = NO_SHAPES,
        order: str = "shuffle",
    ) -> None:
        counts = lengths_of(items).counts
        for i in np.flatnonzero(counts != 1)[:1]:
            raise ValueError(f"item {items[int(i)].id!r} has {counts[i]} responses; a demonstration has exactly 1")
        layout = dataclasses.replace(layout, share_prompt=True)  # with one response each the same, and one packing
        how = dict(batch_size=batch_size, seed=seed, stream_indices=stream_indices, known=known, order=order)
        super().__init__(Entries.of_items(items, True), layout, **how)

    def batch(self, step: int) -> ItemBatch:
        """The batch of any step >= 0."""
        plan, rows, packed = self._lay(step)
        full = packed.item >= 0
        entries = np.array([unit.index for unit in plan.units], np.int32)
        index = np.where(full, entries[packed.item], -1).astype(np.int32)
        ids = [plan.units[i].item.id for row in rows for i in row]
        return ItemBatch(step, packed.rows, full.astype(np.float32), index, ids, *_token_counts(packed.rows))


def _token_counts(rows: Rows) -> tuple[float, int, int]:
    return padding_fraction(rows), int(rows.segment.size), int(np.count_nonzero(rows.segment))


class ScoreBatches(Sequence[Packed]):
    """A pool packed once into batches of one constant shape; each batch is built when it is asked for.

    `spec` is the row spec.
    """

    def __init__(
        self, items: Sequence[Item], layout: Layout, rows_per_batch: int, *, spec: RowSpec | None = None
    ) -> None:
        if rows_per_batch < 1:
            raise ValueError(f"rows_per_batch={rows_per_batch} must be at least 1")
        self._items, self._size, self._share_prompt = items, rows_per_batch, layout.share_prompt
        length = layout.row_tokens
        if spec is None:
            self._rows = pack(items, length, layout.share_prompt)
            self.spec = spec_for(items, self._rows, length)
        else:
            self.spec = merge_specs(spec, spec_for(items, [[i] for i in range(len(items))], length))
            self._rows = pack(items, length, layout.share_prompt, self.spec)

    @property
    def compiled(self) -> set[tuple[int, int, int, int, int]]:
        """The one (R, T, M, K, Q) of all batches."""
        return {(self._size, *dataclasses.astuple(self.spec))}

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    @overload
    def __getitem__(self, index: int) -> Packed: ...
    @overload
    def __getitem__(self, index: slice) -> list[Packed]: ...
    def __getitem__(self, index: int | slice) -> Packed | list[Packed]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = index % len(self) * self._size
        rows = self._rows[start : start + self._size]
        return build_rows(self._items, rows, self.spec, self._size, self._share_prompt)


def score_batches(
    items: Sequence[Item], layout: Layout, rows_per_batch: int, spec: RowSpec | None = None
) -> ScoreBatches:
    """Pack a pool to score every response once; all batches have the same shape, the last is filled with empty rows.

    Give the scores [R, K] of each batch, in order, to `packing.gather_scores` with the same batches and items.

    Args:
        spec: of earlier calls, so that the shape repeats; grows if an item does not fit.

    Raises:
        ValueError: an item does not fit a row.
    """
    return ScoreBatches(items, layout, rows_per_batch, spec=spec)
