"""Which item goes into which step, and how many rows a step has. Numpy only; knows no loader and no model.

Which items a step takes does not depend on the devices: a run that goes on with more or fewer of them makes the same
updates. Their number only rounds up the rows of a step.

A step takes a fixed number of pairs, so its tokens vary, and with them the rows it needs: rounding these up to a few
sizes would cost more padding than packing saves. So a shuffled epoch is balanced: a few items are exchanged between
steps until every step just fills a whole number of rows.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sera_jax.core import Stream, rng_for
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout, RowSpec, laid_tokens, merge_specs, pack, spec_for

ORDERS = ("shuffle", "given")
# Rows of a step left free, since packing a few items cannot fill every row to the last token: the loader takes the
# one that needs the fewest rows, small where items are small against the row, large where they are not.
_SLACKS = (0.1, 0.25, 0.5)
_TOLERANCE_ROWS = 0.02
_SPREAD = 1.5  # the standard deviation of the steps' work may become this many times what a plain shuffle gives


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes that a kind of batch is planned for.

    Attributes:
        sizes: the numbers of rows, ascending.
        spec: (T, M, K, Q) of every row; None before the first batch.
    """

    sizes: tuple[int, ...] = ()
    spec: RowSpec | None = None


NO_SHAPES = Shapes()


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a step holds of one entry of the pool: the item cut to the responses that these pairs need.

    Attributes:
        index: entry of the pool.
        item: prompt and the needed responses.
        pairs: (chosen, rejected) indices into `item.responses`; empty for a demonstration.
        kept: for each of `item.responses`, its index in the entry's own responses.
        count: what the unit adds to the step's size: its pairs, or 1 for a demonstration.
    """

    index: int
    item: Item
    pairs: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class Step:
    """The units of a step and the rows (unit indices) they are packed into."""

    units: tuple[Unit, ...]
    rows: tuple[tuple[int, ...], ...]


def cut_unit(index: int, item: Item, pairs: tuple[tuple[int, int], ...], start: int, end: int) -> Unit:
    """The pairs [start, end) of an entry, with only the responses that they need; all of them if it has no pairs."""
    if not pairs:
        return Unit(index, item, (), tuple(range(len(item.responses))), 1)
    pairs = pairs[start:end]
    kept = tuple(sorted({response for pair in pairs for response in pair}))
    place = {response: k for k, response in enumerate(kept)}
    cut = Item(item.id, item.prompt, tuple(item.responses[k] for k in kept))
    return Unit(index, cut, tuple((place[c], place[r]) for c, r in pairs), kept, end - start)


def cut_steps(counts: Sequence[int], order: Sequence[int], size: int) -> list[list[tuple[int, int, int]]]:
    """Cut a sequence of entries into steps of exactly `size` pairs; an entry may be split over steps.

    Args:
        counts: pairs of each entry.
        order: entries in the order of the epoch.

    Returns:
        Per step (entry, first pair, end pair); only the last step may hold fewer than `size` pairs.
    """
    steps: list[list[tuple[int, int, int]]] = [[]]
    room = size
    for entry in order:
        start = 0
        while start < counts[entry]:
            if not room:
                steps.append([])
                room = size
            end = min(counts[entry], start + room)
            steps[-1].append((int(entry), start, end))
            room -= end - start
            start = end
    return steps


def row_shares(items: Sequence[Item], row_tokens: int, share_prompt: bool) -> np.ndarray:
    """f64[n] rows that each item costs: its share of the row it lands in when the whole pool is packed.

    An item that leaves no room for a neighbour costs its whole row, whatever its tokens.
    """
    tokens = np.array([laid_tokens(item, share_prompt) for item in items], np.float64)
    shares = np.zeros(len(items))
    for row in pack(items, row_tokens, share_prompt):
        shares[row] = tokens[row] / max(tokens[row].sum(), 1)
    return shares


def step_targets(
    costs: np.ndarray, counts: np.ndarray, batch_size: int, *, spread: float, multiple: int, slack: float
) -> np.ndarray:
    """f64[steps] rows of work that each step should have after balancing.

    Full steps get one of two neighbouring multiples of `multiple`, less some slack, in the proportion that holds the
    epoch's work; the steps that are heavy by chance get the larger. If that would push steps apart by clearly more
    than chance does (`multiple` is large against the rows of a step), all full steps get the mean. A partial last step
    gets its share of the mean, so that it needs as many rows in every epoch.

    Args:
        costs: f64[steps] rows of work of each step before balancing.
        counts: i64[steps] pairs of each step; `batch_size` except for the last.
        spread: standard deviation of a full step's cost under shuffling, in rows.
        multiple: a step has a multiple of this many rows.
        slack: rows of a step to leave free.
    """
    mean = float(costs.sum() / counts.sum()) * batch_size
    target = mean * counts / batch_size
    full = counts == batch_size
    low = int((mean + slack) // multiple) * multiple
    heavy = int(np.ceil((mean + slack - low) / multiple * full.sum() - 1e-9))
    share = min(heavy / max(full.sum(), 1), 1.0)
    if low == 0 or not full.any() or np.sqrt(share * (1 - share)) * multiple > _SPREAD * spread:
        return target
    ranked = np.flatnonzero(full)[np.argsort(-costs[full], kind="stable")]
    target[ranked] = low - slack
    target[ranked[:heavy]] += multiple
    target[full] += mean - target[full].mean()
    return target


def balance(groups: list[list[int]], cost: np.ndarray, kind: np.ndarray, target: np.ndarray) -> int:
    """Exchange units between groups, in place, until each group's cost is near its target; returns the exchanges.

    Each exchange takes the group most above and the one most below its target, and the two units of one kind whose
    exchange brings both closest, so few units move.

    Args:
        groups: unit indices of each step.
        cost: f64[units] rows of work.
        kind: i64[units] only units of equal kind (number of pairs) are exchanged.
        target: f64[groups].
    """
    excess = np.array([cost[g].sum() for g in groups]) - target
    exchanges = 0
    for _ in range(8 * len(groups)):
        over, under = int(np.argmax(excess)), int(np.argmin(excess))
        if excess[over] < _TOLERANCE_ROWS and excess[under] > -_TOLERANCE_ROWS:
            break
        want = (excess[over] - excess[under]) / 2
        best = (abs(want), 0.0, -1, -1)
        give, take = np.array(groups[over]), np.array(groups[under])
        take_order = np.argsort(cost[take], kind="stable")
        for k in np.unique(kind[give]):
            places = take_order[kind[take[take_order]] == k]
            if not len(places):
                continue
            sources = np.flatnonzero(kind[give] == k)
            sought = cost[give[sources]] - want
            right = np.searchsorted(cost[take[places]], sought)
            for near in (np.clip(right - 1, 0, len(places) - 1), np.clip(right, 0, len(places) - 1)):
                moved = cost[give[sources]] - cost[take[places[near]]]
                b = int(np.argmin(np.abs(moved - want)))
                best = min(best, (abs(moved[b] - want), float(moved[b]), int(sources[b]), int(places[near[b]])))
        if best[2] < 0:
            break
        _, moved, i, j = best
        groups[over][i], groups[under][j] = groups[under][j], groups[over][i]
        excess[over] -= moved
        excess[under] += moved
        exchanges += 1
    return exchanges


def pack_step(units: Sequence[Unit], row_tokens: int, share_prompt: bool, limits: RowSpec | None) -> Step:
    """Pack the units of one step."""
    rows = pack([u.item for u in units], row_tokens, share_prompt, limits, [len(u.pairs) for u in units])
    return Step(tuple(units), tuple(tuple(row) for row in rows))


def choose_sizes(needed: Sequence[int], *, multiple: int, most: int, known: Sequence[int] = ()) -> tuple[int, ...]:
    """The row counts that steps are rounded up to: those that waste the fewest rows, by dynamic programming.

    Sizes in `known` are compiled already and cost nothing; new ones are taken only while known and new together are
    at most `most`, except that a step which fits no known size forces one more.

    Args:
        needed: rows that each step needs.
        multiple: every new size is a multiple of this.
        most: sizes altogether.
        known: sizes of earlier rounds; those that are not multiples of `multiple` are of no use.

    Returns:
        The sizes in use, ascending; at least one.
    """
    known = sorted({k for k in known if k % multiple == 0 and k > 0})
    rounded = Counter(max(-(-n // multiple), 1) * multiple for n in needed)
    top = max(rounded, default=multiple)
    fresh = min(max(most - len(known), 0), len(rounded))
    if not fresh and (not known or known[-1] < top):
        fresh = 1
    sizes = sorted({*rounded, *known})  # a useful size is one that some step needs exactly, or a known one
    counts = [rounded.get(s, 0) for s in sizes]
    # best[f][j]: least rows of the steps that need at most sizes[j], if sizes[j] is in use and f fresh ones are.
    best: dict[tuple[int, int], tuple[int, int, tuple[int, ...]]] = {}
    for j, size in enumerate(sizes):
        new = int(size not in known)
        for f in range(new, fresh + 1):
            options = [(sum(counts[: j + 1]) * size, 1, (size,))]
            for i in range(j):
                if (before := best.get((f - new, i))) is not None:
                    rows = before[0] + sum(counts[i + 1 : j + 1]) * size
                    options.append((rows, before[1] + 1, (*before[2], size)))
            best[f, j] = min(options)
    ends = [best[f, j] for f in range(fresh + 1) for j in range(len(sizes)) if sizes[j] >= top and (f, j) in best]
    return min(ends)[2]


def round_up(rows: int, sizes: Sequence[int]) -> int | None:
    """The smallest of the sizes that holds the rows; None if none does."""
    return min((s for s in sizes if s >= rows), default=None)


def deal_rows(rows: Sequence[Sequence[int]], work: Sequence[int], groups: int, size: int) -> list[list[int]]:
    """Order the rows of a step, filled up with empty ones to `size`, so that its `groups` equal parts work alike.

    Rows go from heavy to light, back and forth over the groups (microbatches, and within each the data shards).

    Args:
        work: real work of each row (for instance its tokens).
        groups: divides `size`.
    """
    parts: list[list[list[int]]] = [[] for _ in range(groups)]
    ranked = sorted(range(len(rows)), key=lambda r: (-work[r], r))
    for place, r in enumerate(ranked):
        turn, within = divmod(place, groups)
        parts[groups - 1 - within if turn % 2 else within].append(list(rows[r]))
    depth = size // groups
    return [row for part in parts for row in part + [[]] * (depth - len(part))]


class StepPlanner:
    """Plans epochs of steps: a pure function of its arguments and the epoch, so a restart needs no iterator state.

    Attributes:
        steps_per_epoch: steps of an epoch; the last one may be partial.
        shapes: the one row spec of all steps, and the row counts that they are planned for, chosen on the first epoch
            and kept; on the devices at hand a step is laid in `layout.laid` of them.
    """

    def __init__(
        self,
        entries: Sequence[tuple[Item, tuple[tuple[int, int], ...]]],
        layout: Layout,
        *,
        batch_size: int,
        seed: int,
        stream_indices: tuple[int, ...],
        known: Shapes,
        order: str,
    ) -> None:
        if not entries:
            raise ValueError("nothing to plan: no items were given; look at the loading report for what was dropped")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is unknown; choose one of {', '.join(ORDERS)}")
        self._entries = entries
        self._counts = [max(len(pairs), 1) for _, pairs in entries]
        self._batch_size, self._row_tokens, self._layout = batch_size, layout.row_tokens, layout
        self._seed, self._indices = seed, stream_indices
        self._share_prompt, self._shuffle = layout.share_prompt, order == "shuffle"
        self._whole = [cut_unit(i, *entry, 0, self._counts[i]) for i, entry in enumerate(entries)]
        self._shares = row_shares([u.item for u in self._whole], self._row_tokens, self._share_prompt)
        self._epochs: dict[int, list[Step]] = {}

        self._slack = _SLACKS[0]
        first = self._compose(0)
        self.steps_per_epoch = len(first)
        self._spec = self._choose_spec(first, known.spec)
        tries = []
        for slack in _SLACKS if self._shuffle else _SLACKS[:1]:
            self._slack = slack
            steps = self._pack(self._compose(0))
            needed = [len(step.rows) for step in steps]
            sizes = choose_sizes(needed, multiple=layout.planned, most=layout.max_shapes, known=known.sizes)
            rows = sum(round_up(n, sizes) or 0 for n in needed)
            tries.append((rows, len(set(sizes) - set(known.sizes)), len(tries), slack, sizes, steps))
        *_, self._slack, sizes, self._first = min(tries, key=lambda t: t[:3])
        self.shapes = Shapes(sizes, self._spec)
        self._epochs[0] = self._first

    def step(self, step: int) -> tuple[Step, int]:
        """The contents of a step >= 0 and the number of rows it is laid in."""
        if step < 0:
            raise ValueError(f"step={step} must be at least 0")
        epoch, place = divmod(step, self.steps_per_epoch)
        plan = self._plan(epoch if self._shuffle else 0)[place]
        size = round_up(len(plan.rows), self.shapes.sizes)
        assert size is not None, "every planned step fits the largest size"
        return plan, self._layout.laid(size)

    def _plan(self, epoch: int) -> list[Step]:
        if epoch not in self._epochs:
            steps = self._pack(self._compose(epoch))
            if any(len(step.rows) > self.shapes.sizes[-1] for step in steps):
                # This shuffle needs more rows than are compiled; the first epoch's steps in another order do not.
                rng = rng_for(self._seed, Stream.SHUFFLE, *self._indices, epoch)
                full = len(steps) - (sum(self._counts) % self._batch_size > 0)
                steps = [self._first[i] for i in rng.permutation(full)] + self._first[full:]
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = steps
        return self._epochs[epoch]

    def _pack(self, steps: list[list[Unit]]) -> list[Step]:
        return [pack_step(units, self._row_tokens, self._share_prompt, self._spec) for units in steps]

    def _unit(self, index: int, start: int, end: int) -> Unit:
        if end - start == self._counts[index]:
            return self._whole[index]
        return cut_unit(index, *self._entries[index], start, end)

    def _compose(self, epoch: int) -> list[list[Unit]]:
        count = len(self._entries)
        if not self._shuffle:
            cuts = cut_steps(self._counts, range(count), self._batch_size)
            return [[self._unit(*cut) for cut in step] for step in cuts]
        order = rng_for(self._seed, Stream.SHUFFLE, *self._indices, epoch).permutation(count)
        cuts = cut_steps(self._counts, order.tolist(), self._batch_size)
        units = [self._unit(*cut) for step in cuts for cut in step]
        ends = np.cumsum([len(step) for step in cuts])
        groups = [list(range(end - len(step), end)) for end, step in zip(ends, cuts)]
        cost = np.array([self._cost(u) for u in units])
        kind = np.array([u.count for u in units])
        target = step_targets(
            np.array([cost[g].sum() for g in groups]),
            np.array([kind[g].sum() for g in groups]),
            self._batch_size,
            spread=float(cost.std() * np.sqrt(len(units) / len(groups))),
            multiple=self._layout.planned,
            slack=self._slack,
        )
        balance(groups, cost, kind, target)
        return [[units[i] for i in group] for group in groups]

    def _cost(self, unit: Unit) -> float:
        whole = laid_tokens(self._whole[unit.index].item, self._share_prompt)
        return float(self._shares[unit.index]) * laid_tokens(unit.item, self._share_prompt) / max(whole, 1)

    def _choose_spec(self, steps: list[list[Unit]], given: RowSpec | None) -> RowSpec:
        """A given spec, grown to hold the largest item; else the fewest scored positions that cost no further row."""
        items, pairs = [u.item for u in self._whole], [len(u.pairs) for u in self._whole]
        least = spec_for(items, [[i] for i in range(len(items))], self._row_tokens, pairs)
        if given is not None:
            return merge_specs(given, least)
        spec, rows = least, 0
        for units in steps:
            step = pack_step(units, self._row_tokens, self._share_prompt, None)
            rows += len(step.rows)
            spec = merge_specs(
                spec, spec_for([u.item for u in units], step.rows, self._row_tokens, [len(u.pairs) for u in units])
            )
        for scored in range(least.scored, spec.scored, max(self._row_tokens // 8, 1)):
            limits = dataclasses.replace(spec, scored=scored)
            packed = [pack_step(units, self._row_tokens, self._share_prompt, limits) for units in steps]
            if sum(len(step.rows) for step in packed) <= rows:
                return limits
        return spec
