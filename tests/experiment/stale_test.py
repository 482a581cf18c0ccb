"""Work directories that were worked in before: what is found there is that of the same inputs, refused, or made anew.

Whole runs, which must end in the same parameters as one in a fresh folder.
"""

import json
import re
import shutil

import jax
import pytest

from sera_jax import experiment, main, world
from sera_jax.checkpoint import StaleWorkdir, Workdir
from sera_jax.experiment import methods
from sera_jax.experiment.assembly import open_tokenizer
from sera_jax.experiment.methods import METHODS
from sera_jax.loops.runtime import Preempted
from sera_jax.mesh import make_mesh
from tests import bucket
from tests.loops.flags import set_flags
from tests.loops.tiny import tiny_config

SHORT = {
    "world__name": "",
    "sera__rounds": 1,
    "pretrain__max_steps": 1,
    "sft__max_steps": 2,
    "train__max_steps": 3,
    "eval__num_prompts": 1,
    "sampling__max_new_tokens": 2,
}


@pytest.fixture(scope="module")
def rows():
    return world.make_world(world.WorldSpec(seed=1, preferences=24, demonstrations=24, heldout_preferences=4))


@pytest.fixture(scope="module")
def go(tmp_path_factory, rows):
    """Runs, or goes on with, a run: its summary. With `stop`, it is asked to stop once it aligns."""
    files = tmp_path_factory.mktemp("files")
    world.write_tokenizer(files / "tokenizer")
    write(files / "train.jsonl", rows["preferences"])
    write(files / "eval.jsonl", rows["heldout_preferences"])

    def run(workdir, *, other_demonstrations=False, stop=False, allow=False, **changes):
        write(files / "demonstrations.jsonl", rows["demonstrations"][:16][:: -1 if other_demonstrations else 1])
        paths = {f"data__{field}": str(files / f"{field}.jsonl") for field in ("train", "eval", "demonstrations")}
        paths["model__tokenizer_name_or_path"] = str(files / "tokenizer")
        config = tiny_config(workdir, **paths, **SHORT, **changes)
        begun = workdir / "checkpoints" / "round1"
        return experiment.run(config, stop_requested=lambda: stop and begun.exists(), allow_other_versions=allow)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_mesh", lambda *_: make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        yield run


@pytest.fixture(scope="module")
def fresh(go, tmp_path_factory):
    """A finished run's folder, and what it ended with."""
    workdir = tmp_path_factory.mktemp("fresh")
    return workdir, go(workdir)["params_sha256"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_following_the_advice_after_a_refusal_ends_as_a_fresh_run(go, fresh, tmp_path):
    with pytest.raises(Preempted, match="stopped in round1 after update 1"):
        go(tmp_path, other_demonstrations=True, stop=True)
    with pytest.raises(StaleWorkdir, match=r"made from other inputs \(first difference items") as refused:
        go(tmp_path)
    folder, checkpoints = re.findall(r"delete (\S+), the phases after it and (\S+)", str(refused.value))[0]
    assert folder == str(tmp_path / "phases" / "pretrain")
    for made in (tmp_path / "phases").glob("*"):
        if made.name != "init":
            shutil.rmtree(made)
    with pytest.raises(StaleWorkdir, match="is of a phase with other inputs") as refused:  # after half of the advice
        go(tmp_path)
    assert f"delete {tmp_path / 'checkpoints' / 'round1'} to start that phase anew" in str(refused.value)
    shutil.rmtree(checkpoints)
    assert go(tmp_path)["params_sha256"] == fresh[1]


def test_a_mounted_bucket_that_locks_and_renames_nothing_ends_in_the_same_bytes(go, fresh, tmp_path, monkeypatch):
    bucket.mount(monkeypatch)
    with pytest.raises(Preempted):
        go(tmp_path, stop=True)
    assert [p.name for p in tmp_path.rglob("commit_success.txt")], "orbax, too, does without"
    summary = go(tmp_path)
    assert summary["params_sha256"] == fresh[1]
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.partial"))


def test_without_its_phases_a_run_goes_on_as_itself_and_as_no_other(go, fresh, tmp_path):
    with pytest.raises(Preempted):
        go(tmp_path, stop=True)
    shutil.rmtree(tmp_path / "phases")
    with pytest.raises(StaleWorkdir, match=r"2 fields differ: seed: 0 there, 1 now; train.learning_rate: 0.001 there"):
        go(tmp_path, seed=1, train__learning_rate=2e-3)
    assert go(tmp_path)["params_sha256"] == fresh[1]


def test_a_run_of_another_numerics_version_goes_on_where_it_is_told_to_and_says_so(go, fresh, tmp_path):
    workdir = shutil.copytree(fresh[0], tmp_path / "run")
    record = json.loads((workdir / "versions.json").read_text())
    record["history"][-1]["numerics"] = "0"
    (workdir / "versions.json").write_text(json.dumps(record))
    with pytest.raises(StaleWorkdir, match=r"made by other versions \(numerics 0 there, \d+ now\)"):
        go(workdir)
    summary = go(workdir, allow=True)
    assert summary["params_sha256"] == fresh[1]
    assert [seen["numerics"] for seen in summary["earlier_versions"]] == ["0"]
    assert summary["versions"]["allowed"]


def test_a_start_that_is_refused_leaves_a_finished_run_as_it_was(go, fresh, tmp_path, monkeypatch):
    workdir = shutil.copytree(fresh[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}

    def refuse(*_):
        raise ValueError("more than the memory of this host")

    for check in ("make_mesh", "check_sources", "check_memory", "check_positions"):
        with monkeypatch.context() as patch:
            patch.setattr(experiment, check, refuse)
            with pytest.raises(ValueError, match="more than the memory"):
                go(workdir, log__report=True)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("allow", [False, True])
def test_the_command_hands_the_permission_on(monkeypatch, tmp_path, allow):
    handed = {}
    monkeypatch.setattr(experiment, "run", lambda config, **how: handed.update(how))
    monkeypatch.setattr(methods, "parse", lambda raw: tiny_config(tmp_path))
    set_flags(monkeypatch, allow_other_versions=allow)
    main.main(["main"])
    assert handed["allow_other_versions"] is allow


def test_a_tokenizer_is_that_of_the_rows_it_was_trained_on(tmp_path, rows):
    config = tiny_config(tmp_path, world__name="", data__train=str(tmp_path / "pairs.jsonl"), model__vocab_size=300)
    write(tmp_path / "pairs.jsonl", rows["preferences"])
    opened = [open_tokenizer(config.data, config.model, Workdir(tmp_path / "run", {}), METHODS["sera"])[0]]
    opened.append(open_tokenizer(config.data, config.model, Workdir(tmp_path / "run", {}), METHODS["sera"])[0])
    assert opened[0].fingerprint() == opened[1].fingerprint()
    write(tmp_path / "pairs.jsonl", rows["preferences"][::-1])
    with pytest.raises(StaleWorkdir, match=r"tokenizer was made from other inputs \(first difference contents\.train"):
        open_tokenizer(config.data, config.model, Workdir(tmp_path / "run", {}), METHODS["sera"])
