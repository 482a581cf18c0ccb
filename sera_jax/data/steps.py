"""Epochs of steps, planned from the sizes of a pool alone; items are made where a step is asked for. Numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from sera_jax.core import Stream, rng_for
from sera_jax.data.fitting import Fitted, fit_all, least_rows
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import Layout, RowSpec, merge_specs, room_of, rounded_spec, sizes_of
from sera_jax.data.planning import (
    Shapes,
    Step,
    Unit,
    balance,
    choose_sizes,
    cut_steps,
    cut_unit,
    round_up,
    row_shares,
    step_targets,
)
from sera_jax.data.stored import Joined, Pairs, items_of, pair_counts

ORDERS = ("shuffle", "given")
# Rows of a step left free, since packing a few items cannot fill every row to the last token: the loader takes the
# one that needs the fewest rows, small where items are small against the row, large where they are not.
_SLACKS = (0.1, 0.25, 0.5)


@dataclasses.dataclass(frozen=True)
class Entries:
    """A pool as it is planned.

    Attributes:
        items: of each entry. pairs: (entry) -> its (chosen, rejected) indices, none for a demonstration.
        counts: i64[n] pairs of each entry; 0 for a demonstration.
        sizes: i64[n, 4] of the entries, cut to the responses that their pairs need.
    """

    items: Sequence[Item]
    pairs: Callable[[int], tuple[tuple[int, int], ...]]
    counts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of_pairs(cls, pairs: Sequence[PairItem], share_prompt: bool) -> Entries:
        sizes = _sizes_of_pairs(pairs, share_prompt)
        return cls(items_of(pairs), lambda entry: pairs[entry].pairs, pair_counts(pairs), sizes)

    @classmethod
    def of_items(cls, items: Sequence[Item], share_prompt: bool) -> Entries:
        return cls(items, lambda entry: (), np.zeros(len(items), np.int64), sizes_of(items, share_prompt))


def _sizes_of_pairs(pairs: Sequence[PairItem], share_prompt: bool) -> np.ndarray:
    """i64[n, 4] of entries that are cut to the responses that their pairs need."""
    if isinstance(pairs, Joined):
        return np.concatenate([_sizes_of_pairs(part, share_prompt) for part in pairs.parts])
    items = items_of(pairs)
    if not isinstance(pairs, Pairs):
        items = [cut_unit(0, pair.item, pair.pairs, 0, len(pair.pairs)).item for pair in pairs]
    return sizes_of(items, share_prompt, pair_counts(pairs))


class _Composed(NamedTuple):
    """The units of an epoch, and those of each step.

    Attributes:
        cuts: i64[units, 3] (entry, first pair, end pair). sizes: i64[units, 4].
        steps: unit indices of each step.
    """

    cuts: np.ndarray
    sizes: np.ndarray
    steps: list[np.ndarray]


class _Plan(NamedTuple):
    """Steps and the rows of each; `order`: which of them stands at each place of the epoch."""

    composed: _Composed
    rows: list[Fitted]
    order: np.ndarray


class StepPlanner:
    """Plans epochs of steps: a pure function of its arguments and the epoch, so a restart needs no iterator state.

    Attributes:
        steps_per_epoch: steps of an epoch; the last one may be partial.
        shapes: the one row spec of all steps, and the row counts that they are planned for, chosen on the first epoch
            and kept; on the devices at hand a step is laid in `layout.laid` of them.
    """

    def __init__(
        self,
        entries: Entries,
        layout: Layout,
        *,
        batch_size: int,
        seed: int,
        stream_indices: tuple[int, ...],
        known: Shapes,
        order: str,
    ) -> None:
        self._entries, self._layout, self._batch_size = entries, layout, batch_size
        self._counts = np.maximum(entries.counts, 1)
        self._seed, self._indices, self._shuffle = seed, stream_indices, order == "shuffle"
        self._sizes = entries.sizes
        self._shares = row_shares(self._sizes[:, 0], layout.row_tokens)
        self._epochs: dict[int, _Plan] = {}

        self._slack = _SLACKS[0]
        composed = self._compose(0)
        self.steps_per_epoch = len(composed.steps)
        loose = fit_all(composed.sizes, composed.steps, room_of(layout.row_tokens, None))
        self._spec = self._choose_spec(composed, loose, known.spec)
        self._first = self._choose_slack(composed, self._fit(composed, self._spec, loose), known)
        self._epochs[0] = self._first

    def step(self, step: int) -> tuple[Step, int]:
        """The contents of a step >= 0 and the number of rows it is laid in."""
        if step < 0:
            raise ValueError(f"step={step} must be at least 0")
        epoch, place = divmod(step, self.steps_per_epoch)
        plan = self._plan(epoch if self._shuffle else 0)
        at = int(plan.order[place])
        cuts = plan.composed.cuts[plan.composed.steps[at]]
        size = round_up(len(plan.rows[at]), self.shapes.sizes)
        assert size is not None, "every planned step fits the largest size"
        return Step(tuple(self._unit(*cut) for cut in cuts.tolist()), plan.rows[at]), self._layout.laid(size)

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._epochs:
            composed = self._compose(epoch)
            rows = self._fit(composed, self._spec)
            plan = _Plan(composed, rows, np.arange(len(rows)))
            if max(map(len, rows)) > self.shapes.sizes[-1]:
                # This shuffle needs more rows than are compiled; the first epoch's steps in another order do not.
                rng = rng_for(self._seed, Stream.SHUFFLE, *self._indices, epoch)
                full = len(rows) - int(self._counts.sum() % self._batch_size > 0)
                order = np.concatenate([rng.permutation(full), np.arange(full, len(rows))])
                plan = self._first._replace(order=order)
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = plan
        return self._epochs[epoch]

    def _fit(self, composed: _Composed, spec: RowSpec, loose: Sequence[Fitted] | None = None) -> list[Fitted]:
        """The rows of every step within the spec; `loose`: those that tokens alone allow, where they are known.

        Where these lie within the spec they are what is asked for: no limit was met on the way to them.
        """
        room = room_of(self._layout.row_tokens, spec)
        if loose is None:
            loose = fit_all(composed.sizes, composed.steps, room[:1])
        over = np.flatnonzero((_most(composed, loose) > room[1:]).any(1)).tolist()
        rows = list(loose)
        for step, tight in zip(over, fit_all(composed.sizes, [composed.steps[s] for s in over], room), strict=True):
            rows[step] = tight
        return rows

    def _unit(self, index: int, start: int, end: int) -> Unit:
        return cut_unit(index, self._entries.items[index], self._entries.pairs(index), start, end)

    def _compose(self, epoch: int) -> _Composed:
        count = len(self._counts)
        order = np.arange(count)
        if self._shuffle:
            order = rng_for(self._seed, Stream.SHUFFLE, *self._indices, epoch).permutation(count)
        composed = self._cut(order)
        if self._shuffle:
            self._balance(composed)
        return composed

    def _cut(self, order: np.ndarray) -> _Composed:
        """The entries in this order, cut into steps."""
        if (self._counts == 1).all():
            cuts = np.stack([order, np.zeros_like(order), np.ones_like(order)], axis=1)
            ends = np.minimum(np.arange(self._batch_size, len(order) + self._batch_size, self._batch_size), len(order))
        else:
            steps = cut_steps(self._counts.tolist(), order.tolist(), self._batch_size)
            cuts, ends = np.array([cut for step in steps for cut in step]), np.cumsum([len(step) for step in steps])
        sizes = self._sizes[cuts[:, 0]]
        parts = np.flatnonzero(cuts[:, 2] - cuts[:, 1] < self._counts[cuts[:, 0]])
        if len(parts):
            units = [self._unit(*cuts[part].tolist()) for part in parts]
            pairs = [len(unit.pairs) for unit in units]
            sizes[parts] = sizes_of([unit.item for unit in units], self._layout.share_prompt, pairs)
        return _Composed(cuts, sizes, np.split(np.arange(len(cuts)), ends[:-1]))

    def _balance(self, composed: _Composed) -> None:
        """Exchange units between the steps, in place."""
        cuts, sizes, steps = composed
        cost = self._shares[cuts[:, 0]] * sizes[:, 0] / np.maximum(self._sizes[cuts[:, 0], 0], 1)
        kind = cuts[:, 2] - cuts[:, 1]
        target = step_targets(
            np.array([cost[step].sum() for step in steps]),
            np.array([kind[step].sum() for step in steps]),
            self._batch_size,
            spread=float(cost.std() * np.sqrt(len(cuts) / len(steps))),
            multiple=self._layout.planned,
            slack=self._slack,
        )
        balance(steps, cost, kind, target)

    def _choose_slack(self, composed: _Composed, rows: list[Fitted], known: Shapes) -> _Plan:
        """The first epoch with the slack that needs the fewest rows; `rows` are those of the first slack.

        One that could not need fewer, since its items take as many, is not tried.
        """
        layout, had = self._layout, set(known.sizes)

        def sized(needed: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
            sizes = choose_sizes(needed, multiple=layout.planned, most=layout.max_shapes, known=known.sizes)
            return sum(round_up(n, sizes) or 0 for n in needed), len(set(sizes) - had), sizes

        best, plan = sized([len(step) for step in rows]), _Plan(composed, rows, np.arange(len(rows)))
        chosen = _SLACKS[0]
        for slack in _SLACKS[1:] if self._shuffle else ():
            self._slack = slack
            composed = self._compose(0)
            room = room_of(layout.row_tokens, self._spec)
            least = sized([least_rows(composed.sizes[step], room) for step in composed.steps])
            if least[0] > best[0] or (least[0] == best[0] and best[1] == 0):
                continue
            rows = self._fit(composed, self._spec)
            found = sized([len(step) for step in rows])
            if found[:2] < best[:2]:
                best, chosen, plan = found, slack, _Plan(composed, rows, np.arange(len(rows)))
        self._slack = chosen
        self.shapes = Shapes(best[2], self._spec)
        return plan

    def _choose_spec(self, composed: _Composed, loose: Sequence[Fitted], given: RowSpec | None) -> RowSpec:
        """A given spec, grown to hold the largest item; else the fewest scored positions that cost no further row."""
        row_tokens, rows = self._layout.row_tokens, sum(map(len, loose))
        least = rounded_spec(row_tokens, self._sizes[:, 1:])
        if given is not None:
            return merge_specs(given, least)
        spec = merge_specs(least, rounded_spec(row_tokens, _most(composed, loose)))
        for scored in range(least.scored, spec.scored, max(row_tokens // 8, 1)):
            limits = dataclasses.replace(spec, scored=scored)
            if self._takes_no_more(composed, limits, loose, rows):
                return limits
        return spec

    def _takes_no_more(self, composed: _Composed, spec: RowSpec, loose: Sequence[Fitted], most: int) -> bool:
        """Whether the steps take at most so many rows within the spec; as soon as they cannot, no further is packed."""
        room = room_of(self._layout.row_tokens, spec)
        over = np.flatnonzero((_most(composed, loose) > room[1:]).any(1))
        count = np.array([len(rows) for rows in loose])
        count[over] = [least_rows(composed.sizes[composed.steps[step]], room) for step in over]
        for start in range(0, len(over), 64):
            if count.sum() > most:
                return False
            some = over[start : start + 64]
            fitted = fit_all(composed.sizes, [composed.steps[step] for step in some], room)
            count[some] = [len(rows) for rows in fitted]
        return bool(count.sum() <= most)


def _most(composed: _Composed, fitted: Sequence[Fitted]) -> np.ndarray:
    """i64[steps, 3]: the most scored positions, slots and pairs of any row of each step."""
    most = np.zeros((len(fitted), 3), np.int64)
    for step, (units, rows) in enumerate(zip(composed.steps, fitted, strict=True)):
        order = units[[place for row in rows for place in row]]
        starts = np.cumsum([0, *map(len, rows[:-1])])
        most[step] = np.add.reduceat(composed.sizes[order, 1:], starts).max(0)
    return most
