"""Runs that share a start: the one that takes it ends as if it had made it."""

import json

import jax
import pytest

from sera_jax import experiment, processor
from sera_jax.experiment import verifying
from sera_jax.loops.runtime import Preempted
from sera_jax.mesh import make_mesh
from sera_jax.writer import read_records, without_clock
from tests.loops.tiny import tiny_config

LITTLE = {
    "pretrain__max_steps": 2,
    "sft__max_steps": 1,
    "train__max_steps": 1,
    "sera__rounds": 1,
    "eval__num_prompts": -1,
}
LITTLE |= {"sera__arms": ("daa",), "mesh__data": 1, "mesh__fsdp": 1}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Not all eight: a tiny model spread over them only takes longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_mesh", lambda *sizes: make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        yield


def manifests(root, names):
    return {name: json.loads((root / "phases" / name / "manifest.json").read_text())["files"] for name in names}


def lines(root):
    """Of metrics.jsonl, without the clock."""
    return [without_clock(record) for record in read_records(root / "metrics.jsonl")[0]]


def test_a_run_that_takes_its_start_from_another_ends_with_the_same_bytes(tmp_path, capsys):
    shared, start = str(tmp_path / "shared"), ["world", "init", "pretrain", "sft"]
    experiment.run(tiny_config(tmp_path / "first", **LITTLE), shared_phases=shared)
    assert "taken from" not in capsys.readouterr().err
    taking = experiment.run(tiny_config(tmp_path / "taking", **LITTLE, data__label_noise=0.0), shared_phases=shared)
    assert f"taken from {shared}: world, init, pretrain, sft" in capsys.readouterr().err
    alone = experiment.run(tiny_config(tmp_path / "alone", **LITTLE, data__label_noise=0.0))
    kept = [sorted((tmp_path / name / "phases" / "corpus").rglob("tokens.npy")) for name in ("first", "taking")]
    assert len(kept[0]) == len(kept[1]) > 1
    assert all(one.samefile(other) for one, other in zip(*kept, strict=True)), "the tokens are not made again"
    assert taking["params_sha256"] == alone["params_sha256"]
    assert taking["arms"] == alone["arms"]
    assert manifests(tmp_path / "taking", start) == manifests(tmp_path / "alone", start)
    assert lines(tmp_path / "taking") == lines(tmp_path / "alone")
    assert not list(verifying.damages(tiny_config(tmp_path / "taking", **LITTLE, data__label_noise=0.0)))


def test_a_run_stopped_within_sft_that_then_takes_it_has_its_lines_and_is_sound(tmp_path, capsys):
    changes = LITTLE | {"sft__max_steps": 3}
    stopped, whole = tiny_config(tmp_path / "stopped", **changes), tiny_config(tmp_path / "whole", **changes)
    shared, log = str(tmp_path / "shared"), tmp_path / "stopped" / "metrics.jsonl"
    within = lambda: log.exists() and '"phase": "sft"' in log.read_text()  # noqa: E731
    with pytest.raises(Preempted, match="stopped in sft after update 1"):
        experiment.run(stopped, stop_requested=within)
    experiment.run(whole, shared_phases=shared)
    capsys.readouterr()
    experiment.run(stopped, shared_phases=shared)
    said = capsys.readouterr().err
    assert f"taken from {shared}: sft" in said and "warning: " not in said
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    assert not list(verifying.damages(stopped))


def test_what_lays_rows_out_otherwise_takes_nothing(tmp_path, monkeypatch):
    """`data.row_multiple` is in no phase's inputs, and which rows make a step depends on it."""
    config = tiny_config(tmp_path, **LITTLE)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    besides = experiment._besides_inputs(config, mesh)
    other_sums = {"model__attn_implementation": "xla_loop"}
    for change in (
        {"data__row_multiple": 2},
        {"data__share_prompt": False},
        {"model__param_dtype": "bfloat16"},
        other_sums,
    ):
        assert experiment._besides_inputs(tiny_config(tmp_path, **LITTLE, **change), mesh) != besides
    assert (
        experiment._besides_inputs(tiny_config(tmp_path, **LITTLE, model__attn_implementation="xla"), mesh) == besides
    )
    longer = LITTLE | {"data__row_tokens": 256}
    by_name = [
        tiny_config(tmp_path, **longer, model__attn_implementation=name) for name in ("auto", "xla_tiles", "xla")
    ]
    auto, tiles, plain = (experiment._besides_inputs(changed, mesh) for changed in by_name)
    assert auto == tiles != plain == besides, "what computes counts, not how it was asked for"
    assert experiment._besides_inputs(tiny_config(tmp_path, **LITTLE, data__label_noise=0.1), mesh) == besides
    monkeypatch.setattr(processor, "model", lambda: "another model of a CPU")
    assert experiment._besides_inputs(config, mesh) != besides
