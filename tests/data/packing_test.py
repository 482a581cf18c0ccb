"""The row layout against a slow oracle, and what the packer may never do."""

import itertools

import numpy as np
import pytest

from sera_jax.data.items import Item
from sera_jax.data.packing import (
    RowSpec,
    build_rows,
    gather_scores,
    laid_tokens,
    merge_specs,
    pack,
    padding_fraction,
    scatter_scores,
    shared_prompt_savings,
    spec_for,
    window_for,
)
from tests import oracles


def some_items(seed, count=25, most=3):
    return oracles.random_items(np.random.default_rng(seed), count, vocab=50, prompt=(1, 9), response=(1, 7), most=most)


def plain(name, prompt, *responses):
    return Item(name, np.ones(prompt, np.int32), tuple(np.ones(n, np.int32) for n in responses))


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_every_slot_reads_back_as_its_response_alone(seed, share_prompt):
    items = some_items(seed)
    assignment = pack(items, 64, share_prompt)
    packed = build_rows(items, assignment, spec_for(items, assignment, 64), len(assignment) + 1, share_prompt)
    found = set()
    for r, k in np.argwhere(packed.item >= 0):
        i, b = int(packed.item[r, k]), int(packed.response[r, k])
        assert oracles.read_slot(packed.rows, r, k) == oracles.standalone(items[i], b)
        found.add((i, b))
    assert found == {(i, b) for i, item in enumerate(items) for b in range(len(item.responses))}


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_row_holds_its_items_and_nothing_else(share_prompt):
    items = some_items(5)
    assignment = pack(items, 64, share_prompt)
    rows = build_rows(items, assignment, spec_for(items, assignment, 64), len(assignment), share_prompt).rows
    laid = [sum(laid_tokens(items[i], share_prompt) for i in row) for row in assignment]
    np.testing.assert_array_equal((rows.segment > 0).sum(1), laid)
    for values in (rows.tokens, rows.positions, rows.branch):
        assert not values[rows.segment == 0].any()
    scored = [sum(len(x) for i in row for x in items[i].responses) for row in assignment]
    np.testing.assert_array_equal((rows.slot < rows.num_slots).sum(1), scored)
    assert all(x.dtype == np.int32 for x in (rows.tokens, rows.source, rows.target, rows.slot))


def test_the_prompt_lies_once_for_all_its_responses():
    item = Item("a", np.array([5, 6]), (np.array([7, 8]), np.array([9])))
    rows = build_rows([item], [[0]], RowSpec(8, 4, 2), 1).rows
    np.testing.assert_array_equal(rows.tokens[0], [5, 6, 7, 8, 9, 0, 0, 0])
    np.testing.assert_array_equal(rows.positions[0], [0, 1, 2, 3, 2, 0, 0, 0])
    np.testing.assert_array_equal(rows.segment[0], [1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(rows.branch[0], [0, 0, 1, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(rows.source[0], [1, 2, 1, 0])
    np.testing.assert_array_equal(rows.target[0], [7, 8, 9, 0])
    np.testing.assert_array_equal(rows.slot[0], [0, 0, 1, 2])


def test_the_prompt_lies_once_per_response_when_it_is_not_shared():
    item = Item("a", np.array([5, 6]), (np.array([7, 8]), np.array([9])))
    rows = build_rows([item], [[0]], RowSpec(8, 4, 2), 1, share_prompt=False).rows
    np.testing.assert_array_equal(rows.tokens[0], [5, 6, 7, 8, 5, 6, 9, 0])
    np.testing.assert_array_equal(rows.segment[0], [1, 1, 1, 1, 2, 2, 2, 0])
    np.testing.assert_array_equal(rows.branch[0], [0, 0, 1, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(rows.source[0], [1, 2, 5, 0])


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("count", [0, 1, 40, 400])  # above 256 items rows are not refilled
def test_every_item_lies_in_exactly_one_row_that_holds_it(count, share_prompt):
    items = some_items(1, count)
    rows = pack(items, 60, share_prompt)
    assert sorted(itertools.chain(*rows)) == list(range(count))
    assert all(sum(laid_tokens(items[i], share_prompt) for i in row) <= 60 for row in rows)
    assert all(rows)
    assert rows == pack(items, 60, share_prompt)


def test_the_packer_fills_rows_that_best_fit_decreasing_leaves_loose():
    items = [plain(str(i), n, 1) for i, n in enumerate([5, 5, 3, 3, 3])]  # 6 6 4 4 4: two rows of 12 as 6+6, 4+4+4
    assert len(pack(items, 12)) == 2
    items = [plain(str(i), n, 1) for i, n in enumerate([5, 4, 3, 2, 2, 2])]  # 6 5 4 3 3 3 = 24: only as 6+3+3, 5+4+3
    assert len(pack(items, 12)) == 2


@pytest.mark.parametrize(
    ("limits", "rows"),
    [
        (RowSpec(100, 100, 100, 100), 1),
        (RowSpec(100, 8, 100, 100), 2),
        (RowSpec(100, 100, 2, 9), 3),
        (RowSpec(100, 100, 9, 1), 6),
    ],
)
def test_rows_obey_every_limit_of_their_spec(limits, rows):
    items = [plain(str(i), 3, 2) for i in range(6)]
    packed = pack(items, 100, limits=limits, pairs=[1] * 6)
    assert len(packed) == rows
    assert sorted(itertools.chain(*packed)) == list(range(6))
    assert max(len(row) for row in packed) <= min(limits.scored // 2, limits.slots, limits.pairs)


def test_an_item_longer_than_a_row_is_refused_by_name_size_and_limit():
    with pytest.raises(ValueError, match=r"'long' takes 11 tokens.*the 10 of a row.*truncate"):
        pack([plain("short", 1, 1), plain("long", 5, 3, 3)], 10)
    with pytest.raises(ValueError, match=r"'long' takes 16 tokens with its prompt once per response.*15"):
        pack([plain("long", 5, 3, 3)], 15, share_prompt=False)
    with pytest.raises(ValueError, match=r"'wide' needs slots=3 .* the 2"):
        pack([plain("wide", 1, 1, 1, 1)], 10, limits=RowSpec(10, 10, 2))


def test_rows_that_do_not_fit_their_shape_are_refused():
    items = [plain("a", 2, 3), plain("b", 2, 3)]
    with pytest.raises(ValueError, match="num_rows=1"):
        build_rows(items, [[0], [1]], RowSpec(10, 10, 2), 1)
    with pytest.raises(ValueError, match=r"'b' needs row_tokens=10, more than 9"):
        build_rows(items, [[0, 1]], RowSpec(9, 10, 2), 1)
    with pytest.raises(ValueError, match=r"'b' needs scored=6, more than 4"):
        build_rows(items, [[0, 1]], RowSpec(10, 4, 2), 1)


def test_a_spec_holds_its_rows_and_repeats_for_nearby_data():
    for seed in range(5):
        items = some_items(seed, 200)
        rows = pack(items, 256)
        spec = spec_for(items, rows, 256, [1] * len(items))
        build_rows(items, rows, spec, len(rows))
        assert max(len(row) for row in rows) <= spec.pairs
        assert spec.scored % 32 == 0
        assert spec == spec_for(items, rows[::-1], 256, [1] * len(items))
    assert (
        spec_for([plain("a", 1, 1)], [[0]], 256) == spec_for([plain("a", 9, 30)], [[0]], 256) == RowSpec(256, 32, 4, 0)
    )


def test_merging_specs_only_grows_them():
    a, b = RowSpec(64, 8, 16, 4), RowSpec(64, 32, 4, 8)
    assert merge_specs(a, b) == merge_specs(b, a) == RowSpec(64, 32, 16, 8)
    assert merge_specs(None, a) == a
    with pytest.raises(ValueError, match="64 and 32"):
        merge_specs(a, RowSpec(32, 8, 8, 8))


def test_scores_come_back_to_their_items_in_order():
    items = some_items(2)
    rows = pack(items, 48)
    spec = spec_for(items, rows, 48)
    half = len(rows) // 2
    batches = [build_rows(items, part, spec, len(rows)) for part in (rows[:half], rows[half:])]
    values = [np.where(b.item >= 0, b.item * 10 + b.response, -99).astype(np.float32) for b in batches]
    for i, scores in enumerate(gather_scores(values, batches, items)):
        np.testing.assert_array_equal(scores, [i * 10 + b for b in range(len(items[i].responses))])
        assert scores.dtype == np.float32
    missing = scatter_scores(values[0], batches[0], items)
    present = {i for row in rows[:half] for i in row}
    assert all(np.isnan(scores).all() != (i in present) for i, scores in enumerate(missing))
    assert gather_scores([], [], []) == []


def test_the_window_is_the_longest_item_rounded_up_and_never_more_than_a_row():
    items = [plain("a", 10, 20), plain("b", 30, 40, 30)]
    assert window_for(items, 1024) == 128
    assert window_for(items, 1024, share_prompt=False) == 128  # prompt 30 + response 40
    assert window_for(items, 100) == 100
    assert window_for(items[:1], 1024) == 64


def test_padding_and_savings_are_shares_of_tokens():
    items = [plain("a", 6, 2, 2)]
    packed = build_rows(items, [[0]], RowSpec(20, 4, 2), 2)
    assert padding_fraction(packed.rows) == 30 / 40
    assert shared_prompt_savings(items) == 10 / 16
