"""Products that work directories share: taken only where everything that they were made from is the same."""

import json
import os

import pytest

from sera_jax.checkpoint import Workdir
from sera_jax.checkpoint.shared import SharedPhases


def workdir(tmp_path, name, *, names=("sft",), besides=None):
    made = Workdir(tmp_path / name, {})
    made.shared = SharedPhases(tmp_path / "shared", names, besides or {})
    return made


def write(text):
    def produce(folder):
        (folder / "arrays").mkdir()
        (folder / "arrays" / "part").write_text(text)
        (folder / "x.txt").write_text(text)

    return produce


def never(folder):
    raise AssertionError("made again")


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_product_is_made_once_and_taken_whole(tmp_path):
    first, second = workdir(tmp_path, "a"), workdir(tmp_path, "b")
    made = first.phase("sft", {"lr": 0.1}, write("one"))
    taken = second.phase("sft", {"lr": 0.1}, never)
    assert files(taken.path) == files(made.path)
    assert (taken.digest, taken.seconds) == (made.digest, made.seconds)
    assert (first.fresh, first.taken, second.fresh, second.taken) == (["sft"], [], [], ["sft"])
    assert Workdir(tmp_path / "b", {}).phase("sft", {"lr": 0.1}, never) == taken, "found again without the others"


@pytest.mark.parametrize(
    "name, inputs, options",
    [
        ("sft", {"lr": 0.2}, {}),
        ("sft", {"lr": 0.1}, {"besides": {"rows": 2}}),
        ("sft", {"lr": 0.1}, {"names": ("world",)}),
        ("pretrain", {"lr": 0.1}, {"names": ("sft", "pretrain")}),
    ],
)
def test_what_differs_in_anything_is_made_anew(tmp_path, name, inputs, options):
    workdir(tmp_path, "a").phase("sft", {"lr": 0.1}, write("one"))
    product = workdir(tmp_path, "b", **options).phase(name, inputs, write("two"))
    assert (product.path / "x.txt").read_text() == "two"


def test_other_versions_make_their_own(tmp_path, monkeypatch):
    workdir(tmp_path, "a").phase("sft", {}, write("one"))
    monkeypatch.setattr("sera_jax.checkpoint.shared.versions", lambda: {"numerics": "0"})
    assert (workdir(tmp_path, "b").phase("sft", {}, write("two")).path / "x.txt").read_text() == "two"


def test_a_damaged_product_is_not_taken(tmp_path):
    workdir(tmp_path, "a").phase("sft", {}, write("one"))
    (place,) = (tmp_path / "shared").iterdir()
    (place / "x.txt").unlink()
    (place / "x.txt").write_text("torn")
    assert (workdir(tmp_path, "b").phase("sft", {}, write("one")).path / "x.txt").read_text() == "one"


def test_a_phase_that_was_made_before_is_left_for_others_too(tmp_path):
    Workdir(tmp_path / "a", {}).phase("sft", {}, write("one"))
    workdir(tmp_path, "a").phase("sft", {}, never)
    assert workdir(tmp_path, "b").phase("sft", {}, never).digest


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    made = workdir(tmp_path, "a").phase("sft", {}, write("one"))
    taken = workdir(tmp_path, "b").phase("sft", {}, never)
    assert files(taken.path) == files(made.path)
    assert json.loads((taken.path / "manifest.json").read_text())["inputs"] == {}
