"""Lengths before anything is cut: those of the items that are loaded where nothing is."""

import json

import numpy as np
import pytest

from sera_jax import world
from sera_jax.data import lengths
from sera_jax.data.items import PairItem
from sera_jax.data.loading import Limits, load_demonstrations, load_preferences, load_pretrain
from sera_jax.data.tokenizing import Tokenizer


def test_the_table_is_of_lengths_that_occur_and_counts_those_above_the_limit():
    values = list(np.random.default_rng(0).integers(1, 99, 200))
    table = lengths.of(values, 60)
    assert table["count"] == 200
    assert table["max"] == max(values)
    assert table["over"] == sum(value > 60 for value in values)
    for share in lengths.PERCENTILES:
        at = table[f"p{share}"]
        assert at in values
        assert sum(value < at for value in values) <= share / 100 * 200 <= sum(value <= at for value in values)
    assert lengths.of([7], 7) == dict(count=1, p10=7, p50=7, p90=7, p99=7, max=7, limit=7, over=0)
    assert lengths.of([], 7) == {}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(world.write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_what_is_measured_is_the_length_of_every_item_before_it_is_cut(tokenizer, tmp_path):
    rows = world.make_world(world.WorldSpec(seed=1, preferences=30, demonstrations=30))
    for load, kind in ((load_preferences, "preferences"), (load_demonstrations, "demonstrations")):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
        measured, cut = lengths.Measured(tokenizer), lengths.Measured(tokenizer)
        entries, _ = load(str(file), measured, limits=Limits(64, 64, 256))
        items = [entry.item if isinstance(entry, PairItem) else entry for entry in entries]
        load(str(file), cut, limits=Limits(8, 5, 256), max_bad_fraction=1.0)
        assert (measured.prompts, measured.sides) == (cut.prompts, cut.sides)
        assert measured.prompts == [len(item.prompt) for item in items]
        names = ["chosen", "rejected"] if kind == "preferences" else ["response"]
        for k in range(len(names)):
            assert measured.sides[k] == [len(item.responses[k]) for item in items]
        table = cut.table(8, 5)
        assert list(table) == ["prompt", *names]
        assert table[names[0]]["over"] == sum(len(item.responses[0]) > 5 for item in items) > 0


def test_of_a_text_all_but_the_first_token_is_an_answer(tokenizer, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "repeat : owl elm"}\n{"text": "owl"}\n')
    measured = lengths.Measured(tokenizer)
    items, _ = load_pretrain(str(tmp_path / "texts.jsonl"), measured, limits=Limits(64, 64, 256))
    assert measured.prompts == []
    assert measured.sides[0] == [len(item.responses[0]) for item in items]
