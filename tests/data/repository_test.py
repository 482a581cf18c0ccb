"""Data sets by their names on the hub: which files a name means."""

import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from sera_jax.data import repository
from sera_jax.data.sources import SUFFIXES, content_hash, open_source, read_rows

ROWS = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(5)]
LAYOUT = {
    "data/train-00000-of-00002.parquet": b"a",
    "data/train-00001-of-00002.parquet": b"b",
    "data/test_prefs-00000-of-00001-b42a775f407cee45.parquet": b"c",
    "extra/train.jsonl.gz": b"d",
    "other/valid/0000.parquet": b"e",
    "other/valid/0001.parquet": b"f",
    "notes.pdf": b"g",
    ".gitattributes": b"\n",
}


def parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("parts", "pinned", "files"),
    [
        ("", ":default:train", [f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)]),
        (":test_prefs", ":default:test_prefs", ["data/test_prefs-00000-of-00001-b42a775f407cee45.parquet"]),
        (":extra", ":extra:train", ["extra/train.jsonl.gz"]),
        (":other", ":other:valid", ["other/valid/0000.parquet", "other/valid/0001.parquet"]),
        (":default:train", ":default:train", [f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)]),
    ],
)
def test_the_usual_layout_says_configs_and_splits(server, parts, pinned, files):
    commit = server.add("datasets/org/rows", LAYOUT)
    for revision in ("", "@main", f"@{commit}"):
        found = repository.find(f"hub:org/rows{parts}{revision}", SUFFIXES)
        assert list(found.files) == files
        assert found.pinned == f"hub:org/rows{pinned}@{commit}"
    assert server.files_sent() == [".gitattributes"], "names are enough"


@pytest.mark.parametrize("parts", [":absent", ":default:absent", ":absent:train"])
def test_a_wrong_name_lists_what_there_is(server, parts):
    server.add("datasets/org/rows", LAYOUT)
    with pytest.raises(ValueError, match=r"absent.*default: test_prefs, train; extra: train; other: valid"):
        repository.find(f"hub:org/rows{parts}", SUFFIXES)


def test_what_the_readme_lists_comes_before_the_layout(server):
    readme = """---
configs:
- config_name: first
  data_files:
  - {split: train, path: "data/train-*"}
  - {split: held, path: ["data/**/a.jsonl", "b?.jsonl"]}
- config_name: second
  data_dir: extra
  data_files: "*.jsonl.gz"
---
"""
    more = {"README.md": readme.encode(), "data/x/y/a.jsonl": b"h", "b1.jsonl": b"i", "b10.jsonl": b"j"}
    server.add("datasets/org/rows", {**LAYOUT, **more})

    def find(parts):
        return list(repository.find(f"hub:org/rows{parts}", SUFFIXES).files)

    assert find(":first") == [f"data/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    assert find(":first:held") == ["b1.jsonl", "data/x/y/a.jsonl"]
    assert find(":second") == ["extra/train.jsonl.gz"]
    with pytest.raises(ValueError, match="several configs and none named; its configs and splits are first: "):
        find("")


def test_what_cannot_be_read_or_understood_is_refused_with_the_way_out(server):
    server.add("datasets/org/rows", {"rows.pdf": b"0", "load.py": b"1", ".gitattributes": b"\n"})
    with pytest.raises(ValueError, match=r"holds no .*\.csv.*refs/convert/parquet"):
        repository.find("hub:org/rows", SUFFIXES)
    for spec in ("hub:", "hub:a:b:c:d", "hub:/a"):
        with pytest.raises(ValueError, match=r"write hub:ORG/NAME"):
            repository.find(spec, SUFFIXES)
    server.add("datasets/org/rows", {"train-00000-of-00003.jsonl": b"0", ".gitattributes": b"\n"})
    with pytest.raises(ValueError, match="1 of the 3 parts"):
        repository.find("hub:org/rows", SUFFIXES)
    with pytest.raises(ValueError, match=r"data\.train: .*401 to org/absent: no data set"):
        open_source("hub:org/absent", field="data.train")


def test_the_rows_of_all_files_are_read_in_order_and_by_index(server, tmp_path):
    files = {"train-00000-of-00002.parquet": parquet(ROWS[:2]), "train-00001-of-00002.parquet": parquet(ROWS[2:])}
    server.add("datasets/org/rows", {**files, ".gitattributes": b"\n"})
    source = open_source("hub:org/rows")
    assert [row.value for row in read_rows("hub:org/rows")] == ROWS
    assert [row.value["prompt"] for row in source.rows([4, 0, 3, 1, 2])] == ["p4", "p0", "p3", "p1", "p2"]
    assert [row.value for row in read_rows("hub:org/rows", host=1, host_count=2)] == ROWS[1::2]
    (last,) = source.rows([4])
    assert last.path.endswith("train-00001-of-00002.parquet")
    assert last.line == 3, "where it lies in its own file"
    first = content_hash("hub:org/rows")
    server.add("datasets/org/rows", {"train.jsonl": jsonl(ROWS), ".gitattributes": b"\n"})
    assert [row.value for row in read_rows("hub:org/rows")] == ROWS
    assert content_hash("hub:org/rows") != first
