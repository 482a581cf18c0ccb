"""Phases: a product is whole or absent, made once, and never taken for another's."""

import json
import subprocess
import sys

import pytest

from sera_jax.checkpoint import StaleWorkdir, Workdir


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
