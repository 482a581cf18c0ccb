"""Arrays that are written while the next phase is made: the product is the same, and whole only when they are there."""

import contextlib
import errno
import os
import shutil

import jax
import jax.numpy as jnp
import pytest

from sera_jax import experiment
from sera_jax.checkpoint import Workdir, load_tree, phases, retention, verify
from sera_jax.checkpoint.phases import UNFINISHED
from sera_jax.checkpoint.shared import SharedPhases
from sera_jax.experiment.saved import find_policy
from sera_jax.loops.runtime import NonFinite, Preempted
from sera_jax.mesh import make_mesh
from tests import bucket
from tests.loops.kills import products


@pytest.fixture
def begun(monkeypatch):
    """What begins to write, and what ends, in their order; the writing itself is done at the end."""
    happened, begin_arrays = [], phases.begin_arrays

    def begin(folder, tree):
        happened.append(f"begin {folder.name}")

        def finish():
            happened.append(f"finish {folder.name}")
            begin_arrays(folder, tree)()

        return finish

    monkeypatch.setattr(phases, "begin_arrays", begin)
    return happened


def opened(root, behind=True):
    workdir = Workdir(root, {})
    workdir.writes_behind = behind
    return workdir


def trained(folder):
    """A phase of two trees."""
    (folder / "about.json").write_text("{}")
    return {"params": {"w": jnp.arange(8.0)}, "state": {"m": jnp.ones(3)}}


def is_whole(folder):
    return (folder / "manifest.json").exists() and not (folder / UNFINISHED).exists()


def test_the_next_phase_is_made_before_the_arrays_are_there_and_appears_after_them(tmp_path, begun):
    workdir = opened(tmp_path)
    product = workdir.phase("round1", {}, trained)
    assert not is_whole(product.path) and product.json("about.json") == {}

    def score(folder):
        assert not is_whole(product.path)
        begun.append("score")
        (folder / "logps").write_text("")

    after = workdir.phase("round1/pool", {"policy": product.digest}, score)
    assert begun == ["begin params", "begin state", "score", "finish params", "finish state"]
    assert is_whole(product.path) and is_whole(after.path)
    found = load_tree(product.path / "params", {"w": jax.ShapeDtypeStruct((8,), jnp.float32)})
    assert found["w"].tolist() == list(range(8))


@pytest.mark.parametrize("mounted", [False, True])
def test_the_product_is_that_of_a_run_that_waits(tmp_path, begun, monkeypatch, mounted):
    if mounted:
        bucket.mount(monkeypatch)
    digests = []
    for name in ("waits", "behind"):
        workdir = opened(tmp_path / name, behind=name == "behind")
        digests.append([workdir.phase(phase, {}, trained).digest for phase in ("round1", "round1/below", "round2")])
        workdir.settle()
        digests[-1] += [product.digest for product in workdir.done.values()]
        digests[-1] += [opened(tmp_path / name).phase("round1", {}, trained).digest]
        assert list(verify.strays(tmp_path / name)) == []
        assert [line for folder in verify.phases(tmp_path / name) for line in verify.damages_of_phase(folder)] == []
    assert digests[0] == digests[1]
    assert products(tmp_path / "waits") == products(tmp_path / "behind") != {}


def test_what_a_kill_left_is_made_anew_from_its_checkpoint(tmp_path, begun):
    workdir = opened(tmp_path)
    (workdir.checkpoints("round1") / "3").mkdir(parents=True)
    product = workdir.phase("round1", {}, trained)
    assert verify.phases(tmp_path) == [] and list(verify.strays(tmp_path)) == []
    again = opened(tmp_path)  # the first wrote no array
    assert (workdir.checkpoints("round1") / "3").exists(), "no checkpoint goes before the product is whole"
    assert again.phase("round1", {}, trained).digest == product.digest
    again.settle()
    assert again.fresh == ["round1"] and is_whole(product.path)
    assert not workdir.checkpoints("round1").exists()


def test_what_a_kill_left_half_moved_on_a_bucket_is_made_anew(tmp_path, begun):
    product = opened(tmp_path).phase("round1", {}, trained)
    torn = phases.torn_of(product.path)
    shutil.copytree(product.path, torn)
    (product.path / UNFINISHED).unlink()
    again = opened(tmp_path, behind=False)
    assert again.phase("round1", {}, trained).digest == product.digest
    assert again.fresh == ["round1"] and is_whole(product.path) and not torn.exists()


def test_a_kill_between_the_manifest_and_what_stood_for_it_leaves_a_whole_product(tmp_path, begun):
    workdir = opened(tmp_path, behind=False)
    product = workdir.phase("round1", {}, trained)
    shutil.copy(product.path / "manifest.json", product.path / UNFINISHED)
    again = opened(tmp_path)
    assert again.phase("round1", {}, trained) == product
    assert again.fresh == [] and is_whole(product.path)


def test_whoever_reads_arrays_waits_for_them(tmp_path, begun):
    workdir = opened(tmp_path)
    product = workdir.phase("round1", {}, trained)
    retention.check_kept(workdir, product.path, "state")
    assert is_whole(product.path)


def test_a_phase_that_is_asked_for_again_is_not_made_again(tmp_path, begun):
    workdir = opened(tmp_path)
    first, second = (workdir.phase("round1", {}, trained) for _ in range(2))
    assert second.digest == first.digest and is_whole(first.path) and workdir.fresh == ["round1"]


def test_arrays_that_cannot_be_written_leave_no_whole_product(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(phases, "begin_arrays", lambda folder, tree: full)
        workdir = opened(tmp_path)
        product = workdir.phase("round1", {}, trained)
        with pytest.raises(OSError, match="No space left"):
            workdir.phase("round1/pool", {}, lambda folder: None)
    assert not is_whole(product.path) and not (tmp_path / "phases/round1/pool").exists()
    again = opened(tmp_path, behind=False)
    assert again.phase("round1", {}, trained).digest == product.digest and is_whole(product.path)


def test_a_policy_whose_arrays_are_not_there_is_refused_in_a_line(tmp_path, begun):
    product = opened(tmp_path).phase("round1", {}, trained)
    with pytest.raises(ValueError, match="its arrays are being written; wait"):
        find_policy(product.path)


def test_what_is_left_for_other_runs_is_the_product_alone(tmp_path, begun):
    workdir = opened(tmp_path / "run")
    workdir.shared = SharedPhases(tmp_path / "shared", ("round1",), {})
    product = workdir.phase("round1", {}, trained)
    workdir.phase("round1/pool", {}, lambda folder: (folder / "logps").write_text("") and None)
    (place,) = (tmp_path / "shared").iterdir()
    assert {path.name for path in place.iterdir()} == {"manifest.json", "about.json", "params", "state"}
    taking = opened(tmp_path / "other")
    taking.shared = workdir.shared
    assert taking.phase("round1", {}, trained).digest == product.digest and taking.taken == ["round1"]


def test_a_kill_while_what_a_kill_left_is_removed_changes_nothing(tmp_path, begun, monkeypatch):
    product = opened(tmp_path).phase("round1", {}, trained)

    def killed(folder, **_):
        (folder / UNFINISHED).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(phases.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(tmp_path).phase("round1", {}, trained)
    again = opened(tmp_path, behind=False)
    assert again.phase("round1", {}, trained).digest == product.digest and is_whole(product.path)
    assert not phases.torn_of(product.path).exists()


def test_a_state_is_let_go_of_a_product_that_was_made_anew_before_one_that_is_there(tmp_path, begun):
    for name in ("round1", "round2"):
        opened(tmp_path, behind=False).phase(name, {}, trained)
    shutil.rmtree(tmp_path / "phases" / "round1")
    workdir = opened(tmp_path)
    product = workdir.phase("round1", {}, trained)
    workdir.phase("round2", {}, trained)
    retention.let_go(workdir, product.path, "state")
    assert is_whole(product.path) and not (product.path / "state" / "arrays").exists()


def test_a_product_that_is_taken_appears_after_the_one_before(tmp_path, begun):
    shared = SharedPhases(tmp_path / "shared", ("sft",), {})
    giving = opened(tmp_path / "other", behind=False)
    giving.shared = shared
    giving.phase("sft", {}, trained)
    workdir = opened(tmp_path / "run")
    workdir.shared = shared
    before = workdir.phase("pretrain", {}, trained)
    workdir.phase("sft", {}, trained)
    assert workdir.taken == ["sft"] and is_whole(before.path)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("error", [Preempted("asked"), NonFinite("loss"), ValueError("x"), None])
def test_a_run_that_ends_leaves_whole_what_it_finished(tmp_path, begun, monkeypatch, error, processes):
    """But one of several processes that fails waits for no other."""
    workdir, settled = opened(tmp_path), []
    monkeypatch.setattr(workdir, "settle", lambda: settled.append(True))
    monkeypatch.setattr(experiment.hosts, "count", lambda: processes)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with contextlib.suppress(Preempted, NonFinite, ValueError), experiment._writing_behind(workdir, mesh):
        assert not workdir.writes_behind, "on CPUs"
        if error is not None:
            raise error
    alone = processes == 2 and type(error) is ValueError
    assert settled == [True] * (not alone)
