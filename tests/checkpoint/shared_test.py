"""Products that work directories share: taken only where everything that they were made from is the same."""

import json
import os

import jax.numpy as jnp
import pytest

from sera_jax.checkpoint import Workdir, save_tree
from sera_jax.checkpoint.addressed import addressed
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


def test_what_is_found_by_its_inputs_is_shared_by_them_and_its_name(tmp_path):
    first, second = (workdir(tmp_path, name, names=("corpus",)) for name in "ab")
    made = addressed(first, "train", {"rows": 1}, write("one"))
    taken = addressed(second, "train", {"rows": 1}, never)
    assert files(taken.path) == files(made.path) and taken.digest == made.digest
    for name, inputs in (("eval", {"rows": 1}), ("train", {"rows": 2})):
        assert (addressed(second, name, inputs, write("two")).path / "x.txt").read_text() == "two"
    alone = workdir(tmp_path, "c", names=("sft",))
    assert (addressed(alone, "train", {"rows": 1}, write("three")).path / "x.txt").read_text() == "three"


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


def save_arrays(folder):
    save_tree(folder / "params", {"w": jnp.arange(4096.0)})


def damage(how, place):
    if how == "a file":
        (place / "x.txt").unlink()
        (place / "x.txt").write_text("torn")
    else:
        path = max((place / "params" / "arrays").rglob("*"), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)


@pytest.mark.parametrize(("how", "produce"), [("a file", write("one")), ("a bit of an array", save_arrays)])
def test_a_damaged_product_is_not_taken_but_replaced_by_who_made_it_anew(tmp_path, how, produce):
    workdir(tmp_path, "a").phase("sft", {}, produce)
    (place,) = (tmp_path / "shared").iterdir()
    damage(how, place)
    made = workdir(tmp_path, "b")
    product = made.phase("sft", {}, produce)
    assert (made.fresh, made.taken) == (["sft"], [])
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [place.name]
    assert files(place) == files(product.path)
    assert files(workdir(tmp_path, "c").phase("sft", {}, never).path) == files(product.path)


def test_only_what_was_made_here_from_its_start_is_left_for_others(tmp_path):
    """What lies there may be of other versions, another mesh or machine, and so may a checkpoint."""
    Workdir(tmp_path / "a", {}).phase("sft", {}, write("one"))
    workdir(tmp_path, "a").phase("sft", {}, never)
    going_on = workdir(tmp_path, "b")
    (going_on.checkpoints("sft") / "3").mkdir(parents=True)
    going_on.phase("sft", {}, write("one"))
    assert not (tmp_path / "shared").exists()
    assert workdir(tmp_path, "c").phase("sft", {}, write("one")).digest
    assert (tmp_path / "shared").exists()


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    made = workdir(tmp_path, "a").phase("sft", {}, write("one"))
    taken = workdir(tmp_path, "b").phase("sft", {}, never)
    assert files(taken.path) == files(made.path)
    assert json.loads((taken.path / "manifest.json").read_text())["inputs"] == {}
