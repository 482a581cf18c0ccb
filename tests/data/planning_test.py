"""Which row counts are compiled, which items change steps, and how a step's rows are dealt to microbatches."""

import itertools

import numpy as np
import pytest

from sera_jax.data.items import Item
from sera_jax.data.packing import pack
from sera_jax.data.planning import (
    balance,
    choose_sizes,
    cut_steps,
    cut_unit,
    deal_rows,
    round_up,
    row_shares,
    step_targets,
)


def wasted(needed, sizes):
    return sum(round_up(n, sizes) - n for n in needed)


@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_the_chosen_sizes_waste_as_little_as_the_best_of_all_choices(most, multiple):
    rng = np.random.default_rng(most * 10 + multiple)
    for _ in range(10):
        needed = rng.integers(1, 15, 20).tolist()
        sizes = choose_sizes(needed, multiple=multiple, most=most)
        assert len(sizes) <= most
        assert all(s % multiple == 0 for s in sizes)
        options = range(multiple, 16 + multiple, multiple)
        best = min(
            wasted(needed, c)
            for k in range(1, most + 1)
            for c in itertools.combinations(options, k)
            if max(c) >= max(needed)
        )
        assert wasted(needed, sizes) == best


def test_known_sizes_are_used_again_before_new_ones_are_compiled():
    assert choose_sizes([7, 8, 9], multiple=1, most=3, known=(8, 9, 20)) == (8, 9)
    assert choose_sizes([7, 8, 9, 9], multiple=1, most=4, known=(8, 9, 20)) == (7, 8, 9)  # room for one new size
    assert choose_sizes([7, 8, 9], multiple=1, most=2, known=(5, 8)) == (8, 9)  # what fits nowhere forces one more
    assert choose_sizes([7], multiple=2, most=3, known=(7,)) == (8,)  # an odd size cannot be split in two
    assert choose_sizes([0, 0], multiple=2, most=3) == (2,)


def test_steps_are_cut_to_the_exact_number_of_pairs_and_entries_split_where_they_must():
    counts = [1, 5, 2, 1]
    steps = cut_steps(counts, [1, 0, 3, 2], 2)
    assert steps == [[(1, 0, 2)], [(1, 2, 4)], [(1, 4, 5), (0, 0, 1)], [(3, 0, 1), (2, 0, 1)], [(2, 1, 2)]]


def test_a_part_of_an_entry_keeps_only_the_responses_its_pairs_need():
    item = Item("a", np.array([1]), tuple(np.array([k + 2]) for k in range(4)))
    unit = cut_unit(3, item, ((0, 1), (3, 1), (0, 2)), 1, 2)
    assert [r.tolist() for r in unit.item.responses] == [[3], [5]]
    assert (unit.index, unit.pairs, unit.kept, unit.count) == (3, ((1, 0),), (1, 3), 1)


def test_an_item_that_leaves_no_room_costs_its_whole_row():
    np.testing.assert_allclose(row_shares(np.array([80, 35, 35]), 100), [1.0, 0.5, 0.5])


def test_balancing_meets_its_targets_and_moves_few_items():
    rng = np.random.default_rng(0)
    cost = rng.uniform(0.05, 0.9, 64 * 20)
    kind = np.ones(len(cost), int)
    groups = [list(range(i, i + 64)) for i in range(0, len(cost), 64)]
    before = [set(g) for g in groups]
    counts = np.full(20, 64)
    sums = np.array([cost[g].sum() for g in groups])
    spread = float(cost.std() * 8)
    target = step_targets(sums, counts, 64, spread=spread, multiple=1, slack=0.1)
    assert np.isclose(target.sum(), cost.sum())
    assert len(set(np.ceil(target))) <= 2
    exchanges = balance(groups, cost, kind, target)
    np.testing.assert_allclose([cost[g].sum() for g in groups], target, atol=0.05)
    assert sorted(itertools.chain(*groups)) == list(range(len(cost)))
    assert all(len(g) == 64 for g in groups)
    moved = sum(len(b - set(g)) for b, g in zip(before, groups))
    assert moved <= 2 * exchanges
    assert moved < 0.1 * len(cost)


def test_balancing_exchanges_only_entries_with_equally_many_pairs():
    rng = np.random.default_rng(1)
    cost, kind = rng.uniform(0.1, 1, 90), rng.integers(1, 4, 90)
    groups = [list(range(i, i + 30)) for i in range(0, 90, 30)]
    pairs = [kind[g].sum() for g in groups]
    balance(groups, cost, kind, np.full(3, cost.sum() / 3))
    assert [kind[g].sum() for g in groups] == pairs


def test_a_large_multiple_does_not_pull_steps_apart_more_than_chance():
    sums = np.array([19.0, 21.0, 20.0, 20.0])
    target = step_targets(sums, np.full(4, 8), 8, spread=1.0, multiple=16, slack=0.1)
    np.testing.assert_allclose(target, 20.0)


def test_a_partial_last_step_gets_its_share_of_the_mean():
    target = step_targets(np.array([10.0, 10.0, 7.0]), np.array([8, 8, 4]), 8, spread=1.0, multiple=1, slack=0.1)
    assert np.isclose(target[2], 27 / 20 * 4)
    assert np.isclose(target.sum(), 27)


def test_rows_are_dealt_so_that_microbatches_work_alike():
    work = [9, 1, 5, 8, 4, 2, 7]
    rows = [[i] for i in range(len(work))]
    dealt = deal_rows(rows, work, 4, 12)
    assert len(dealt) == 12
    parts = [sum(work[i] for row in dealt[p : p + 3] for i in row) for p in range(0, 12, 3)]
    assert max(parts) - min(parts) <= 2
    assert sorted(i for row in dealt for i in row) == list(range(7))


@pytest.mark.filterwarnings("error")
def test_data_smaller_than_a_batch_have_a_target_without_a_mean_of_nothing():
    (target,) = step_targets(np.array([5.0]), np.array([3]), 8, spread=10.0, multiple=1, slack=0.5)
    assert target == 5.0


@pytest.mark.parametrize("count", [1, 200, 256, 300])
def test_a_share_is_that_of_the_row_that_the_item_is_packed_into(count):
    rng = np.random.default_rng(0)
    sizes = rng.integers((6, 3), (11, 15), (count, 2))  # of 200, best fit alone leaves a row too many
    items = [Item(str(i), np.ones(p, np.int32), (np.ones(r, np.int32),)) for i, (p, r) in enumerate(sizes)]
    tokens = np.array([item.tokens for item in items])
    wanted = np.zeros(count)
    for row in pack(items, 128):
        wanted[row] = tokens[row] / tokens[row].sum()
    np.testing.assert_array_equal(row_shares(tokens, 128), wanted)
