"""Which prompts an iteration rolls out, and how its rollouts are dealt over minibatches of one shape."""

from __future__ import annotations

import itertools
from collections import Counter

import jax
import numpy as np
import pytest

from sera_jax.core import rng_for
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout, laid_tokens, pack
from sera_jax.data.rollouts import (
    NO_SHAPE,
    PromptSchedule,
    lay_response_values,
    lay_rollouts,
    lay_token_values,
    rounded_rows,
)
from tests import oracles

ROW_TOKENS = 40


def pool(name, count):
    return [Item(f"{name}{i}", np.array([i + 1, 7], np.int32), (np.array([3], np.int32),)) for i in range(count)]


def schedule(sft=10, new=7, overlap=0.5, per_iteration=8, seed=0):
    return PromptSchedule(
        sft=pool("sft", sft), new=pool("new", new), overlap=overlap, per_iteration=per_iteration, seed=seed
    )


def names(items):
    return [item.id for item in items]


def origins(items):
    """The ids of the records, without the lap."""
    return [item.id.split("#")[0] for item in items]


def rollouts(seed=0, count=12, most=3):
    """Items of 1 to `most` responses; every response starts with a token that no other one has."""
    items = oracles.random_items(
        np.random.default_rng(seed), count, vocab=90, prompt=(1, 8), response=(1, 7), most=most
    )
    marks = iter(range(100, 1000))
    return [
        Item(item.id, item.prompt, tuple(np.concatenate([[next(marks)], r]).astype(np.int32) for r in item.responses))
        for item in items
    ]


def lay(items, parts=3, **changes):
    layout = {name: changes.pop(name) for name in ("row_tokens", "share_prompt", "shards") if name in changes}
    options = dict(seed=0, iteration=1) | changes
    return lay_rollouts(items, parts, Layout(**dict(row_tokens=ROW_TOKENS, shards=2) | layout), **options)


# ---- prompts


def test_the_prompts_are_a_pure_function_of_seed_and_iteration():
    one, other = schedule(), schedule()
    later = [names(one.prompts(i)) for i in (1, 2, 3, 4)]
    assert [names(other.prompts(i)) for i in (4, 2, 3, 1)] == [later[i] for i in (3, 1, 2, 0)]
    assert len({tuple(ids) for ids in later}) == 4
    assert names(schedule(seed=1).prompts(1)) != later[0]


@pytest.mark.parametrize("per_iteration", [1, 4, 7, 10, 25])
def test_each_lap_goes_through_every_prompt_once_in_another_order(per_iteration):
    prompts = schedule(overlap=1.0, per_iteration=per_iteration)
    seen = [item for i in range(1, 40 // per_iteration + 2) for item in prompts.prompts(i)][:40]
    laps = [seen[start : start + 10] for start in range(0, 40, 10)]
    for lap, items in enumerate(laps):
        assert sorted(names(items)) == sorted(f"sft{i}#{lap}" for i in range(10))
    assert len({tuple(origins(items)) for items in laps}) == 4


def test_the_two_sources_are_gone_through_in_unrelated_orders():
    prompts = schedule(sft=10, new=10, overlap=0.5, per_iteration=20).prompts(1)
    orders = [[name[3:] for name in origins(prompts) if name.startswith(kind)] for kind in ("sft", "new")]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


@pytest.mark.parametrize(("overlap", "expected"), [(0.0, 0), (0.25, 5), (0.29, 6), (0.5, 10), (0.95, 19), (1.0, 20)])
def test_the_share_of_prompts_with_demonstrations_is_exact_in_every_iteration(overlap, expected):
    prompts = schedule(overlap=overlap, per_iteration=20)
    assert prompts.sft_per_iteration == expected
    for iteration in (1, 2, 7):
        kinds = Counter(name[:3] for name in origins(prompts.prompts(iteration)))
        assert (kinds["sft"], kinds["new"]) == (expected, 20 - expected)


@pytest.mark.parametrize("size", [1, 3, 20])
def test_no_id_comes_twice_in_an_iteration_even_from_a_pool_that_is_smaller_than_it(size):
    prompts = schedule(sft=size, new=size, per_iteration=16)
    for iteration in range(1, 6):
        items = prompts.prompts(iteration)
        assert len(set(names(items))) == len(items) == 16


def test_prompts_come_without_responses_and_with_the_records_tokens():
    given = {item.id: item for item in (*schedule().sft, *schedule().new)}
    for item in schedule().prompts(3):
        assert item.responses == ()
        np.testing.assert_array_equal(item.prompt, given[item.id.split("#")[0]].prompt)


@pytest.mark.parametrize(
    ("sizes", "overlap", "message"),
    [
        (
            (0, 5),
            0.5,
            r"ppo.prompt_overlap=0.5 takes 4 prompts .* from the demonstrations, .* none; give some, or change",
        ),
        ((5, 0), 0.25, r"ppo.prompt_overlap=0.25 takes 6 prompts .* from the new prompts"),
    ],
)
def test_a_source_without_prompts_is_refused_with_the_way_out(sizes, overlap, message):
    with pytest.raises(ValueError, match=message):
        schedule(*sizes, overlap=overlap).prompts(1)
    # and is not missed where nothing is taken from it
    assert len(schedule(*sizes, overlap=float(sizes[0] > 0)).prompts(1)) == 8


def test_an_iteration_shuffles_its_pool_once_a_lap_and_not_once_a_prompt(monkeypatch):
    laps = []

    def counting(*key):
        laps.append(key[-1])
        return rng_for(*key)

    monkeypatch.setattr("sera_jax.data.rollouts.rng_for", counting)
    schedule(sft=50, overlap=1.0, per_iteration=120).prompts(2)  # places 120 to 239
    assert laps == [2, 3, 4]


# ---- rows


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_every_response_lies_exactly_once_over_the_parts_as_it_would_alone(seed, share_prompt):
    items = rollouts(seed)
    found = []
    for part in lay(items, share_prompt=share_prompt, row_tokens=60):
        for r, k in np.argwhere(part.item >= 0):
            i, b = int(part.item[r, k]), int(part.response[r, k])
            assert oracles.read_slot(part.rows, r, k) == oracles.standalone(items[i], b)
            found.append((i, b))
    assert sorted(found) == [(i, b) for i, item in enumerate(items) for b in range(len(item.responses))]


def test_every_part_has_the_same_shapes_and_as_many_items():
    items = rollouts(3)
    parts = lay(items)
    assert len(parts) == 3
    assert len({tuple(x.shape for x in jax.tree.leaves(part.rows)) for part in parts}) == 1
    assert len({part.rows.num_slots for part in parts}) == 1
    assert [len({int(i) for i in part.item.flat if i >= 0}) for part in parts] == [4, 4, 4]


def test_the_layout_is_a_pure_function_of_items_seed_and_iteration():
    items = rollouts(0)

    def flat(parts):
        return [leaf for part in parts for leaf in (*jax.tree.leaves(part.rows), part.item, part.response)]

    for left, right in zip(flat(lay(items)), flat(lay(items)), strict=True):
        np.testing.assert_array_equal(left, right)

    def groups(**changes):
        return [sorted({int(i) for i in part.item.flat if i >= 0}) for part in lay(items, **changes)]

    assert groups() != groups(iteration=2) != groups(seed=1) != groups()


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_rows_are_dealt_so_that_every_device_has_as_many_and_works_alike(multiple):
    items = rollouts(1, count=48, most=2)
    for part in lay(items, parts=2, shards=multiple):
        count = part.rows.tokens.shape[0]
        assert count % multiple == 0
        work = (part.rows.segment > 0).sum(1).reshape(multiple, -1).sum(1)
        assert work.max() - work.min() <= ROW_TOKENS
        assert work.sum() == sum(laid_tokens(items[i]) for i in {int(i) for i in part.item.flat if i >= 0})


def test_the_rows_asked_for_are_rounded_up_to_few_sizes():
    for multiple in (1, 3, 8):
        sizes = [rounded_rows(count, multiple) for count in range(1, 1000)]
        assert all(size % multiple == 0 for size in sizes)
        assert all(size >= count for count, size in enumerate(sizes, 1))
        assert all(a <= b for a, b in itertools.pairwise(sizes))  # a bigger batch never gets fewer rows
        assert all(rounded_rows(size, multiple) == size for size in sizes)
        units = [-(-count // multiple) for count in range(1, 1000)]
        for unit, size in zip(units, sizes):
            assert size // multiple <= (unit if unit <= 4 else 1.25 * unit)
            assert size // multiple - unit <= size // multiple / 5  # filling is at most a fifth
        top = units[-1]
        assert len(set(sizes)) <= 4 * np.ceil(np.log2(top))  # four sizes to an octave


def shape_of(part):
    return (*part.rows.tokens.shape, part.rows.slot.shape[1], part.rows.num_slots)


def test_the_shape_before_is_kept_where_it_holds_the_rollouts_and_is_not_much_too_large():
    items = rollouts(3, count=24)
    own = shape_of(lay(items, parts=2, shards=1)[0])
    rows, length, scored, slots = own
    kept = (rows + rows // 4, length, scored + 5, 2 * slots)
    for earlier, expected in (
        (own, own),
        (kept, kept),
        ((*kept[:2], 1, 1), (*kept[:2], scored, slots)),  # too few places: as many as are needed
        ((rows - 1, length, 10 * scored, 10 * slots), own),  # too few rows
        ((2 * rows, length, scored, slots), own),  # mostly filling
        ((2 * rows, 12, scored, slots), own),  # shorter than an item
    ):
        parts = lay(items, parts=2, shards=1, earlier=earlier)
        assert {shape_of(part) for part in parts} == {expected}, earlier
        found = [(int(i), int(k)) for part in parts for i, k in zip(part.item.flat, part.response.flat) if i >= 0]
        assert sorted(found) == [(i, b) for i, item in enumerate(items) for b in range(len(item.responses))]


def test_a_shape_that_does_not_divide_over_the_devices_is_not_kept():
    items = rollouts(3, count=96)
    own = shape_of(lay(items, parts=2, shards=4)[0])
    assert shape_of(lay(items, parts=2, shards=4, earlier=(own[0] + 1, *own[1:]))[0]) == own
    larger = (own[0] + 4, *own[1:])
    assert shape_of(lay(items, parts=2, shards=4, earlier=larger)[0]) == larger


@pytest.mark.parametrize("earlier", [NO_SHAPE, (24, 40, 40, 16)])
def test_which_rollouts_a_minibatch_takes_depends_neither_on_the_devices_nor_on_the_shape_before(earlier):
    items = rollouts(3, count=24)
    alone = lay(items, parts=2, shards=1)
    for multiple in (2, 8):
        spread = lay(items, parts=2, shards=multiple, earlier=earlier)
        for ours, theirs in zip(spread, alone, strict=True):
            assert set(ours.item.flat) - {-1} == set(theirs.item.flat) - {-1}


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("most", [20, 60, 200])
def test_rows_are_as_long_as_lays_the_fewest_tokens(most, shards, share_prompt):
    """No other length of row, with as many rows as it takes, holds the same minibatches in fewer tokens."""
    items = oracles.random_items(np.random.default_rng(most), 24, vocab=90, prompt=(8, 40), response=(10, most), most=2)
    parts = lay(items, row_tokens=512, shards=shards, share_prompt=share_prompt)
    groups = [[items[i] for i in sorted(set(part.item.flat) - {-1})] for part in parts]
    rows, length = parts[0].rows.tokens.shape
    longest = max(laid_tokens(item, share_prompt) for item in items)
    assert longest <= length <= 512 and length % 64 == 0
    for other in range(-(-longest // 64) * 64, 513, 64):
        needed = max(len(pack(group, other, share_prompt)) for group in groups)
        assert rows * length <= rounded_rows(needed, shards) * other
    least = sum(laid_tokens(item, share_prompt) for item in items) / 3
    assert rows * length <= 1.5 * least + 64 * shards, "filling is a rest, not half of the rows"


def test_an_item_that_fits_no_row_names_itself_and_the_limit():
    long = Item("long", np.ones(30, np.int32), (np.ones(20, np.int32),))
    with pytest.raises(ValueError, match=r"'long' takes 50 tokens.* 40 of a row"):
        lay([long, long], parts=2)


# ---- values of tokens and responses


@pytest.mark.parametrize("share_prompt", [True, False])
def test_values_lie_where_their_tokens_and_responses_do(share_prompt):
    items = rollouts(2)
    tokens = [[r.astype(np.float64) / 8 for r in item.responses] for item in items]  # a token's value names the token
    firsts = [[float(r[0]) for r in item.responses] for item in items]
    for part in lay(items, share_prompt=share_prompt, row_tokens=60):
        rows, used = part.rows, part.rows.slot < part.rows.num_slots
        laid = lay_token_values(part, tokens)
        assert laid.dtype == np.float32
        np.testing.assert_array_equal(laid, np.where(used, rows.target / 8, 0))
        of_responses = lay_response_values(part, firsts, np.float32)
        assert of_responses.dtype == np.float32 and of_responses.shape == part.item.shape
        assert not of_responses[part.item < 0].any()
        starts = used & np.concatenate([np.ones((len(rows.slot), 1), bool), rows.slot[:, 1:] != rows.slot[:, :-1]], 1)
        for r, m in np.argwhere(starts):
            assert of_responses[r, rows.slot[r, m]] == rows.target[r, m]


def test_truth_values_of_responses_stay_truth_values():
    items = rollouts(2)
    ended = [[bool(r[0] % 2) for r in item.responses] for item in items]
    for part in lay(items):
        laid = lay_response_values(part, ended, bool)
        assert laid.dtype == bool
        for r, k in np.argwhere(part.item >= 0):
            assert laid[r, k] == ended[part.item[r, k]][part.response[r, k]]
        assert not laid[part.item < 0].any()
