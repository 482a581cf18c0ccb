"""What takes its name when it is finished: whole or absent, also where nothing can be renamed."""

import os
import shutil

import pytest

from sera_jax import whole
from sera_jax.checkpoint import Workdir
from tests import bucket

MOUNTS = pytest.mark.parametrize("mounted", [False, True])
FILES = ("a.txt", "b/c.txt", "b/d/e.txt", "manifest.json")


def content(folder):
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def fill(folder):
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of {name}")


@MOUNTS
def test_a_file_is_replaced_and_leaves_nothing_beside_it(tmp_path, monkeypatch, mounted):
    if mounted:
        bucket.mount(monkeypatch)
    for text in ("first", "second"):
        whole.write_text(tmp_path / "x", text)
        assert content(tmp_path) == {"x": text}


def test_a_file_that_cannot_be_filled_leaves_the_one_before(tmp_path):
    whole.write_text(tmp_path / "x", "before")

    def fill_half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole.write(tmp_path / "x", fill_half)
    assert (tmp_path / "x").read_text() == "before"


@MOUNTS
def test_a_folder_takes_its_name_and_what_makes_it_whole_comes_last(tmp_path, monkeypatch, mounted):
    fill(tmp_path / "torn")
    copied = []
    monkeypatch.setattr(shutil, "copyfile", lambda a, b, copy=shutil.copyfile: copied.append(a.name) or copy(a, b))
    if mounted:
        bucket.mount(monkeypatch)
    whole.appear(tmp_path / "torn", tmp_path / "folder", last="manifest.json")
    assert content(tmp_path) == {f"folder/{name}": f"of {name}" for name in FILES}
    assert not (tmp_path / "torn").exists()
    assert copied == (["a.txt", "c.txt", "e.txt", "manifest.json"] if mounted else [])


@MOUNTS
def test_a_folder_that_holds_something_is_never_written_over(tmp_path, monkeypatch, mounted):
    fill(tmp_path / "torn")
    whole.write_text(tmp_path / "x", "mine")
    (tmp_path / "folder").mkdir()
    shutil.copyfile(tmp_path / "x", tmp_path / "folder" / "a.txt")
    before = content(tmp_path)
    if mounted:
        bucket.mount(monkeypatch)
    with pytest.raises(OSError):
        whole.appear(tmp_path / "torn", tmp_path / "folder")
    assert content(tmp_path) == before


@MOUNTS
def test_whether_folders_can_be_renamed_is_found_out_without_a_trace(tmp_path, monkeypatch, mounted):
    if mounted:
        bucket.mount(monkeypatch)
    assert whole.folders_can_be_renamed(tmp_path) is not mounted
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", range(len(FILES) + 1))
def test_a_phase_whose_files_were_being_moved_when_the_process_was_killed_is_not_made_again(
    tmp_path, monkeypatch, file
):
    """At any of its files: the next start moves the rest, and finds the product that was made."""
    bucket.mount(monkeypatch)
    made = []

    def produce(folder):
        made.append(folder)
        for name in FILES[:-1]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"of {name}")

    moved, appear = [], whole.appear

    def dying(torn, path, **how):
        if torn.parent.is_relative_to(tmp_path / "phases" / "one.partial") and torn.suffix != ".tmp":
            if len(moved) == file:
                raise KeyboardInterrupt
            moved.append(torn)
        appear(torn, path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(whole, "appear", dying)
        workdir = Workdir(tmp_path, {})
        if file < len(FILES):
            with pytest.raises(KeyboardInterrupt):
                workdir.phase("one", {}, produce)
        else:
            workdir.phase("one", {}, produce)
    product = Workdir(tmp_path, {}).phase("one", {}, produce)
    assert len(made) == 1
    assert set(content(product.path)) == set(FILES)
    assert os.listdir(tmp_path / "phases") == ["one"]
