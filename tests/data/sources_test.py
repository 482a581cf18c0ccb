"""Sources: what is read, in which order, and what is said about what cannot be read."""

import builtins
import collections
import gzip
import json
import subprocess
import sys
import types

import pytest

from sera_jax.data.loading import TooManyBadRows, load_records
from sera_jax.data.sources import (
    MAX_DEPTH,
    MAX_ROW_BYTES,
    TfdsSource,
    content_hash,
    open_source,
    parse_mixture,
    read_rows,
)

ROWS = [{"prompt": f"p{i}", "chosen": "é" * i, "rejected": "no\u2028line"} for i in range(7)]


def write(path, rows=ROWS):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.name.endswith(".gz") else text)
    return str(path)


def write_parquet(path, rows=ROWS, **options):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return str(path)


def errors(spec):
    return [(row.line, row.error) for row in read_rows(spec) if row.error]


def test_jsonl_gzip_and_parquet_give_the_same_rows(tmp_path):
    paths = [write(tmp_path / "a.jsonl"), write(tmp_path / "a.jsonl.gz")]
    paths.append(write_parquet(tmp_path / "a.parquet", row_group_size=3))
    for path in paths:
        rows = list(read_rows(path))
        assert [row.value for row in rows] == ROWS
        assert [row.line for row in rows] == list(range(1, 8))
        assert {row.path for row in rows} == {path}


def test_any_row_can_be_read_by_index(tmp_path):
    for path in (write(tmp_path / "a.jsonl"), write_parquet(tmp_path / "a.parquet", row_group_size=2)):
        source = open_source(path)
        assert len(source) == 7
        assert [row.value for row in source.rows([5, 0, 6, 5])] == [ROWS[i] for i in (5, 0, 6, 5)]
        assert source[3].value == ROWS[3]
        with pytest.raises(IndexError, match="row 7"):
            source[7]


def test_hosts_share_the_rows_without_gap_or_overlap(tmp_path):
    path = write(tmp_path / "a.jsonl")
    read = [[row.line for row in read_rows(path, host=host, host_count=3)] for host in range(3)]
    assert read == [[1, 4, 7], [2, 5], [3, 6]]
    with pytest.raises(ValueError, match="host"):
        list(read_rows(path, host=3, host_count=3))


def test_the_last_line_needs_no_newline_and_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}')
    assert [row.value for row in read_rows(str(path))] == [{"a": 1}, {"a": 2}]


def test_every_unreadable_line_is_a_row_with_its_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"a": 1}', b'{"a": "\xff"}', b'{"a": ', b"", b"[1, 2]", b'"text"', b'{"a": %s}' % (b"9" * 5000)]
    path.write_bytes(b"\n".join([*lines, b"[" * 100_000, b'{"a": 2}']))
    expected = ["non_utf8", "invalid_json", "blank_line", "not_an_object", "not_an_object"]
    assert errors(str(path)) == list(enumerate([*expected, "invalid_json", "deep_row"], start=2))
    assert open_source(str(path))[8].value == {"a": 2}


def test_an_enormous_row_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * MAX_ROW_BYTES + b'"}\n{"a": 1}\n')
    assert errors(str(path)) == [(1, "enormous_row")]


def test_a_damaged_gzip_file_gives_its_readable_rows_and_a_failure(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write(path, [{"a": str(i) * 50} for i in range(20_000)])
    path.write_bytes(path.read_bytes()[:-20])
    rows = list(read_rows(str(path)))
    assert rows[-1].error == "corrupt_gzip"
    assert sum(row.value is not None for row in rows) == rows[-1].line - 1 > 0 or rows[-1].line == 1


def test_git_lfs_pointers_are_recognised_whatever_they_are_called(shared_data, tmp_path):
    for name in ("git_lfs_pointer.jsonl", "git_lfs_pointer.jsonl.gz"):
        assert errors(str(shared_data / "badrows" / name)) == [(1, "git_lfs_pointer")]
    pytest.importorskip("pyarrow")
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes((shared_data / "badrows" / "git_lfs_pointer.jsonl").read_bytes())
    assert errors(str(parquet)) == [(1, "git_lfs_pointer")]
    parquet.write_bytes(b"PAR1 but no more")
    assert errors(str(parquet)) == [(1, "corrupt_parquet")]


def test_an_empty_file_is_a_failure_and_not_an_empty_data_set(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert errors(write(tmp_path / name, [])) == [(1, "empty_file")]


def test_a_file_that_is_not_there_is_named_with_its_field(tmp_path):
    for spec in (str(tmp_path / "none.jsonl"), str(tmp_path / "none")):
        with pytest.raises(ValueError, match=r"data\.train.*none.*does not exist"):
            open_source(spec, field="data.train")
    with pytest.raises(ValueError, match="mount the bucket"):
        open_source("gs://bucket/a.jsonl")
    with pytest.raises(ValueError, match="not a prepared tfds dataset"):
        open_source(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"\x80\x04 pickled")
    with pytest.raises(ValueError, match=r"cannot tell what .* holds"):
        open_source(str(tmp_path / "a.bin"))
    with pytest.raises(ValueError, match="no tfds dataset 'no_such_data_set'"):
        open_source("tfds:no_such_data_set:train")


def test_a_slice_that_the_format_of_a_tfds_dataset_ignores_is_refused():
    splits = {"train": types.SimpleNamespace(num_examples=5), "train[:3]": types.SimpleNamespace(num_examples=3)}
    builder = types.SimpleNamespace(
        info=types.SimpleNamespace(splits=splits), data_path="somewhere", as_data_source=lambda split: range(5)
    )
    assert len(TfdsSource(builder, "train", "tfds:x")) == 5
    with pytest.raises(ValueError, match="names 3 rows, but its format gives 5"):
        TfdsSource(builder, "train[:3]", "tfds:x:train[:3]")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match="needs pyarrow"):
        open_source(str(tmp_path / "a.parquet"))


def test_a_mixture_is_a_list_of_sources_with_weights():
    assert parse_mixture("a.jsonl=0.5,b.jsonl") == [("a.jsonl", 0.5), ("b.jsonl", 1.0)]
    assert parse_mixture(" a.jsonl , day=3/b.jsonl=2 ") == [("a.jsonl", 1.0), ("day=3/b.jsonl", 2.0)]
    assert parse_mixture("tfds:prefs:train[:50%]=2") == [("tfds:prefs:train[:50%]", 2.0)]


@pytest.mark.parametrize(
    "spec", ["a.jsonl=0", "a.jsonl=-1", "a.jsonl=nan", "a.jsonl=inf", "a.jsonl=1e9", "a.jsonl=half"]
)
def test_a_weight_that_means_nothing_is_refused(spec):
    with pytest.raises(ValueError, match=r"data\.train.*weight"):
        parse_mixture(spec, field="data.train")


@pytest.mark.parametrize("spec", ["", ",", "a.jsonl,", "=0.5", "a.jsonl,a.jsonl"])
def test_a_mixture_without_a_name_or_with_one_twice_is_refused(spec):
    with pytest.raises(ValueError, match=r"names no source|named twice"):
        parse_mixture(spec)


def test_the_content_hash_is_of_the_bytes_and_not_of_the_path(tmp_path):
    first = content_hash(write(tmp_path / "a.jsonl"))
    assert content_hash(write(tmp_path / "b.jsonl")) == first
    assert content_hash(write(tmp_path / "a.jsonl", ROWS[:-1])) != first


def test_reading_starts_no_device_and_imports_no_other_framework():
    code = (
        "import sys, sera_jax.data.loading, sera_jax.data.prepare, sera_jax.data.tfds_builders\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a device was started'\n"
        "assert not {'tensorflow', 'torch'} & set(sys.modules), 'another framework was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_field_that_stands_twice_and_nesting_without_end_are_refused_under_reasons_of_their_own(tmp_path):
    path = tmp_path / "a.jsonl"
    twice = ['{"a": 1, "a": 1}', '{"a": [{"b": 1, "\\u0062": 2}]}']
    deep = ['{"a": ' + "[" * n + "]" * n + "}" for n in (MAX_DEPTH - 1, MAX_DEPTH, 900, 100_000)]
    path.write_text("\n".join([*twice, *deep, '{"a": "%s"}' % ("[" * 500)]))
    expected = ["duplicate_field", "duplicate_field", None, "deep_row", "deep_row", "deep_row", None]
    assert [row.error for row in read_rows(str(path))] == expected


def test_a_flipped_bit_of_a_parquet_file_is_a_row_with_its_reason(tmp_path):
    good, path = tmp_path / "good.parquet", tmp_path / "a.parquet"
    write_parquet(good, [{"a": f"text {n}", "b": n} for n in range(100)], compression="NONE", use_dictionary=False)
    found = collections.Counter()
    for place in range(0, len(good.read_bytes()), 7):
        damaged = bytearray(good.read_bytes())
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found.update({error for _, error in errors(str(path))})
    assert found.keys() == {"corrupt_parquet", "non_utf8"}


def packed(path, text):
    if path.endswith(".zst"):
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.CompressedOutputStream(path, "zstd") as stream:
            stream.write(text.encode())
    else:
        data = gzip.compress(text.encode()) if path.endswith(".gz") else text.encode()
        with open(path, "wb") as file:
            file.write(data)
    return path


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
LAYOUTS = {
    "lines": LINES,
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=2),
    "a row a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "pretty objects": "\n".join(json.dumps(row, indent=1) for row in ROWS),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.json.gz", "a.jsonl.zst", "a"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_is_read_by_its_contents_whatever_its_name(tmp_path, layout, name):
    path = packed(str(tmp_path / name), LAYOUTS[layout])
    assert [row.value for row in read_rows(path)] == ROWS
    assert open_source(path)[5].value == ROWS[5]


def test_brackets_quotes_and_commas_in_a_text_do_not_cut_an_array(tmp_path):
    rows = [{"prompt": text} for text in ('a "b], [', "back\\", "},{", '\\"')]
    assert [r.value for r in read_rows(packed(str(tmp_path / "a.json"), json.dumps(rows)))] == rows


def test_a_damaged_array_stops_a_run_and_a_damaged_row_is_one_row(tmp_path):
    whole = json.dumps(ROWS)
    for cut in (whole[:-1], whole[:-9], whole + "]", whole[:-40]):
        assert errors(packed(str(tmp_path / "a.json"), cut))[-1][1] == "corrupt_array"
    assert errors(packed(str(tmp_path / "b.json"), '[{"a": 1}, 7, {"a": }, {"a": 2}]')) == [
        (2, "not_an_object"),
        (3, "invalid_json"),
    ]
    for first in ("[[[", "{", "[1, 2]"):
        found = errors(packed(str(tmp_path / "d.jsonl"), f"{first}\n{LINES}"))
        assert [line for line, _ in found] == [1], "JSON Lines whose first line is damaged"
    assert errors(packed(str(tmp_path / "c.json"), "[]")) == [(1, "empty_file")]


def test_csv_is_read_with_its_quotes_and_lines_and_other_marks(tmp_path):
    text = 'prompt,chosen,rejected\n"a, ""b""\nc",yes,no\nd,,no\n'
    expected = [
        {"prompt": 'a, "b"\nc', "chosen": "yes", "rejected": "no"},
        {"prompt": "d", "chosen": "", "rejected": "no"},
    ]
    for name in ("a.csv", "a.csv.gz"):
        assert [row.value for row in read_rows(packed(str(tmp_path / name), text))] == expected
    tabs = packed(str(tmp_path / "a.tsv"), "prompt\tresponse\nHi, you\tYes\n")
    assert [row.value for row in read_rows(tabs)] == [{"prompt": "Hi, you", "response": "Yes"}]
    ragged = packed(str(tmp_path / "b.csv"), "a,b\n1,2\n1,2,3\n")
    assert errors(ragged) == [(2, "ragged_csv")]


def test_bytes_that_nobody_reads_are_left_alone(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", [{"prompt": "p", "chosen": "a", "rejected": "b", "image": b"\xff\xd8"}]
    )
    records, _ = load_records(path, "preference")
    assert records[0].prompt == "p"
    bad = write_parquet(tmp_path / "b.parquet", [{"prompt": b"\xff\xd8", "chosen": "a", "rejected": "b"}])
    with pytest.raises(TooManyBadRows, match=r"(?s)non_utf8.*prompt: byte 0xff"):
        load_records(bad, "preference")


def test_arrow_files_streams_and_saved_data_sets_give_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROWS)
    for name, new in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with new(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
        assert [row.value for row in read_rows(str(tmp_path / f"{name}.arrow"))] == ROWS
    folder = tmp_path / "saved"
    folder.mkdir()
    (tmp_path / "stream.arrow").rename(folder / "data-00000-of-00001.arrow")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    assert [row.value for row in read_rows(str(folder))] == ROWS
    (tmp_path / "file.arrow").write_bytes((tmp_path / "file.arrow").read_bytes()[:-50])
    assert errors(str(tmp_path / "file.arrow")) == [(1, "corrupt_arrow")]


def test_a_glob_or_folder_is_all_its_files_of_one_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        packed(str(folder / f"train-0000{number}-of-00003.jsonl"), json.dumps({"n": number}) + "\n")
    (tmp_path / "README.md").write_text("a card")
    for spec in (str(tmp_path), str(folder), f"{folder}/train-*.jsonl"):
        assert [row.value for row in read_rows(spec)] == [{"n": 0}, {"n": 1}, {"n": 2}]
        assert open_source(spec)[2].value == {"n": 2}
        assert content_hash(spec) == content_hash(str(folder))
    packed(str(folder / "test-00000-of-00001.jsonl"), "{}\n")
    with pytest.raises(ValueError, match=r"several splits .*test-00000"):
        open_source(str(tmp_path))
    (folder / "train-00001-of-00003.jsonl").unlink()
    with pytest.raises(ValueError, match="number 00001 is missing"):
        open_source(f"{folder}/train-*.jsonl")
    with pytest.raises(ValueError, match="no file is called"):
        open_source(f"{folder}/none-*.jsonl")
