"""Stored items are those that were loaded: each, what is said of all of them, and the batches that they make."""

import dataclasses

import jax
import numpy as np
import pytest

from sera_jax.data import keeping, stored
from sera_jax.data.batches import ItemLoader, PairLoader, score_batches
from sera_jax.data.items import Item, PairItem, items_digest, lengths_of, unique_prompts
from sera_jax.data.loading import flip_labels, load_preferences, split_heldout
from sera_jax.data.packing import Layout
from sera_jax.experiment.corpus import as_text
from sera_jax.loops.sera_study import pairs_digest
from tests.data.loading_test import WIDE, Bytes, row, write

COUNT = 90


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(pairs as a list, the same as they were kept, the report)."""
    folder = tmp_path_factory.mktemp("kept")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}, {"role": "user", "content": "b"}]
    rows = [
        row(i % 70, chosen=f"yes {i}" * (1 + i % 5), **({"prompt": talk} if i % 9 == 0 else {})) for i in range(COUNT)
    ]
    path = write(folder / "rows.jsonl", [*rows, "{"])
    pairs, report = load_preferences(path, Bytes(), limits=WIDE)

    def read(into):
        return load_preferences(path, Bytes(), limits=WIDE, into=into)[1]

    keeping.keep(folder, 2, [path], read)
    items, found = keeping.kept(folder, path, [path])
    assert found == report and report.bad_rows == 1
    moved = keeping.kept(folder, "b=1", ["b"])[1]
    assert moved.table() == report.table().replace(path, "b").replace("of b:", "of b=1:", 1)
    assert path not in (folder / keeping.REPORT).read_text()
    return pairs, stored.Pairs(items)


def same(made, expected):
    assert len(made) == len(expected)
    for one, other in zip(made, expected, strict=True):
        for field in dataclasses.fields(Item):
            jax.tree.map(np.testing.assert_array_equal, getattr(one, field.name), getattr(other, field.name))
        assert all(part.dtype == np.int32 for part in (one.prompt, *one.responses))


def side(pair, k):
    name = ("chosen", "rejected")[k]
    return dataclasses.replace(pair.item, id=f"{pair.item.id}/{name}", responses=(pair.item.responses[k],))


def selections(pairs, kept):
    """Each selection of the stored items, and what it is of the loaded ones."""
    items, every = [pair.item for pair in pairs], np.arange(COUNT)
    sides = np.arange(COUNT, dtype=np.int8) % 2
    yield kept.items, items
    yield kept.items[5:60:3], items[5:60:3]
    yield kept.items.with_side(every, sides), [side(pair, k) for pair, k in zip(pairs, sides)]
    yield kept.items.with_side(every, sides).as_texts(), [as_text(side(pair, k)) for pair, k in zip(pairs, sides)]
    yield kept.items.unique_prompts(), unique_prompts(items)
    named = [dataclasses.replace(item, id=f"new/{item.id}") if i % 3 else item for i, item in enumerate(items)]
    yield kept.items.renamed(every % 3 > 0), named
    yield stored.joined(kept.items, items[:4]), items + items[:4]


def test_a_selection_is_the_same_items_with_the_same_lengths_and_digest(loaded):
    for made, expected in selections(*loaded):
        same(made, expected)
        assert items_digest(made) == items_digest(expected)
        jax.tree.map(np.testing.assert_array_equal, *(vars(lengths_of(items)) for items in (made, expected)))
        assert made[-1].id == expected[-1].id
        with pytest.raises(IndexError):
            made[len(made)]


def test_what_is_held_out_flipped_and_known_is_the_same(loaded):
    pairs, kept = loaded
    for made, expected in zip(split_heldout(kept, 0.3, 0), split_heldout(pairs, 0.3, 0), strict=True):
        same(stored.items_of(made), stored.items_of(expected))
    made, expected = (flip_labels(some, 0.4, 1) for some in (kept, pairs))
    assert [(p.pairs, p.flipped) for p in made] == [(p.pairs, p.flipped) for p in expected]
    assert stored.flipped(made).sum() == round(0.4 * COUNT)
    np.testing.assert_array_equal(stored.lengths_of_pairs(made), stored.lengths_of_pairs(expected))
    keys = stored.keys_of(kept[:20])
    assert keys == stored.keys_of(pairs[:20])
    np.testing.assert_array_equal(stored.known(kept, keys), stored.known(pairs, keys))
    assert stored.known(kept, keys).sum() > 20, "prompts come again"


@pytest.mark.parametrize("referred", [False, True])
def test_pairs_have_the_digest_and_the_batches_of_a_list(loaded, referred):
    pairs, kept = (flip_labels(some, 0.4, 1) for some in loaded)
    if referred:
        logps = np.linspace(-9, -1, 2 * COUNT, dtype=np.float32).reshape(-1, 2)
        pairs, kept = stored.with_reference(pairs, list(logps)), stored.with_reference(kept, logps)
    fresh = [dataclasses.replace(pair, source="bootstrap", weight=0.5) for pair in pairs[:3]]
    for made, expected in ((kept, pairs), (stored.joined(kept.take(np.arange(50)), fresh), [*pairs[:50], *fresh])):
        assert pairs_digest(made) == pairs_digest(expected)
        loaders = [PairLoader(some, Layout(128), batch_size=8, seed=0) for some in (made, expected)]
        for step in range(2 * loaders[0].steps_per_epoch):
            ours, theirs = (loader.batch(step) for loader in loaders)
            assert ours.ids == theirs.ids
            jax.tree.map(np.testing.assert_array_equal, ours.batch, theirs.batch)


def test_demonstrations_and_scored_items_are_laid_as_those_of_a_list(loaded):
    pairs, kept = loaded
    lists = [side(pair, 0) for pair in pairs]
    views = kept.items.with_side(np.arange(COUNT), np.zeros(COUNT, np.int8))
    ours, theirs = (ItemLoader(some, Layout(96), batch_size=8, seed=0).batch(3) for some in (views, lists))
    jax.tree.map(np.testing.assert_array_equal, ours.arrays, theirs.arrays)
    both = zip(*(score_batches(some, Layout(96), 4) for some in (views, lists)), strict=True)
    for ours, theirs in both:
        jax.tree.map(np.testing.assert_array_equal, ours.rows, theirs.rows)


def test_nothing_is_kept_and_found_again(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(1)])
    keeping.keep(tmp_path, 1, [path], lambda into: load_preferences(path, Bytes(), limits=WIDE)[1])
    items, report = keeping.kept(tmp_path, path, [path])
    assert (len(items), report.kept) == (0, 1)
    assert items_digest(items) == items_digest([])
    assert isinstance(stored.chosen_from([PairItem(Item("a", np.ones(1), ()))], [0])[0], PairItem)
