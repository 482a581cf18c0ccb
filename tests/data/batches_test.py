"""Laws of the loaders: exact pairs per step, random access by step, few shapes, little padding."""

import dataclasses
import gzip
import itertools
import json

import jax
import numpy as np
import pytest

from sera_jax.data.batches import ItemLoader, PairLoader, score_batches
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import Layout, RowSpec, gather_scores
from sera_jax.data.planning import NO_SHAPES, Shapes
from tests import oracles

T = 64
LAYOUT = {field.name for field in dataclasses.fields(Layout)}


def pool(count=37, seed=0, most=4):
    """Entries with 1 to 3 pairs among 2 to 4 responses; entry i's reference log-probs are i + k / 8."""
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return rng.integers(1, 90, rng.integers(low, high)).astype(np.int32)

    entries = []
    for i in range(count):
        responses = tuple(draw(1, 9) for _ in range(rng.integers(2, most + 1)))
        every = list(itertools.permutations(range(len(responses)), 2))
        chosen = rng.choice(len(every), size=min(rng.integers(1, most), len(every)), replace=False)
        ref = (i + np.arange(len(responses)) / 8).astype(np.float32)
        item = Item(f"entry-{i}", draw(1, 12), responses)
        entries.append(PairItem(item, tuple(every[c] for c in chosen), ref, weight=0.5 + i))
    return entries


def loader(pairs, **changes):
    layout = {name: changes.pop(name) for name in [*changes] if name in LAYOUT}
    return PairLoader(pairs, Layout(**dict(row_tokens=T) | layout), **(dict(batch_size=8, seed=3) | changes))


def pairs_of(batch):
    """(entry, chosen tokens, rejected tokens, weight, reference log-probs) of every pair, from the arrays alone."""
    arrays, found = batch.batch, []
    for r, q in np.argwhere(arrays.weight != 0):
        sides = [int(s[r, q]) for s in (arrays.chosen_slot, arrays.rejected_slot)]
        tokens = [tuple(oracles.read_slot(arrays.rows, r, k)["tokens"]) for k in sides]
        refs = tuple(float(arrays.ref_logp[r, k]) for k in sides)
        found.append((int(batch.index[r, q]), *tokens, float(arrays.weight[r, q]), refs))
    return found


def expected(pairs):
    found = []
    for i, entry in enumerate(pairs):
        for c, r in entry.pairs:
            tokens = [tuple(oracles.standalone(entry.item, k)["tokens"]) for k in (c, r)]
            found.append((i, *tokens, entry.weight, (float(entry.ref_logp[c]), float(entry.ref_logp[r]))))
    return sorted(found)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("order", ["shuffle", "given"])
def test_an_epoch_holds_every_pair_once_with_its_weight_and_reference(order, share_prompt):
    pairs = pool()
    made = loader(pairs, order=order, share_prompt=share_prompt, row_tokens=T * 2)
    for epoch in range(2):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        found = [pair for step in steps for pair in pairs_of(made.batch(step))]
        assert sorted(found) == expected(pairs)


def test_a_step_holds_exactly_batch_size_pairs_and_only_the_last_fewer():
    pairs = pool()
    total = sum(len(p.pairs) for p in pairs)
    assert total % 8
    made = loader(pairs)
    assert made.steps_per_epoch == -(-total // 8)
    for epoch in range(3):
        counts = [
            np.count_nonzero(made.batch(epoch * made.steps_per_epoch + s).batch.weight)
            for s in range(made.steps_per_epoch)
        ]
        assert counts == [8] * (total // 8) + [total % 8]


def test_an_entry_with_more_pairs_than_a_step_is_split():
    item = Item("a", np.array([1]), tuple(np.array([k + 2]) for k in range(4)))
    entry = PairItem(item, tuple(itertools.combinations(range(4), 2)))
    made = loader([entry], batch_size=4)
    assert [np.count_nonzero(made.batch(s).batch.weight) for s in range(2)] == [4, 2]
    found = [pair[1:3] for s in range(2) for pair in pairs_of(made.batch(s))]
    assert sorted(found) == [((1, c + 2), (1, r + 2)) for c, r in itertools.combinations(range(4), 2)]


def test_any_step_can_be_asked_for_first():
    pairs = pool()
    forward = loader(pairs)
    batches = [forward.batch(s) for s in range(3 * forward.steps_per_epoch)]
    for step in (len(batches) - 1, 0, forward.steps_per_epoch):
        again = loader(pairs).batch(step)
        assert same(again.batch, batches[step].batch)
        assert again.ids == batches[step].ids
    with pytest.raises(ValueError, match="step=-1"):
        forward.batch(-1)


def test_epochs_rounds_and_seeds_are_shuffled_apart():
    pairs = pool()
    base = loader(pairs)
    orders = [
        [base.batch(s).ids for s in range(base.steps_per_epoch)],
        [base.batch(s + base.steps_per_epoch).ids for s in range(base.steps_per_epoch)],
        [loader(pairs, seed=4).batch(s).ids for s in range(base.steps_per_epoch)],
        [loader(pairs, stream_indices=(2,)).batch(s).ids for s in range(base.steps_per_epoch)],
    ]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_a_given_order_is_kept_in_every_epoch():
    pairs = [PairItem(entry.item) for entry in pool()]
    made = loader(pairs, order="given")
    for step in range(2 * made.steps_per_epoch):
        first = step % made.steps_per_epoch * 8
        assert sorted(made.batch(step).ids) == sorted(p.item.id for p in pairs[first : first + 8])


@pytest.mark.parametrize("multiple", [1, 4])
def test_there_are_at_most_so_many_shapes_as_asked_for_in_all_epochs(multiple):
    made = loader(pool(80), multiple=2, shards=2, microbatches=multiple, max_shapes=2, batch_size=16)
    seen = set()
    for step in range(6 * made.steps_per_epoch):
        batch = made.batch(step)
        rows = batch.batch.rows
        seen.add((*rows.tokens.shape, rows.source.shape[1], rows.num_slots, batch.batch.weight.shape[1]))
        assert batch.batch.ref_logp.shape == (rows.tokens.shape[0], rows.num_slots)
    assert seen <= made.compiled
    assert len(made.shapes.sizes) <= 2
    assert all(size % (2 * multiple) == 0 for size in made.shapes.sizes)


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_which_pairs_an_update_takes_does_not_depend_on_the_devices(shards):
    known, known_spread = NO_SHAPES, NO_SHAPES
    for seed, size in ((0, 16), (1, 32)):  # the second round reuses the shapes of the first
        options = dict(batch_size=size, max_shapes=2)
        alone = loader(pool(80, seed=seed), known=known, **options)
        spread = loader(pool(80, seed=seed), shards=shards, known=known_spread, **options)
        assert spread.steps_per_epoch == alone.steps_per_epoch
        for step in range(4 * alone.steps_per_epoch):
            ours, theirs = spread.batch(step), alone.batch(step)
            assert sorted(pairs_of(ours)) == sorted(pairs_of(theirs)), step
            assert len(ours.batch.weight) - len(theirs.batch.weight) in range(shards)
        assert {shape[0] % shards for shape in spread.compiled} == {0}
        known, known_spread = alone.shapes, spread.shapes


def test_the_next_round_reuses_the_shapes_of_the_last():
    first = loader(pool(80), batch_size=24)
    most = len(first.shapes.sizes)
    second = loader(pool(60, seed=1), batch_size=12, max_shapes=most, known=first.shapes)
    assert second.compiled <= first.compiled
    larger = loader(pool(60, seed=1), batch_size=48, max_shapes=most, known=first.shapes)
    assert len(larger.compiled - first.compiled) == 1  # steps that fit no known shape compile one


def test_a_spec_that_is_too_small_grows_and_one_that_is_not_stays():
    pairs = pool(20)
    assert loader(pairs, known=Shapes((), RowSpec(T, 64, 64, 64))).spec == RowSpec(T, 64, 64, 64)
    grown = loader(pairs, known=Shapes((), RowSpec(T, 1, 1, 1))).spec
    assert grown.scored >= max(len(p.item.responses[k]) for p in pairs for pair in p.pairs for k in pair)
    assert grown.slots >= 4


def test_microbatches_get_similar_work():
    made = loader(pool(200), batch_size=48, microbatches=4, shards=2)
    for step in range(made.steps_per_epoch - 1):
        segment = made.batch(step).batch.rows.segment
        work = (segment.reshape(8, -1) > 0).sum(1)
        assert work.max() - work.min() <= T


def test_token_counts_are_those_of_the_rows():
    made = loader(pool())
    for step in range(made.steps_per_epoch):
        batch = made.batch(step)
        assert batch.tokens == batch.batch.rows.tokens.size
        assert batch.real_tokens == (batch.batch.rows.segment > 0).sum()
        assert batch.padding_fraction == pytest.approx(1 - batch.real_tokens / batch.tokens)
        assert set(batch.ids) == {f"entry-{i}" for i in batch.index.ravel() if i >= 0}


def test_empty_places_point_at_a_slot_that_exists_and_weigh_nothing():
    made = loader(pool())
    for step in range(made.steps_per_epoch):
        arrays = made.batch(step).batch
        for slot in (arrays.chosen_slot, arrays.rejected_slot):
            assert slot.min() >= 0 and slot.max() < arrays.rows.num_slots
        assert not arrays.ref_logp[arrays.weight.sum(1) == 0].any()


def test_a_pool_without_reference_log_probs_gets_zeros():
    pairs = [PairItem(entry.item) for entry in pool(9)]
    assert not loader(pairs).batch(0).batch.ref_logp.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=0), "batch_size=0"),
        (dict(order="sorted"), "order='sorted'.*shuffle, given"),
        (dict(shards=0), "shards=0"),
        (dict(row_tokens=10), "more than the 10 of a row"),
        (dict(max_shapes=0), "max_shapes=0"),
    ],
)
def test_bad_arguments_are_refused_with_value_and_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        loader(pool(), **changes)


def test_entries_that_cannot_be_counted_are_refused():
    item = pool(1)[0].item
    with pytest.raises(ValueError, match="'entry-0' has 0 pairs"):
        loader([PairItem(item, ())])
    with pytest.raises(ValueError, match="weight 0"):
        loader([PairItem(item, weight=0.0)])
    with pytest.raises(ValueError, match="no items"):
        loader([])


def demonstrations(count=29):
    return oracles.random_items(np.random.default_rng(4), count, vocab=50, prompt=(1, 9), response=(1, 20), most=1)


def test_demonstrations_come_once_an_epoch_and_weigh_one_each():
    items = demonstrations()
    made = ItemLoader(items, Layout(T, microbatches=2), batch_size=8, seed=0)
    assert made.steps_per_epoch == 4
    for epoch in range(2):
        seen = []
        for step in range(4):
            batch = made.batch(epoch * 4 + step)
            assert batch.weight.sum() == (8 if step < 3 else 5)
            assert (
                len(batch.rows.tokens),
                T,
                *batch.rows.source.shape[1:],
                batch.rows.num_slots,
                0,
            ) in made.compiled
            for r, k in np.argwhere(batch.weight > 0):
                i = int(batch.index[r, k])
                assert oracles.read_slot(batch.rows, r, k) == oracles.standalone(items[i], 0)
                seen.append(i)
        assert sorted(seen) == list(range(29))
    with pytest.raises(ValueError, match="a demonstration has exactly 1"):
        ItemLoader([pool(1)[0].item], Layout(T), batch_size=1, seed=0)


def test_scoring_batches_have_one_shape_and_hold_everything_once():
    items = [entry.item for entry in pool(50)]
    batches = score_batches(items, Layout(T), 4)
    assert len(batches) > 2
    assert {(len(b.rows.tokens), T, b.rows.source.shape[1], b.rows.num_slots, 0) for b in batches} == batches.compiled
    values = [np.where(b.item >= 0, b.item * 10 + b.response, np.nan) for b in batches]
    for i, scores in enumerate(gather_scores(values, batches, items)):
        np.testing.assert_array_equal(scores, [i * 10 + k for k in range(len(items[i].responses))])
    again = score_batches(items[:5], Layout(T), 4, spec=batches.spec)
    assert again.compiled == batches.compiled
    assert len(score_batches([], Layout(T), 4)) == 0
    assert batches[-1].item.shape == batches[0].item.shape == batches[1:2][0].item.shape


def test_a_subset_of_real_pairs_pads_less_than_four_percent(shared_data):
    """Lengths are characters / 4, near enough to tokens; tests/benchmarks/packing_padding.py measures it all."""
    path = shared_data / "preference" / "hh_helpful_rejection_sampled_test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 960)]
    pairs = []
    for i, row in enumerate(rows):
        prompt, chosen, rejected = (
            np.ones(len(row[key]) // 4 + 1, np.int32) for key in ("prompt", "chosen", "rejected")
        )
        room = 1024 - len(chosen) - len(rejected)
        if room > 0:
            pairs.append(PairItem(Item(str(i), prompt[:room], (chosen, rejected))))
    made = PairLoader(pairs, Layout(1024), batch_size=64, seed=0)
    assert len(made.shapes.sizes) <= 3
    for epoch in range(2):
        batches = [made.batch(epoch * made.steps_per_epoch + s) for s in range(made.steps_per_epoch)]
        assert 1 - sum(b.real_tokens for b in batches) / sum(b.tokens for b in batches) < 0.037
