"""Packing many batches at once gives what packing each by the plain rules gives."""

import numpy as np
import pytest

from sera_jax.data.fitting import as_rows, fit_all, least_rows, rows_of_all


def best_fit(sizes, room):
    """The largest item first, into the fullest row that still holds it; of equal ones into the first."""
    rows, used = [], []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i)):
        holds = [r for r in range(len(rows)) if all(u + s <= limit for u, s, limit in zip(used[r], sizes[i], room))]
        if holds:
            r = max(holds, key=lambda r: (used[r][0], -r))
        else:
            r = len(rows)
            rows.append([])
            used.append(np.zeros(4, int))
        rows[r].append(i)
        used[r] = used[r] + sizes[i]
    return rows


def filled(tokens, order, row_tokens):
    """The first item left, then the subset of the rest that fills the row best, of these the one of earliest items."""
    left, rows = list(order), []
    while left:
        row, left = [left[0]], left[1:]
        gap = row_tokens - tokens[row[0]]
        reach = [{0}]
        for i in left:
            reach.append(reach[-1] | {s + tokens[i] for s in reach[-1] if s + tokens[i] <= gap})
        got, rest = max(reach[-1]), []
        for j in range(len(left) - 1, -1, -1):
            if got in reach[j]:
                rest.append(left[j])
            else:
                row.append(left[j])
                got -= tokens[left[j]]
        left = rest[::-1]
        rows.append(row)
    return rows


def by_the_rules(sizes, room):
    rows, rng = best_fit(sizes, room), np.random.default_rng(0)
    least = -(-sizes[:, 0].sum() // room[0])
    for _ in range(30 if len(rows) > least else 0):
        order = np.argsort(-sizes[:, 0] * rng.uniform(1, 2, len(sizes)), kind="stable")
        tight = filled(sizes[:, 0].tolist(), order.tolist(), room[0])
        if len(tight) < len(rows) and all((sizes[row].sum(0)[: len(room)] <= room).all() for row in tight):
            rows = tight
        if len(rows) == least:
            break
    return tuple(map(tuple, rows))


def drawn(rng, count, longest):
    scored = rng.integers(1, longest, count)
    return np.stack([scored + rng.integers(1, longest, count), scored, np.full(count, 2), np.ones(count, int)], 1)


@pytest.mark.parametrize("room", [(40,), (64,), (64, 40, 6, 3), (100, 100, 100, 100)])
def test_every_batch_is_packed_as_the_plain_rules_pack_it(room):
    rng = np.random.default_rng(len(room) * room[0])
    sizes = drawn(rng, 300, 20)
    batches = [rng.permutation(300)[: rng.integers(1, 15)] for _ in range(30)]
    for batch, rows in zip(batches, fit_all(sizes, batches, room), strict=True):
        assert rows == by_the_rules(sizes[batch], room)
        assert len(rows) >= least_rows(sizes[batch], room)


@pytest.mark.parametrize("longest", [5, 33])
def test_a_pool_of_any_size_is_packed_best_fit(longest):
    rng = np.random.default_rng(longest)
    for count in (0, 1, 7, 400):
        tokens = rng.integers(1, longest, count)
        sizes = np.stack([tokens] * 4, 1) if count else np.zeros((0, 4), int)
        assert as_rows(rows_of_all(tokens, 64), tokens) == tuple(map(tuple, best_fit(sizes, (64,))))
