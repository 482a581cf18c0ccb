"""Open Assistant's messages, a row each, are read as the trees that they make."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from sera_jax.data import trees
from sera_jax.data.columns import Reading
from sera_jax.data.loading import Limits, load_pretrain, load_records
from sera_jax.data.sources import open_source
from tests.data.loading_test import Bytes


def message(name, parent, text, rank=None, **more):
    about = {"message_tree_id": name[0], "role": "prompter" if rank is None else "assistant", "lang": "en"}
    return {"message_id": name, "parent_id": parent, "text": text, "rank": rank, "deleted": False, **about, **more}


def tree(name):
    """A prompt, three ranked answers of which one was asked on, and one that was deleted."""
    answers = [message(f"{name}{k}", name, f"Answer {k} to {name}.", rank) for k, rank in enumerate((1, 0, 2))]
    gone = message(f"{name}x", name, "Nothing.", 0, deleted=True)
    return [message(name, None, f"Question {name}?"), *answers, gone, message(f"{name}y", f"{name}1", "And?")]


ROWS = [row for name in "abc" for row in tree(name)]
WIDE = Limits(1000, 1000, 4000)


def write(path, rows):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, kind="preference", **options):
    return load_records(path, kind, max_bad_fraction=1.0, **options)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_best_answer_is_paired_with_the_worst_in_whatever_order_the_rows_stand(tmp_path, name, shuffled):
    rows = list(ROWS)
    if shuffled:
        rows = [ROWS[0], *random.Random(0).sample(ROWS[1:], len(ROWS) - 1)]
    records, report = load(write(tmp_path / name, rows))
    found = sorted((r.prompt, r.chosen, r.rejected) for r in records)
    assert found == [(f"Question {n}?", f"Answer 1 to {n}.", f"Answer 2 to {n}.") for n in "abc"]
    assert (report.rows, report.kept, report.bad_rows) == (6, 3, 0)
    assert report.dropped["undesirable"].count == 3, "the deleted messages"


def test_all_pairs_demonstrations_and_prompts(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    records, _ = load(path, reading=Reading(pairs="all"))
    assert len(records) == 9
    assert {(r.chosen[7], r.rejected[7]) for r in records} == {("1", "0"), ("1", "2"), ("0", "2")}
    assert [r.response for r in load(path, "demonstration")[0]] == [f"Answer 1 to {n}." for n in "abc"]
    assert [r.prompt for r in load(path, "prompt")[0]] == [f"Question {n}?" for n in "abc"]


def test_a_message_whose_parent_is_not_there_is_a_bad_row_and_one_that_is_no_message_too(tmp_path):
    rows = [*ROWS, message("q1", "q", "An answer."), message("z", ["list"], "?"), {"message_id": 5, "a": 1}]
    path = write(tmp_path / "rows.jsonl", rows)
    with open(path, "a") as file:
        file.write("no JSON\n\n")
    records, report = load(path)
    assert len(records) == 3
    assert (report.bad["missing_field"].count, report.bad["invalid_json"].count) == (3, 1)
    assert report.noted["blank_line"].count == 1
    assert report.rows == report.kept + report.bad_rows + 3


def test_what_stands_under_a_message_that_is_in_no_tree_is_counted_with_it(tmp_path):
    """Each row once: replies to a deleted message are left out as it is, replies to a lost one are bad as it is."""
    under = [message("ax1", "ax", "To what was deleted.", 0), message("ax2", "ax1", "And on.")]
    lost = [message("q1", "q", "An answer."), message("q2", "q1", "To one whose parent is not there.")]
    records, report = load(write(tmp_path / "rows.jsonl", [*ROWS, *under, *lost]))
    assert len(records) == 3
    assert report.dropped["undesirable"].count == 3 + 2
    assert report.bad["missing_field"].count == 2
    assert report.rows == report.kept + report.bad_rows + 3 + 2


def test_as_texts_and_by_columns_each_message_is_a_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row for row in ROWS if not row["deleted"]])
    assert load_pretrain(path, Bytes(), limits=WIDE)[1].kept == 15
    records, _ = load(path, "prompt", reading=Reading(columns="prompt:text"))
    assert [r.prompt for r in records[:2]] == ["Question a?", "Answer 0 to a."]


def test_any_row_is_read_by_its_place(tmp_path):
    source = trees.of_messages(open_source(write(tmp_path / "rows.jsonl", ROWS)))
    rows = list(source.rows(range(len(source))))
    order = [5, 0, 3, 3]
    assert list(source.rows(order)) == [rows[k] for k in order]
    assert source[2] == rows[2]
    other = open_source(write(tmp_path / "other.jsonl", [{"prompt": "a"}, *ROWS]))
    assert trees.of_messages(other) is other


def test_the_example_of_the_docs_is_read(tmp_path):
    ((record,), report) = load(write(tmp_path / "rows.jsonl", trees.EXAMPLE))
    assert (record.prompt, record.chosen, record.rejected) == ("Name a herb.", "Basil.", "Sand.")
    assert report.kept == 1
