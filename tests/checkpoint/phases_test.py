"""Phases: a product is whole or absent, made once, and never taken for another's."""

import json
import re
import subprocess
import sys

import pytest

from sera_jax.checkpoint import StaleWorkdir, Workdir, code, outputs, phases
from sera_jax.checkpoint.addressed import addressed

PRESENT = code.versions()


def _write(text):
    return lambda folder: (folder / "x.txt").write_text(text) and None


def test_a_phase_is_done_once(tmp_path):
    calls = []

    def produce(folder):
        calls.append(folder)
        (folder / "x.txt").write_text("a")

    first = Workdir(tmp_path, {"a": 1}).phase("one", {"n": 1}, produce)
    second = Workdir(tmp_path, {"a": 1}).phase("one", {"n": 1}, produce)
    assert len(calls) == 1
    assert first == second


def test_a_product_that_was_interrupted_is_made_again(tmp_path):
    workdir = Workdir(tmp_path, {})

    def torn(folder):
        (folder / "x.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workdir.phase("one", {}, torn)
    assert not (tmp_path / "phases" / "one").exists()
    product = Workdir(tmp_path, {}).phase("one", {}, _write("whole"))
    assert (product.path / "x.txt").read_text() == "whole"


def test_other_inputs_are_an_error_that_names_the_difference(tmp_path):
    Workdir(tmp_path, {}).phase("one", {"lr": 0.1}, _write("a"))
    with pytest.raises(StaleWorkdir, match=r"lr: 0\.1 there, 0\.2 now"):
        Workdir(tmp_path, {}).phase("one", {"lr": 0.2}, _write("a"))


def test_a_product_of_another_attention_is_gone_on_with_as_its_config_is(tmp_path):
    """A version before wrote down the name of the field; what is asked for now is what stands for all of them."""
    there = Workdir(tmp_path, {}).phase("one", {"model": {"attn_implementation": "xla_loop", "n": 1}}, _write("a"))
    now = {"attn_implementation": "xla", "n": 1}
    assert Workdir(tmp_path, {}).phase("one", {"model": now}, _write("b")) == there
    with pytest.raises(StaleWorkdir, match=r"model\.n: 1 there, 2 now"):
        Workdir(tmp_path, {}).phase("one", {"model": now | {"n": 2}}, _write("b"))


def test_a_changed_config_is_an_error_that_names_the_fields(tmp_path):
    Workdir(tmp_path, {"workdir": "x", "train": {"lr": 0.1}}).phase("one", {}, _write("a"))
    Workdir(tmp_path, {"workdir": "elsewhere", "train": {"lr": 0.1}})  # the folder may be moved
    with pytest.raises(StaleWorkdir, match=r"train\.lr: 0\.1 there, 0\.2 now.*another --config\.workdir"):
        Workdir(tmp_path, {"workdir": "x", "train": {"lr": 0.2}})


def test_a_run_refused_before_it_made_anything_leaves_the_folder_free(tmp_path):
    Workdir(tmp_path, {"train": {"lr": 0.1}})
    Workdir(tmp_path, {"train": {"lr": 0.2}}).phase("one", {}, _write("a"))
    with pytest.raises(StaleWorkdir, match=r"0\.2 there"):
        Workdir(tmp_path, {"train": {"lr": 0.1}})


def test_what_is_refused_before_it_made_anything_leaves_a_finished_run_as_it_was(tmp_path):
    Workdir(tmp_path, {"log": {"report": True}}).phase("one", {}, _write("a"))
    outputs.record(tmp_path, ("config.json", "versions.json"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = Workdir(tmp_path, {"log": {"report": False}})
    again.phase("one", {}, _write("b"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    again.phase("two", {}, _write("b"))
    assert json.loads((tmp_path / "config.json").read_text()) == {"log": {"report": False}}
    assert not (tmp_path / "digests.json").exists()


def test_how_often_a_line_is_written_is_no_part_of_a_product(tmp_path):
    def product(name, lines, text="a"):
        def produce(folder):
            (folder / "metrics.jsonl").write_text(lines)
            (folder / "x.txt").write_text(text)

        return Workdir(tmp_path / name, {}).phase("one", {}, produce)

    first = product("first", "1\n2\n")
    assert product("second", "2\n").digest == first.digest != product("third", "2\n", "b").digest
    (first.path / "metrics.jsonl").write_text("1\n")
    with pytest.raises(ValueError, match="is not what its manifest says"):
        product("first", "")


def test_checkpoints_of_a_finished_phase_do_not_stay(tmp_path):
    workdir = Workdir(tmp_path, {})
    workdir.phase("one", {}, _write("a"))
    (workdir.checkpoints("one") / "3").mkdir(parents=True)  # a kill between the product's rename and the clearing
    Workdir(tmp_path, {}).phase("one", {}, _write("a"))
    assert not workdir.checkpoints("one").exists()


def test_a_product_that_was_edited_is_an_error(tmp_path):
    product = Workdir(tmp_path, {}).phase("one", {}, _write("a"))
    (product.path / "x.txt").write_text("b")
    with pytest.raises(ValueError, match="not what its manifest says"):
        Workdir(tmp_path, {}).phase("one", {}, _write("a"))


def test_a_digit_changed_in_a_manifest_is_an_error(tmp_path):
    manifest = Workdir(tmp_path, {}).phase("one", {"n": 1}, _write("a")).path / "manifest.json"
    manifest.write_text(re.sub(r'"seconds": \d', '"seconds": 7', manifest.read_text()))
    with pytest.raises(ValueError, match=rf"one/manifest.json is not what was written; delete {manifest.parent} and"):
        Workdir(tmp_path, {}).phase("one", {"n": 1}, _write("a"))


def test_a_product_that_lost_its_manifest_is_neither_taken_nor_overwritten(tmp_path):
    product = Workdir(tmp_path, {}).phase("one", {}, _write("a"))
    (product.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=rf"one/manifest.json is missing; delete {product.path} and start"):
        Workdir(tmp_path, {}).phase("one", {}, _write("b"))
    assert (product.path / "x.txt").read_text() == "a"


@pytest.mark.parametrize("how", ["cut", "removed"])
def test_arrays_of_another_size_are_an_error_before_anything_is_read(tmp_path, how):
    def produce(folder):
        (folder / "params" / "arrays").mkdir(parents=True)
        (folder / "params" / "arrays" / "d").write_text("numbers")

    file = Workdir(tmp_path, {}).phase("one", {}, produce).path / "params" / "arrays" / "d"
    file.unlink()
    if how == "cut":
        file.write_text("num")
    says = "is missing" if how == "removed" else "is not what its manifest says"
    with pytest.raises(ValueError, match=rf"{file} {says}; delete {tmp_path}/phases/one and start"):
        Workdir(tmp_path, {}).phase("one", {}, produce)


def test_the_manifest_tells_inputs_files_and_versions(tmp_path):
    product = Workdir(tmp_path, {}).phase("one", {"n": 1}, _write("a"))
    manifest = json.loads((product.path / "manifest.json").read_text())
    assert manifest["inputs"] == {"n": 1}
    assert set(manifest["files"]) == {"x.txt"}
    assert "jax" in manifest["versions"]


def test_two_processes_do_not_work_in_one_directory(tmp_path):
    held = Workdir(tmp_path, {})
    code = (
        "import pathlib, sys; from sera_jax.checkpoint import Workdir, StaleWorkdir\n"
        "try: Workdir(pathlib.Path(sys.argv[1]), {})\n"
        "except StaleWorkdir as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "in use by another process" in shown
    assert held.root == tmp_path


@pytest.mark.parametrize(
    ("name", "there", "now", "refused"),
    [
        ("numerics", "1", "2", True),
        ("jax", "0.9.2", "0.10.0", True),
        ("flax", "0.12.8", "0.13.0", True),
        ("optax", "0.2.8", "1.2.8", True),
        ("jax", "0.10.1", "0.10.2", False),
        ("sera_jax", "0.2.0", "0.3.0", False),
        ("orbax-checkpoint", "0.11.0", "0.12.0", False),
    ],
)
def test_work_of_other_versions_is_gone_on_with_where_they_compute_alike(
    tmp_path, monkeypatch, name, there, now, refused
):
    def as_of(version):
        monkeypatch.setattr(code, "versions", lambda: {**PRESENT, name: version})
        monkeypatch.setattr(phases, "versions", code.versions)

    as_of(there)
    Workdir(tmp_path, {"a": 1}).phase("one", {}, _write("a"))
    as_of(now)
    difference = f"{name} {there} there, {now} now"
    if refused:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
        with pytest.raises(StaleWorkdir, match=rf"other versions \({difference}\).*--allow_other_versions"):
            Workdir(tmp_path, {"a": 1})
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    workdir = Workdir(tmp_path, {"a": 1}, allow_other_versions=refused)
    assert workdir.notes == [f"versions: {difference}"]
    workdir.begin()
    assert [(seen[name], seen.get("allowed", False)) for seen in workdir.code] == [(there, False), (now, refused)]
    assert json.loads((tmp_path / "versions.json").read_text())["history"] == workdir.code
    assert Workdir(tmp_path, {"a": 1}).notes == [], "what was allowed once is the work's own"


def test_work_of_a_release_that_recorded_no_versions_is_refused(tmp_path):
    Workdir(tmp_path, {}).phase("one", {}, _write("a"))
    (tmp_path / "versions.json").unlink()
    with pytest.raises(StaleWorkdir, match=r"numerics unknown there, \d+ now"):
        Workdir(tmp_path, {})


def test_a_folder_without_results_takes_whatever_versions(tmp_path, monkeypatch):
    Workdir(tmp_path, {})
    monkeypatch.setattr(code, "versions", lambda: {**PRESENT, "numerics": "0"})
    assert Workdir(tmp_path, {}).code == [{**PRESENT, "numerics": "0"}]


@pytest.mark.parametrize("made", ["phases/one/x", "checkpoints/one/3/x", "metrics.jsonl"])
def test_whatever_was_made_binds_the_folder_to_its_config(tmp_path, made):
    Workdir(tmp_path, {"seed": 0}).begin()
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_text("x")
    with pytest.raises(StaleWorkdir, match="seed: 0 there, 1 now"):
        Workdir(tmp_path, {"seed": 1})
    (tmp_path / "config.json").unlink()
    with pytest.raises(StaleWorkdir, match=r"no config\.json, so nothing says whose they are"):
        Workdir(tmp_path, {"seed": 1})


@pytest.mark.parametrize("text", ["", '{"inputs": {}, "files": {', "[]", '{"inputs": {}, "files": {}}', "\ud800"])
def test_a_damaged_manifest_is_named_with_the_folder_to_delete(tmp_path, text):
    product = Workdir(tmp_path, {}).phase("one", {}, _write("a"))
    (product.path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError) as error:
        Workdir(tmp_path, {}).phase("one", {}, _write("a"))
    assert str(error.value).startswith(f"{product.path}/manifest.json ")
    assert str(error.value).endswith(f"delete {product.path} and start the same command again to make it anew")


@pytest.mark.parametrize("text", ["", '{"seed" 0}', "[]"])
def test_a_damaged_config_is_named_with_the_way_out(tmp_path, text):
    Workdir(tmp_path, {"seed": 0}).phase("one", {}, _write("a"))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json .*choose another --config\.workdir"):
        Workdir(tmp_path, {"seed": 0})


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "nul\0"])
def test_a_place_where_no_folder_can_be_is_refused_by_name(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"is no folder that can be written .*choose another --config\.workdir"):
        Workdir(tmp_path / place, {})


@pytest.mark.parametrize("text", ["", "[]", '{"history": 5}', '{"history": [1]}'])
def test_a_damaged_list_of_versions_says_nothing_of_who_made_the_work(tmp_path, text):
    Workdir(tmp_path, {}).phase("one", {}, _write("a"))
    (tmp_path / "versions.json").write_text(text)
    with pytest.raises(StaleWorkdir, match=r"numerics unknown there"):
        Workdir(tmp_path, {})


def test_what_is_found_by_its_inputs_is_made_once_and_lies_beside_that_of_others(tmp_path):
    made = []

    def produce(folder):
        made.append(folder)
        (folder / "x.txt").write_text("a")

    addressed(Workdir(tmp_path, {"a": 1}), "rows", {"n": 1}, produce)
    again = addressed(Workdir(tmp_path, {"a": 2}), "rows", {"n": 1}, produce)  # which ties the folder to no config
    other = addressed(Workdir(tmp_path, {"a": 2}), "rows", {"n": 2}, produce)
    assert len(made) == 2 and again.path != other.path
    assert not (tmp_path / "config.json").exists()
    (again.path / "x.txt").write_text("b")
    with pytest.raises(
        ValueError, match=rf"{again.path}/x\.txt is not what its manifest says; delete {again.path} and"
    ):
        addressed(Workdir(tmp_path, {"a": 2}), "rows", {"n": 1}, produce)


def test_what_could_not_be_made_leaves_nothing(tmp_path):
    def produce(folder):
        (folder / "x.txt").write_text("half")
        raise ValueError("bad rows")

    with pytest.raises(ValueError, match="bad rows"):
        addressed(Workdir(tmp_path, {}), "rows", {}, produce)
    assert list((tmp_path / "phases" / "corpus").iterdir()) == []
