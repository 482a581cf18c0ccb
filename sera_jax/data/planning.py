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

from sera_jax.data.fitting import TIGHT_ITEMS, fit_all, rows_of_all
from sera_jax.data.items import Item
from sera_jax.data.packing import RowSpec

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


def row_shares(tokens: np.ndarray, row_tokens: int) -> np.ndarray:
    """f64[n] rows that each item of so many laid tokens costs: its share of the row it lands in when the whole pool is
    packed.

    An item that leaves no room for a neighbour costs its whole row, whatever its tokens.
    """
    row = rows_of_all(tokens, row_tokens)
    if 0 < len(tokens) <= TIGHT_ITEMS:  # few are packed as the rows of a step are
        for number, members in enumerate(fit_all(tokens[:, None], [np.arange(len(tokens))], (row_tokens,))[0]):
            row[list(members)] = number
    return tokens / np.maximum(np.bincount(row, tokens), 1)[row]


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
    members = [np.asarray(group) for group in groups]
    excess = np.array([cost[g].sum() for g in members]) - target
    alike = len(kind) > 0 and bool((kind == kind[0]).all())
    exchanges = 0
    for _ in range(8 * len(groups)):
        over, under = int(excess.argmax()), int(excess.argmin())
        if excess[over] < _TOLERANCE_ROWS and excess[under] > -_TOLERANCE_ROWS:
            break
        want = (excess[over] - excess[under]) / 2
        best = (abs(want), 0.0, -1, -1)
        give, take = cost[members[over]], cost[members[under]]
        take_order = take.argsort(kind="stable")
        if alike:
            options = [(np.arange(len(give)), take_order)]
        else:
            gives, takes = kind[members[over]], kind[members[under]][take_order]
            options = [(np.flatnonzero(gives == k), take_order[takes == k]) for k in np.unique(gives)]
        for sources, places in options:
            if len(places):
                best = min(best, *_exchanges(give, take, sources, places, want))
        if best[2] < 0:
            break
        _, moved, i, j = best
        members[over][i], members[under][j] = members[under][j], members[over][i]
        excess[over] -= moved
        excess[under] += moved
        exchanges += 1
    for group, now in zip(groups, members, strict=True):
        group[:] = now
    return exchanges


def _exchanges(
    give: np.ndarray, take: np.ndarray, sources: np.ndarray, places: np.ndarray, want: float
) -> list[tuple[float, float, int, int]]:
    """(distance from the wanted cost, cost that moves, place in the one group, in the other) of two exchanges, one of
    which is the best; `places` in the order of their costs."""
    sought, costs, found = give[sources], take[places], []
    right = np.searchsorted(costs, sought - want)
    for near in (np.minimum(np.maximum(right - 1, 0), len(places) - 1), np.minimum(right, len(places) - 1)):
        moved = sought - costs[near]
        away = np.abs(moved - want)
        b = int(away.argmin())
        found.append((away[b], float(moved[b]), int(sources[b]), int(places[near[b]])))
    return found


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
