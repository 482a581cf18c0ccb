"""What verifying finds in phases and checkpoints: nothing where nothing was touched, else a line with the way out."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sera_jax.checkpoint import Checkpoints, Workdir, save_tree, verify
from sera_jax.checkpoint.papers import file_digest, sealed
from sera_jax.checkpoint.phases import to_make_anew
from sera_jax.training.step import TrainState


def tree():
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(1100, 64)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=8), jnp.bfloat16),
    }
    state = optax.chain(optax.clip(1.0), optax.adam(0.1)).init(params)
    return TrainState(params=params, opt_state=state, step=jnp.asarray(3), ok=jnp.asarray(True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A phase of files in a folder, one of arrays, one within it, a checkpoint, and what a kill left unfinished."""
    root = tmp_path_factory.mktemp("made")
    workdir = Workdir(root, {})

    def write_world(folder):
        (folder / "files").mkdir()
        (folder / "files" / "rows.jsonl").write_text('{"a": 1}\n')

    workdir.phase("world", {}, write_world)
    workdir.phase("sft", {}, lambda folder: save_tree(folder / "params", tree()) and None)
    workdir.phase("sft/pool", {}, lambda folder: np.save(folder / "logps.npy", np.zeros(3)))
    (root / "phases" / "sft" / "heldout.partial").mkdir()
    (root / "phases" / "sft" / "heldout.partial" / "logps.npy").write_text("")
    checkpoints = Checkpoints(workdir.checkpoints("sera/round2"), 1, {"n": 1})
    checkpoints.save(3, tree(), {"lines": "x"})
    checkpoints.close()
    return root


@pytest.fixture
def root(made, tmp_path):
    return pathlib.Path(shutil.copytree(made, tmp_path / "run"))


def damages(root):
    lines = [*verify.strays(root)]
    lines += [line for folder in verify.phases(root) for line in verify.damages_of_phase(folder)]
    return lines + [line for folder in verify.checkpoints(root) for line in verify.damages_of_checkpoint(folder)]


def test_what_nobody_touched_is_sound_in_whatever_portions_it_is_read(root, monkeypatch):
    assert [str(path.relative_to(root / "phases")) for path in verify.phases(root)] == ["sft", "sft/pool", "world"]
    assert [path.parts[-3:] for path in verify.checkpoints(root)] == [("sera", "round2", "3")]
    for at_once in (verify._AT_ONCE, 300_000, 1):
        monkeypatch.setattr(verify, "_AT_ONCE", at_once)
        assert damages(root) == []


def test_every_array_is_read(root):
    """Other checksums than those written down, in a manifest that vouches for them: one line on each array."""
    folder = root / "phases" / "sft"
    path = folder / "params" / "checksums.json"
    sums = json.loads(path.read_text())
    path.write_text(json.dumps(dict.fromkeys(sums, "1" * 16)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["params/checksums.json"] = file_digest(path)
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    lines = damages(root)
    assert len(lines) == len(sums) == len(jax.tree.leaves(tree()))
    assert all(line.endswith(f"fails its checksum; {to_make_anew(folder)}") for line in lines)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip_numbers(folder):
    """A bit in the middle of the largest file."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


CHECKPOINT = "checkpoints/sera/round2/3"
DAMAGES = {
    "arrays": (lambda root: flip_numbers(root / "phases/sft/params"), "phases/sft"),
    "arrays of a checkpoint": (lambda root: flip_numbers(root / CHECKPOINT / "state"), CHECKPOINT),
    "file": (lambda root: change(root / "phases/world/files/rows.jsonl", "1", "2"), "phases/world"),
    "manifest": (lambda root: change(root / "phases/sft/pool/manifest.json", "numpy", "nimpy"), "phases/sft/pool"),
    "no JSON": (lambda root: (root / "phases/sft/manifest.json").write_text("{"), "phases/sft"),
    "checksums": (lambda root: change(root / CHECKPOINT / "sums/metadata", '": "', '": "1'), CHECKPOINT),
    "inputs": (lambda root: change(root / CHECKPOINT / "inputs/metadata", "1", "2"), CHECKPOINT),
    "notes": (lambda root: change(root / CHECKPOINT / "notes/metadata", "x", "y"), CHECKPOINT),
    "no notes": (lambda root: (root / CHECKPOINT / "notes/metadata").unlink(), CHECKPOINT),
    "lost": (lambda root: (root / "phases/world/manifest.json").unlink(), "phases/world"),
    "lost by a parent": (lambda root: (root / "phases/sft/manifest.json").unlink(), "phases/sft"),
    "lost within": (lambda root: (root / "phases/sft/pool/manifest.json").unlink(), "phases/sft/pool"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_each_damage_is_a_line_that_names_the_folder_to_delete(root, case):
    damage, folder = DAMAGES[case]
    damage(root)
    (line,) = damages(root)
    named = re.match(rf"{root}/(\S+?):? .*; delete (\S+) and start the same command again", line)
    assert named is not None, line
    assert named[1].startswith(folder)
    assert named[2] == ("it" if folder == CHECKPOINT else f"{root}/{folder}")


def test_checkpoints_that_a_finished_phase_is_about_to_remove_are_not_looked_at(root):
    (root / "checkpoints" / "sft" / "3").mkdir(parents=True)
    assert damages(root) == []
