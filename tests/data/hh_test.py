"""configs/hh_small.py: from transcripts to packed rows, on a slice of the real dialogues and with a smaller BPE."""

import gzip
import json

import numpy as np
import pytest

from configs.hh_small import get_config
from sera_jax.checkpoint import Workdir
from sera_jax.data.batches import PairLoader
from sera_jax.data.loading import load_records, truncate_prompt
from sera_jax.data.packing import Layout
from sera_jax.experiment.assembly import read_corpus
from sera_jax.experiment.methods import parse

ROWS = 150


def cut(source, target, extra=()):
    """The first rows of a file, as plain JSONL, with further lines."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(ROWS))]
    target.write_text("".join([*lines, *(line + "\n" for line in extra)]), encoding="utf-8")
    return str(target)


@pytest.fixture(scope="module")
def loaded(shared_data, tmp_path_factory):
    """(config, corpus, work directory, what was said): the config's loading, three of 303 training rows being bad."""
    folder = tmp_path_factory.mktemp("hh")
    online, sampled, base = (
        shared_data / "preference" / f"hh_helpful_{name}_test.jsonl.gz"
        for name in ("online", "rejection_sampled", "base")
    )
    bad = [
        json.dumps({"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": "x", "rejected": "x"}),
        "{",
        '{"prompt": "p"}',
    ]
    raw = get_config()
    raw.workdir = str(folder / "run")
    raw.model.vocab_size = 700
    raw.data.train = f"{cut(online, folder / 'online.jsonl', bad)},{cut(sampled, folder / 'sampled.jsonl')}"
    raw.data.eval = cut(base, folder / "base.jsonl")
    config = parse(raw)
    said: list[str] = []
    corpus = read_corpus(config, Workdir(folder / "run", {}), said.append)
    return config, corpus, folder / "run", said


def records(spec):
    found, _ = load_records(spec, "preference", max_bad_fraction=0.05, name="train")
    return {record.id: record for record in found}


def test_the_prompt_of_a_pair_is_exactly_what_generation_is_given(loaded):
    """Encoded with its responses, listed for bootstrapping, or asked for alone: the same tokens, BOS first."""
    config, corpus, _, _ = loaded
    tokenizer, limit = corpus.tokenizer, config.data.max_prompt_length
    by_id, asked = records(config.data.train), {item.prompt.tobytes() for item in corpus.prompts}
    cut_prompts = 0
    for pair in corpus.train:
        alone = tokenizer.encode_prompt(by_id[pair.item.id].prompt)
        cut_prompts += len(alone) > limit
        given = truncate_prompt(alone, limit=limit, keep_end=True, bos_id=tokenizer.bos_id)
        np.testing.assert_array_equal(pair.item.prompt, given)
        assert pair.item.prompt[0] == tokenizer.bos_id
        assert np.count_nonzero(pair.item.prompt == tokenizer.bos_id) == 1
        assert tokenizer.decode(pair.item.prompt).endswith("Assistant:")
        assert pair.item.prompt.tobytes() in asked
    assert 0 < cut_prompts < len(corpus.train), "the slice should hold prompts on both sides of the limit"


def test_the_prompt_in_a_packed_row_is_that_prompt_too_and_stands_there_once(loaded):
    config, corpus, _, _ = loaded
    loader = PairLoader(corpus.train, Layout(config.data.row_tokens), batch_size=32, seed=0)
    seen = 0
    for step in range(loader.steps_per_epoch):
        batch = loader.batch(step)
        rows = batch.batch.rows
        for r in range(rows.tokens.shape[0]):
            prompts = [
                rows.tokens[r][(rows.segment[r] == segment) & (rows.branch[r] == 0)]
                for segment in range(1, int(rows.segment[r].max()) + 1)
            ]
            expected = [corpus.train[i].item.prompt for i in batch.index[r] if i >= 0]
            assert sorted(p.tobytes() for p in prompts) == sorted(p.tobytes() for p in expected)
            seen += len(prompts)
    assert seen == len(corpus.train)


def test_every_pair_fits_a_row_and_complete_responses_end_as_generation_stops(loaded):
    config, corpus, _, _ = loaded
    data, tokenizer = config.data, corpus.tokenizer
    for pair in [*corpus.train, *corpus.heldout]:
        item = pair.item
        assert len(item.prompt) <= data.max_prompt_length
        assert item.tokens <= data.row_tokens
        for response in item.responses:
            assert 1 <= len(response) <= data.max_completion_length
            assert response[-1] == tokenizer.end_id or len(response) == data.max_completion_length
            assert tokenizer.end_id not in response[:-1]
    assert tokenizer.end_id in tokenizer.stop_ids


def test_the_report_accounts_for_every_row(loaded):
    config, corpus, workdir, said = loaded
    report = json.loads((workdir / "data" / "train.json").read_text())
    bad = {reason: entry["count"] for reason, entry in report["bad"].items()}
    assert report["rows"] == 2 * ROWS + 3
    assert {"identical_pair", "invalid_json", "missing_field"} <= set(bad)
    assert report["kept"] + sum(bad.values()) + sum(e["count"] for e in report["dropped"].values()) == report["rows"]
    assert report["kept"] == len(corpus.train)
    assert sum(source["kept"] for source in report["sources"].values()) == report["kept"]
    assert report["bad"]["invalid_json"]["first"].endswith(f"online.jsonl:{ROWS + 2}")
    long = sum(len(corpus.tokenizer.encode_prompt(r.prompt)) > 128 for r in records(config.data.train).values())
    assert report["noted"]["truncated_prompt"]["count"] == pytest.approx(long, abs=sum(bad.values()))
    assert any(line.startswith("train: 303 rows") for line in said)


def test_training_and_held_out_prompts_differ(loaded):
    _, corpus, _, _ = loaded
    train, heldout = ({pair.item.prompt.tobytes() for pair in pairs} for pairs in (corpus.train, corpus.heldout))
    assert not train & heldout
