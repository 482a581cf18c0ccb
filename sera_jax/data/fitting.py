"""Which items share a row, from their sizes alone: best-fit decreasing, for many batches at once, and rows filled one
after the other as full as a subset of the rest can. Numpy only.

Sizes are i64[n, 4]: what an item takes of a row in tokens, scored positions, slots and pairs; `room` are the four that
a row has, or the tokens alone where nothing else limits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

Fitted = tuple[tuple[int, ...], ...]  # rows of item indices

TIGHT_ITEMS = 256  # above this many items a loose row is lost in the crowd, and the second try costs seconds
_TIGHT_TRIES = 30
_AT_ONCE = 256  # batches that are packed in step
_MANY = 512  # items of a batch that is packed by itself
_NONE = np.iinfo(np.int32).max


def fit_all(sizes: np.ndarray, batches: Sequence[np.ndarray], room: Sequence[int]) -> list[Fitted]:
    """The rows of each batch of indices into `sizes`, as places within the batch; a pure function of each batch.

    Every item takes at least a token, and fits a row of its own.
    """
    fitted: list[Fitted] = []
    for start in range(0, len(batches), _AT_ONCE):
        some = [sizes[batch] for batch in batches[start : start + _AT_ONCE]]
        if len(room) == 1 and max(map(len, some)) > _MANY:
            laid = [as_rows(rows_of_all(of[:, 0], room[0]), of[:, 0]) for of in some]
        else:
            laid = _in_step(some, room)
        fitted += [_tight(of, rows, room) for of, rows in zip(some, laid, strict=True)]
    return fitted


def least_rows(sizes: np.ndarray, room: Sequence[int]) -> int:
    """No packing of these items takes fewer rows."""
    sums = sizes.sum(0)[: len(room)]
    wide = int(np.count_nonzero(2 * sizes[:, 0] > room[0]))  # no two of them share a row
    return max([wide, *(-(-int(total) // limit) for total, limit in zip(sums, room, strict=True) if total)])


def rows_of_all(tokens: np.ndarray, row_tokens: int) -> np.ndarray:
    """i64[n]: the row of every item, best-fit decreasing, by tokens alone; for any number of items.

    Equal sizes are placed together: they go into the fullest rows that hold one, of equal rows the first, each until it
    holds no further one.
    """
    row = np.zeros(len(tokens), np.int64)
    if not len(tokens):
        return row
    free: dict[int, list[np.ndarray]] = {}  # free tokens -> rows
    order = np.argsort(-tokens, kind="stable")
    starts = np.flatnonzero(np.diff(tokens[order], prepend=-1))
    opened = 0
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        size, todo = int(tokens[order[start]]), order[start:end]
        if size == 0:  # into the fullest row there is
            fullest = min(free, default=None)
            row[todo] = 0 if fullest is None else min(int(rows.min()) for rows in free[fullest])
            break
        for left in [*sorted(space for space in free if space >= size), row_tokens]:
            if not len(todo):
                break
            if left == row_tokens:
                rows = np.arange(opened, opened + -(-len(todo) // (left // size)))
                opened += len(rows)
            else:
                rows = np.sort(np.concatenate(free.pop(left)))
            each = left // size
            filled, rest = divmod(len(todo), each)
            used, after = rows[:filled], rows[filled:]
            taken = min(len(rows) * each, len(todo))
            row[todo[:taken]] = np.repeat(rows, each)[:taken]
            todo = todo[taken:]
            if len(used):
                free.setdefault(left - each * size, []).append(used)
            if rest and len(after):
                free.setdefault(left - rest * size, []).append(after[:1])
                after = after[1:]
            if len(after):
                free.setdefault(left, []).append(after)
    return row


def as_rows(row: np.ndarray, tokens: np.ndarray) -> Fitted:
    """The items of each row, the largest first."""
    placed = np.lexsort((np.arange(len(row)), -tokens, row))
    return _cut(placed, row[placed])


def _cut(items: np.ndarray, row: np.ndarray) -> Fitted:
    """Items that stand row by row, as rows."""
    if not len(items):
        return ()
    own, cuts = items.tolist(), [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(items)]
    return tuple(tuple(own[a:b]) for a, b in itertools.pairwise(cuts))


def _in_step(batches: list[np.ndarray], room: Sequence[int]) -> list[Fitted]:
    """Best-fit decreasing of every batch: the largest item first, into the fullest row that still holds it."""
    count, longest = len(batches), max(map(len, batches), default=0)
    sizes = np.zeros((count, longest, len(room)), np.int32)
    for lane, batch in enumerate(batches):
        sizes[lane, : len(batch)] = batch[:, : len(room)]
    order = np.argsort(-sizes[:, :, 0], axis=1, kind="stable")
    sizes = np.take_along_axis(sizes, order[:, :, None], axis=1)
    bound = 2 * int(max(least_rows(batch, room[:1]) for batch in batches)) + 1  # two rows hold more than one's tokens
    rows = longest if len(room) > 1 else min(bound, longest)
    free = np.tile(np.array(room, np.int32)[:, None, None], (1, count, rows))
    place = np.zeros((count, longest), np.int64)
    lanes = np.arange(count)
    for k in range(longest):
        size = sizes[:, k]
        holds = free[0] >= size[:, :1]
        for axis in range(1, len(room)):
            holds &= free[axis] >= size[:, axis, None]
        chosen = np.where(holds, free[0], _NONE).argmin(1)  # of equal ones the first; one not begun is the emptiest
        free[:, lanes, chosen] -= size.T
        place[:, k] = np.where(size[:, 0] > 0, chosen, rows)  # what fills a shorter batch comes last
    by_row = np.argsort(place, axis=1, kind="stable")
    items = np.take_along_axis(order, by_row, axis=1)
    place = np.take_along_axis(place, by_row, axis=1)
    return [_cut(items[lane, : len(batch)], place[lane, : len(batch)]) for lane, batch in enumerate(batches)]


def _tight(sizes: np.ndarray, rows: Fitted, room: Sequence[int]) -> Fitted:
    """The rows, or fewer where another order of the items gives fewer."""
    if not len(rows) or len(sizes) > TIGHT_ITEMS or len(rows) <= least_rows(sizes, room):
        return rows
    tokens: list[int] = sizes[:, 0].tolist()
    total, least = sum(tokens), least_rows(sizes, room)
    for order in np.argsort(-sizes[:, 0] * _draws(len(sizes)), axis=1, kind="stable"):
        spare = (len(rows) - 1) * room[0] - total
        tight = _fill(tokens, order.tolist(), room[0], spare)
        if tight is not None and len(tight) < len(rows) and _within(tight, sizes, room):
            rows = tight
            if len(rows) <= least:
                break
    return rows


@functools.lru_cache(maxsize=64)
def _draws(count: int) -> np.ndarray:
    """f64[tries, count] that loosen the order from large to small."""
    return np.random.default_rng(0).uniform(1, 2, (_TIGHT_TRIES, count))


def _within(rows: Fitted, sizes: np.ndarray, room: Sequence[int]) -> bool:
    return all((sizes[list(row)].sum(0)[: len(room)] <= room).all() for row in rows) if len(room) > 1 else True


def _fill(tokens: list[int], left: list[int], row_tokens: int, spare: int) -> Fitted | None:
    """One row after the other: the first item left, then the subset of the rest that fills the row best, of these the
    one of the earliest items; None as soon as more than `spare` tokens stay empty.

    Items come from large to small, loosely: where the strict order ends with a few that fit nowhere, another order
    often does not. Subset sums are bit sets in Python integers: bit s of `reach` says that s tokens can be had. Once
    the row can be filled, no further item is asked.
    """
    rows, total = [], sum(tokens)
    while left:
        if total <= row_tokens:
            rows.append((left[0], *left[:0:-1]))
            return tuple(rows)
        first = left[0]
        gap = row_tokens - tokens[first]
        goal = 1 << gap
        full = (goal << 1) - 1
        sums, reach = 1, [1]
        for i in left[1:]:
            sums |= (sums << tokens[i]) & full
            if sums >= goal:
                break
            reach.append(sums)
        else:
            reach.pop()
        got = sums.bit_length() - 1
        spare -= gap - got
        if spare < 0:
            return None
        total -= tokens[first] + got
        row, rest = [first], left[len(reach) + 1 :]
        kept = []
        for j in range(len(reach) - 1, -1, -1):
            i = left[j + 1]
            if reach[j] >> got & 1:
                kept.append(i)
            else:
                row.append(i)
                got -= tokens[i]
        left = kept[::-1] + rest
        rows.append(tuple(row))
    return tuple(rows)
