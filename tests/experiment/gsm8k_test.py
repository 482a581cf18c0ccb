"""configs/gsm8k_small.py: its lengths, its answer pattern and its held-out questions, on the real rows."""

import gzip
import json

import pytest

from configs.gsm8k_small import get_config
from sera_jax.checkpoint import Workdir
from sera_jax.evaluation.answers import last_match
from sera_jax.experiment.assembly import read_corpus
from sera_jax.experiment.methods import parse


@pytest.fixture(scope="module")
def files(shared_data):
    """(training rows, test rows), as paths."""
    return [shared_data / "demonstrations" / f"gsm8k_{name}.jsonl.gz" for name in ("train", "test")]


@pytest.fixture(scope="module")
def loaded(files, tmp_path_factory):
    """(config, corpus, work directory)."""
    raw = get_config()
    raw.workdir = str(tmp_path_factory.mktemp("gsm8k"))
    raw.data.demonstrations, raw.data.eval = map(str, files)
    config = parse(raw)
    workdir = Workdir(tmp_path_factory.getbasetemp() / "gsm8k-run", {})
    return config, read_corpus(config, workdir, lambda text: None), workdir.root


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_pattern_finds_the_answer_that_a_row_gives_in_all_but_a_few_rows(files):
    pattern = get_config().eval.answer_pattern
    for path in files:
        found = [last_match(pattern, row["response"]) == row["answer"].replace(",", "") for row in rows(path)]
        assert sum(found) >= 0.999 * len(found)


def test_the_lengths_hold_most_rows_and_the_others_are_cut_and_counted(loaded):
    config, corpus, root = loaded
    for name, items in (("demonstrations", corpus.demonstrations), ("eval", None)):
        report = json.loads((root / "data" / f"{name}.json").read_text())
        assert (report["rows"], report["bad"], report["dropped"]) == (report["kept"], {}, {})
        assert report["noted"]["truncated_response"]["count"] < 0.05 * report["rows"]
        assert report["noted"]["truncated_prompt"]["count"] < 0.02 * report["rows"]
        if items is not None:
            cut = sum(item.responses[0][-1] != corpus.tokenizer.end_id for item in items)
            assert cut == report["noted"]["truncated_response"]["count"]
    longest = max(len(item.prompt) + len(item.responses[0]) for item in corpus.demonstrations)
    assert longest <= config.data.row_tokens


def test_no_question_is_both_trained_on_and_held_out(loaded):
    config, corpus, _ = loaded
    known = {item.prompt.tobytes() for item in corpus.demonstrations}
    assert not known & {item.prompt.tobytes() for item in corpus.eval_prompts}
    assert len(corpus.eval_prompts) == config.eval.num_prompts
    assert len(corpus.pretrain) == len(corpus.demonstrations)


def test_an_answer_comes_back_from_its_tokens_whole(loaded, files):
    config, corpus, _ = loaded
    for row, item in zip(rows(files[0])[:200], corpus.demonstrations):
        text = corpus.tokenizer.decode_response(item.responses[0])
        whole = item.responses[0][-1] == corpus.tokenizer.end_id
        assert text == row["response"] if whole else row["response"].startswith(text)
        assert not whole or last_match(config.eval.answer_pattern, text) == row["answer"].replace(",", "")
