"""Prepared data sets: the same records as the files, once per content, without TensorFlow."""

import json
import subprocess
import sys

import pytest

from sera_jax.data.columns import Reading
from sera_jax.data.loading import TooManyBadRows, load_records
from sera_jax.data.prepare import prepare
from sera_jax.data.sources import content_hash, open_source, read_rows

MESSAGES = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ja."},
    {"role": "user", "content": "é"},
]
ROWS = [
    {"prompt": "[not a list]", "chosen": " yes", "rejected": "no", "score": 2, "source": "s"},
    {"prompt": MESSAGES, "chosen": "yes", "rejected": "no\u2028"},
    {"chosen": "\n\nHuman: Hi?\n\nAssistant: yes", "rejected": "\n\nHuman: Hi?\n\nAssistant: no"},
    {"prompt": "p", "chosen": "yes", "rejected": "no", "id": 7},
    {"prompt": "p", "chosen": "yes", "rejected": "never", "id": 7},
]


def write(path, rows=ROWS):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def facts(records):
    return [(r.id, r.prompt, r.chosen, r.rejected, r.extra) for r in records]


def test_a_prepared_data_set_gives_the_records_of_its_files(tmp_path):
    path = write(tmp_path / "a.jsonl")
    directory = prepare(path, kind="preference", data_dir=tmp_path / "prepared")
    expected = facts(load_records(path, "preference")[0])
    assert len({fact[0] for fact in expected}) == len(ROWS)
    for spec in (str(directory), f"tfds:{directory}", f"tfds:{directory}:train"):
        records, report = load_records(spec, "preference")
        assert facts(records) == expected
        assert report.bad_rows == 0
    assert [r.id for r in load_records(f"tfds:{directory}:train[1:3]", "preference")[0]] == [
        e[0] for e in expected[1:3]
    ]
    with pytest.raises(ValueError, match="no split 'test'; its splits: train"):
        open_source(f"tfds:{directory}:test")


def test_rows_of_any_form_and_of_other_names_are_prepared_as_they_are_read(tmp_path):
    pair = {"system": "Be brief.", "question": "Name a herb.", "chosen": "Basil.", "rejected": "Sand."}
    path = write(tmp_path / "a.jsonl", [pair])
    directory = str(prepare(path, kind="preference", data_dir=tmp_path / "prepared"))
    expected = facts(load_records(path, "preference")[0])
    assert facts(load_records(directory, "preference")[0]) == expected
    assert expected[0][1][0] == {"role": "system", "content": "Be brief."}
    without = prepare(path, kind="preference", data_dir=tmp_path / "prepared", reading=Reading("system:"))
    assert load_records(str(without), "preference")[0][0].prompt == "Name a herb."


def test_prepared_rows_are_read_by_index_and_shared_among_hosts(tmp_path):
    directory = str(prepare(write(tmp_path / "a.jsonl"), kind="preference", data_dir=tmp_path / "prepared"))
    source = open_source(directory)
    assert len(source) == len(ROWS)
    assert (source[3].value or {})["id"] == "7"
    assert [row.line for row in read_rows(directory, host=1, host_count=2)] == [2, 4]


def test_a_data_set_is_prepared_once_and_a_changed_file_again(tmp_path):
    path = write(tmp_path / "a.jsonl")
    first = prepare(path, kind="preference", data_dir=tmp_path / "prepared")
    stamp = (first / "dataset_info.json").stat().st_mtime_ns
    assert prepare(path, kind="preference", data_dir=tmp_path / "prepared") == first
    copy = write(tmp_path / "renamed.jsonl")
    assert prepare(copy, kind="preference", data_dir=tmp_path / "prepared") == first
    assert (first / "dataset_info.json").stat().st_mtime_ns == stamp
    write(tmp_path / "a.jsonl", ROWS[:2])
    second = prepare(path, kind="preference", data_dir=tmp_path / "prepared")
    assert second != first
    assert len(open_source(str(second))) == 2
    assert content_hash(str(first)) != content_hash(str(second))


def test_a_prepared_mixture_takes_its_weights(tmp_path):
    a, b = (
        write(tmp_path / "a.jsonl"),
        write(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": "1", "rejected": "2"}] * 4),
    )
    directory = prepare(f"{a}=2,{b}=0.5", kind="preference", data_dir=tmp_path / "prepared")
    assert facts(load_records(str(directory), "preference")[0]) == facts(
        load_records(f"{a}=2,{b}=0.5", "preference")[0]
    )
    assert len(open_source(str(directory))) == 2 * len(ROWS) + 2


def test_demonstrations_are_prepared_too(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "r"}, {"messages": [*MESSAGES[:2]]}])
    directory = prepare(path, kind="demonstration", data_dir=tmp_path / "prepared")
    got, expected = (load_records(spec, "demonstration")[0] for spec in (str(directory), path))
    assert [(r.id, r.prompt, r.response) for r in got] == [(r.id, r.prompt, r.response) for r in expected]
    with pytest.raises(ValueError, match="kind must be one of"):
        prepare(path, kind="pairs", data_dir=tmp_path)


def test_bad_rows_are_reported_and_too_many_leave_nothing_behind(tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS, "{"])
    with pytest.raises(TooManyBadRows, match=r"(?s)1 of 6 rows.*invalid_json"):
        prepare(path, kind="preference", data_dir=tmp_path / "prepared")
    assert not list((tmp_path / "prepared").rglob("dataset_info.json"))
    directory = prepare(path, kind="preference", data_dir=tmp_path / "prepared", max_bad_fraction=0.2)
    assert json.loads((directory / "data" / "prepare.json").read_text())["bad"]["invalid_json"]["count"] == 1


def test_the_command_prints_the_directory_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "sera_jax.data.prepare", f"--data_dir={tmp_path / 'prepared'}"]
    good = subprocess.run(
        [*command, f"--input={write(tmp_path / 'a.jsonl')}"], capture_output=True, text=True, check=True
    )
    assert len(load_records(good.stdout.strip(), "preference")[0]) == len(ROWS)
    missing = subprocess.run([*command, "--input=nowhere.jsonl"], capture_output=True, text=True)
    assert missing.returncode == 1
    assert "error: input: 'nowhere.jsonl' does not exist" in missing.stderr
    assert "Traceback" not in missing.stderr
