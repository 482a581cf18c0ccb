"""Checkpoints: what is read is what was written, on any mesh, or an error says which array is not."""

import errno
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from sera_jax.checkpoint import Checkpoints, CorruptCheckpoint, Workdir, load_tree, save_tree, tree_digest
from sera_jax.checkpoint.arrays import checksums, part_sum
from sera_jax.mesh import make_mesh
from tests import bucket

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def _tree():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
        "step": jnp.asarray(3, jnp.int32),
        "ok": jnp.asarray(True),
    }


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _flip_a_byte(folder):
    """Flip one bit in the middle of the largest data file below `folder`."""
    files = [p for p in folder.rglob("*") if p.is_file() and "d" in p.parts]
    path = max(files or [p for p in folder.rglob("*") if p.is_file()], key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    tree = _tree()
    save_tree(tmp_path / "t", tree)
    back = load_tree(tmp_path / "t", _abstract(tree))
    for name, value in tree.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(back[name]), np.asarray(value))


def test_the_digest_does_not_depend_on_the_mesh_and_sees_every_bit_and_place():
    tree = _tree()
    mesh = make_mesh(2, 2, 2)
    spread = dict(tree, w=jax.device_put(tree["w"], NamedSharding(mesh, PartitionSpec("data", "fsdp"))))
    assert tree_digest(spread) == tree_digest(tree)
    swapped = dict(tree, w=tree["w"][::-1])
    nudged = dict(tree, w=tree["w"].at[3, 3].set(np.nextafter(np.float32(tree["w"][3, 3]), np.float32(9))))
    assert len({tree_digest(t) for t in (tree, swapped, nudged)}) == 3


def _checksum(x):
    """The sixteen digits of an array, in plain numpy: what a file of any release holds."""
    x = np.asarray(x)
    bits = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
    place = np.arange(x.size, dtype=np.uint32)
    digits = ""
    for a, b in ((0x9E3779B1, 0x85EBCA6B), (0xC2B2AE35, 0x27D4EB2F)):
        h = (bits ^ (place * np.uint32(a))) * np.uint32(b)
        h ^= h >> np.uint32(15)
        h = (h + place) * np.uint32(a)
        digits += f"{int(np.sum(h ^ (h >> np.uint32(13)), dtype=np.uint32)):08x}"
    return digits


def test_a_checksum_is_that_of_the_formula_whatever_the_dtype_the_shape_and_the_mesh():
    rng = np.random.default_rng(2)
    tree = _tree() | {"deep": jnp.asarray(rng.normal(size=(3, 8, 10)), jnp.float16), "none": jnp.zeros((0, 3))}
    expected = {f"['{name}']": _checksum(value) for name, value in sorted(tree.items())}
    assert checksums(tree) == expected
    assert list(checksums(tree)) == list(expected)
    spread = dict(
        tree, deep=jax.device_put(tree["deep"], NamedSharding(make_mesh(2, 2, 2), PartitionSpec(None, "fsdp")))
    )
    assert checksums(spread) == expected
    assert checksums({}) == {}


_MANY = """
import jax
from jax.sharding import NamedSharding, PartitionSpec
from sera_jax.checkpoint.arrays import checksums, part_sum
from sera_jax.mesh import make_mesh
mesh = make_mesh()
x = jax.device_put(jax.numpy.ones((64, 32)), NamedSharding(mesh, PartitionSpec("fsdp")))
for _ in range(50):
    checksums([x] * 40)
"""


def test_the_checksums_of_many_leaves_do_not_deadlock_simulated_devices():
    """Each in a process of its own, since the deadlock aborts it."""
    runs = []
    for count in (2, 4):
        environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        runs.append(
            subprocess.Popen(
                [sys.executable, "-c", _MANY], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    tree = _tree()
    save_tree(tmp_path / "t", tree)
    sharding = NamedSharding(make_mesh(1, 4, 2), PartitionSpec("fsdp", "tensor"))
    target = _abstract(tree) | {"w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)}
    back = load_tree(tmp_path / "t", target)
    assert back["w"].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(np.asarray(back["w"]), np.asarray(tree["w"]))


def test_a_flipped_bit_is_an_error_that_names_the_way_out(tmp_path):
    tree = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(64, 64)), jnp.float32)}
    save_tree(tmp_path / "t", tree)
    _flip_a_byte(tmp_path / "t" / "arrays")
    with pytest.raises(CorruptCheckpoint, match=r"delete .* and start the same command again"):
        load_tree(tmp_path / "t", _abstract(tree))


def test_a_damaged_part_of_a_phase_names_the_phase_to_delete(tmp_path):
    tree = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(64, 64)), jnp.float32)}
    product = Workdir(tmp_path, {}).phase("sft", {}, lambda folder: save_tree(folder / "params", tree) and None)
    _flip_a_byte(product.path / "params" / "arrays")
    with pytest.raises(CorruptCheckpoint, match=rf"delete {product.path} and start the same command again"):
        load_tree(product.path / "params", _abstract(tree))
    (product.path / "params" / "checksums.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=rf"delete {product.path} and start the same command again"):
        load_tree(product.path / "params", _abstract(tree))


def _damage(path, how):
    whole = path.read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "emptied": b"", "garbled": bytes(255 - byte for byte in whole)}
    path.unlink()
    if how in damaged:
        path.write_bytes(damaged[how])


def _largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("how", ["cut", "emptied", "garbled", "removed"])
def test_files_of_arrays_that_cannot_be_read_are_one_line_that_names_the_folder_to_delete(tmp_path, capfd, how):
    """Several large arrays, each with a file of its own: orbax then raises a bare Exception and leaves reads behind."""
    tree = {f"w{i}": jnp.asarray(np.random.default_rng(i).normal(size=(64, 65 + i)), jnp.float32) for i in range(6)}
    save_tree(tmp_path / "t", tree)
    checkpoints = Checkpoints(tmp_path / "c", 1, {"n": 1})
    checkpoints.save(3, tree)
    checkpoints.close()

    def read_tree(path):
        return load_tree(path, _abstract(tree))

    def restore(path):
        checkpoints = Checkpoints(path, 1, {"n": 1})
        try:
            return checkpoints.restore(_abstract(tree))
        finally:
            checkpoints.close()

    cases = [
        (tmp_path / "t", read_tree, "", ["arrays/manifest.ocdbt", "checksums.json", None]),
        (tmp_path / "c", restore, "3", ["3/state/manifest.ocdbt", "3/inputs/metadata", "3/sums/metadata", None]),
    ]
    for folder, read, part, files in cases:
        for file in files:
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            _damage(copy / file if file else _largest(copy), how)
            with pytest.raises(CorruptCheckpoint) as error:
                read(copy)
            message = str(error.value)
            assert message.startswith(f"{copy / part} cannot be read (") and "\n" not in message, file
            assert "delete" in message and "start the same command again" in message
            shutil.rmtree(copy)
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err + shown.out


def test_a_list_of_checksums_that_lacks_an_array_proves_nothing(tmp_path):
    save_tree(tmp_path / "t", _tree())
    sums = json.loads((tmp_path / "t" / "checksums.json").read_text())
    (tmp_path / "t" / "checksums.json").write_text(json.dumps(dict(list(sums.items())[1:])))
    with pytest.raises(CorruptCheckpoint, match="1 of 4 arrays fail their checksum"):
        load_tree(tmp_path / "t", _abstract(_tree()))


def test_a_full_disk_is_an_error_of_the_machine_however_orbax_says_it(tmp_path, monkeypatch):
    def full(*_, **__):
        raise ValueError('RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code="28"]')

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full)
    with pytest.raises(OSError) as error:
        save_tree(tmp_path / "t", _tree())
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "t"))


EXHAUSTED = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")


@pytest.mark.parametrize("denied", [MemoryError(), EXHAUSTED, PermissionError(errno.EACCES, "Permission denied")])
def test_what_the_machine_denies_does_not_tell_to_delete_sound_arrays(tmp_path, monkeypatch, denied):
    def restore(*_, **__):
        raise denied

    save_tree(tmp_path / "t", _tree())
    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", restore)
    with pytest.raises(type(denied)) as error:
        load_tree(tmp_path / "t", _abstract(_tree()))
    assert error.value is denied


def test_a_file_that_the_machine_cannot_open_now_is_no_damage_however_orbax_says_it(tmp_path, monkeypatch):
    def restore(*_, **__):
        raise ValueError(f'RESOURCE_EXHAUSTED: Error opening "d/1": {os.strerror(errno.EMFILE)} [os_error_code="24"]')

    save_tree(tmp_path / "t", _tree())
    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", restore)
    with pytest.raises(OSError) as error:
        load_tree(tmp_path / "t", _abstract(_tree()))
    assert (error.value.errno, error.value.filename) == (errno.EMFILE, str(tmp_path / "t"))


def test_failures_leave_the_hooks_for_errors_that_nobody_caught_as_the_first_one_did(tmp_path):
    def hooks():
        with pytest.raises(CorruptCheckpoint):
            load_tree(tmp_path / "nowhere", _abstract(_tree()))
        return sys.excepthook, sys.unraisablehook

    assert hooks() == hooks()


def test_background_checkpoints_survive_donation_and_keep_only_the_last(tmp_path):
    tree = {"w": jnp.ones((256, 256))}
    target = _abstract(tree)
    bump = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in range(5):
        checkpoints.save(step, tree)
        tree = bump(tree)
    checkpoints.close()
    kept = sorted(p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit())
    assert kept == ["3", "4"]
    again = Checkpoints(tmp_path / "c", keep=2)
    assert float(again.restore(target)["w"][0, 0]) == 5.0
    again.close()


def test_a_checkpoint_does_not_ask_whether_to_stop(tmp_path, monkeypatch):
    """JAX counts the questions whether to stop, to agree on one: a question of orbax's, by its step, would move it."""

    def asked(step):
        raise AssertionError(f"asked at {step}")

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked)
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    for step in (1, 2):
        checkpoints.save(step, _tree())
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.name.isdigit()) == ["2"]


def test_notes_beside_a_checkpoint_that_were_changed_are_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", 1, {"n": 1})
    checkpoints.save(3, _tree(), {"loss": 0.25})
    checkpoints.close()
    notes = tmp_path / "c" / "3" / "notes" / "metadata"
    notes.write_text(notes.read_text().replace("0.25", "0.75"))
    again = Checkpoints(tmp_path / "c", 1, {"n": 1})
    with pytest.raises(CorruptCheckpoint, match="fail their checksum, first notes"):
        again.restore(_abstract(_tree()))
    again.close()


def test_a_damaged_checkpoint_is_never_replaced_by_an_older_one_in_silence(tmp_path):
    tree = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(64, 64)), jnp.float32)}
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2):
        checkpoints.save(step, tree)
    checkpoints.close()
    _flip_a_byte(tmp_path / "c" / "2" / "state")
    again = Checkpoints(tmp_path / "c", keep=2)
    with pytest.raises(CorruptCheckpoint, match="delete"):
        again.restore(_abstract(tree))
    again.close()


def test_where_nothing_is_renamed_a_checkpoint_that_was_cut_is_none(tmp_path, monkeypatch):
    """The one before it is the newest; and where renames work again, what was written without them is read."""
    tree = {"w": jnp.arange(8.0)}
    with monkeypatch.context() as patch:
        bucket.mount(patch)
        save_tree(tmp_path / "tree", tree)
        checkpoints = Checkpoints(tmp_path / "c", keep=2)
        for step in (1, 2):
            checkpoints.save(step, {"w": tree["w"] + step})
        checkpoints.close()
        (tmp_path / "c" / "2" / "commit_success.txt").unlink()
        again = Checkpoints(tmp_path / "c", keep=2)
        assert again.latest_step() == 1
        assert again.restore(_abstract(tree))["w"].tolist() == (tree["w"] + 1).tolist()
        again.close()
    assert load_tree(tmp_path / "tree", _abstract(tree))["w"].tolist() == tree["w"].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (4, 3, 5)], ids=str)
def test_parts_that_tile_an_array_add_up_to_its_checksum(dtype, shape):
    x = np.asarray(jnp.asarray(np.random.default_rng(2).normal(size=shape) * 9, dtype))
    whole = int(checksums({"x": x})["['x']"], 16)
    cuts = [(0, size // 2, size) if size > 1 else (0, size) for size in shape]
    tiles = itertools.product(*(itertools.pairwise(cut) for cut in cuts))
    parts = [part_sum(x[tuple(slice(*ends) for ends in tile)], shape, [start for start, _ in tile]) for tile in tiles]
    assert len(parts) == 2 ** len(shape)
    assert [int(n) for n in sum(parts[::-1], np.zeros(2, np.uint32))] == [whole >> 32, whole & 0xFFFFFFFF]
