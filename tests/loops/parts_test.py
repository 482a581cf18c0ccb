"""Runs that train a part: policies hold that part alone, the base stays, and a stop changes nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sera_jax.aot import topology
from sera_jax.config import SamplingGroup, TrainGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.items import Item
from sera_jax.experiment import run
from sera_jax.experiment.ahead import programs_of
from sera_jax.experiment.saved import find_policy
from sera_jax.export import main as export
from sera_jax.loops import ppo
from sera_jax.loops.runtime import Preempted
from sera_jax.loops.sft import sft
from sera_jax.mesh import make_mesh
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.models.huggingface import load_pretrained
from sera_jax.models.lora import Lora, merged
from sera_jax.models.parts import joined, paths
from sera_jax.models.peft import kernels_of
from sera_jax.training.ppo_steps import make_programs
from tests.loops.tiny import one_device_runtime, tiny_config, tiny_srppo

SHORT = dict(lora__rank=4, sera__rounds=2, world__pretrain=60)


def mesh():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def stored(folder):
    return json.loads((folder / "params" / "checksums.json").read_text())


@pytest.fixture(scope="session")
def adapted(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapted")
    return root, run(tiny_config(root, **SHORT))


def test_policies_hold_adapters_alone_and_have_moved(adapted):
    root, _ = adapted
    for name in ("sft", "round1", "sera/round2"):
        assert all("lora_" in path for path in stored(root / "phases" / name)), name
    base = find_policy(root / "phases" / "pretrain").params(mesh())
    policy = find_policy(root / "phases" / "sera" / "round2").params(mesh())
    assert all((paths(policy)[path] == leaf).all() for path, leaf in paths(base).items()), "the base is as it was"
    assert all(np.abs(leaf).max() > 0 for path, leaf in paths(policy).items() if path.endswith("lora_b"))


DEEP = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.3,
)
ITEMS = [Item(str(i), np.array([1, 4, 9 + i], np.int32), (np.array([10 + i, 2], np.int32),)) for i in range(8)]


def trained_part(folder, cfg=DEEP, lora=None, stop=lambda: False, **group):
    """(base, trained policy, all its parameters) of six updates of SFT."""
    with one_device_runtime(folder, cfg, lora=lora, stop_requested=stop) as run:
        base = run.store("base", {}, lambda: jax.jit(init_params, static_argnums=0)(DEEP, key_for(0, Stream.INIT)))
        policy = sft(run, "sft", base, ITEMS, TrainGroup(batch_size=4, max_steps=6, learning_rate=1e-2, **group))
        return paths(run.load(base)), policy, run.load(policy)


def test_dropout_trains_other_adapters_and_a_stop_changes_nothing(tmp_path):
    def train(name, dropout, **how):
        lora = Lora(2, 4.0, kernels_of(DEEP, ("all-linear",)), dropout=dropout)
        cfg = dataclasses.replace(DEEP, lora_scale=lora.scale, lora_dropout=dropout)
        return trained_part(tmp_path / name, cfg, lora, save_steps=1, **how)[1].digest

    def stopped(dropout):
        asked = iter(range(10**6))
        with pytest.raises(Preempted):
            train(f"cut {dropout}", dropout, stop=lambda: next(asked) > 2)
        return train(f"cut {dropout}", dropout)

    whole = [train(f"whole {dropout}", dropout) for dropout in (0.0, 0.3)]
    assert [stopped(dropout) for dropout in (0.0, 0.3)] == whole
    assert whole[0] != whole[1]


def test_the_last_layer_moves_alone_and_is_scored_and_sampled_as_the_whole_model_would_be(tmp_path):
    before, policy, params = trained_part(tmp_path, trainable=("layers/1/.*",))
    assert all("last" in path for path in stored(policy.path))
    whole = joined(params)
    for path, leaf in paths(whole).items():
        assert (leaf[0] == before[path][0]).all(), path
        assert path.startswith("layers/") == bool((leaf != before[path]).any()), path
    with one_device_runtime(tmp_path / "other", DEEP) as run:
        alike = run.store("whole", {}, lambda: whole)
        np.testing.assert_allclose(
            *(np.stack(run.score(f"{p.name}/items", p, ITEMS)) for p in (policy, alike)), atol=1e-5
        )
        how = SamplingGroup(max_new_tokens=4, slots=4)
        drawn = [[s.tokens.tolist() for s in run.generate(p, ITEMS, 1, how, round_=0)] for p in (params, whole)]
        assert drawn[0] == drawn[1]


def test_a_merged_export_is_the_policy_and_an_adapter_wants_its_base(adapted, tmp_path, capsys):
    root, _ = adapted
    policy = f"--checkpoint={root / 'phases' / 'sera' / 'round2'}"
    assert export([policy, f"--out={tmp_path / 'adapter'}"]) == 2
    assert "--merged" in capsys.readouterr().err
    assert export([policy, f"--out={tmp_path / 'adapter'}", "--base=base"]) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert export([policy, f"--out={tmp_path / 'whole'}", "--merged"]) == 0
    saved = find_policy(root / "phases" / "sera" / "round2")
    jax.tree.map(
        np.testing.assert_array_equal,
        load_pretrained(tmp_path / "whole")[1],
        merged(saved.cfg, saved.params(mesh())),
    )


def test_patterns_move_what_they_name_and_nothing_else(tmp_path):
    before, policy, after = trained_part(tmp_path, trainable=(".*norm/scale",))
    moved = {path for path, leaf in paths(after).items() if (leaf != before[path]).any()}
    assert moved == {path for path in before if path.endswith("norm/scale")}
    assert len(stored(policy.path)) == len(moved)


class Recorded:
    """A jitted function, and the kinds of models and states that it is called with."""

    def __init__(self, jitted):
        self.jitted, self.seen = jitted, set()

    def __call__(self, first, batch, *frozen):
        self.seen.add(kinds(first, *frozen))
        return self.jitted(first, batch, *frozen)

    def __getattr__(self, name):
        return getattr(self.jitted, name)


def kinds(*trees):
    return str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), trees))


def test_ppo_trains_adapters_of_policy_and_critic_over_one_base_as_planned(tmp_path, monkeypatch):
    recorded = {}

    def make_recorded(*given, **how):
        made = make_programs(*given, **how)
        recorded.update(
            {name: Recorded(getattr(made, name)) for name in ("score", "values", "policy_step", "critic_step")}
        )
        return dataclasses.replace(made, **recorded)

    monkeypatch.setattr(ppo, "make_programs", make_recorded)
    config = tiny_srppo(tmp_path, lora__rank=2, ppo__iterations=2, ppo__eval_iterations=2, world__pretrain=60)
    run(config)
    monkeypatch.undo()
    planned = {program.name: program for program in programs_of(config, topology.find("cpu:1"))[0]}
    made = {"srppo: rewards and advantages": [[None]], "srppo: score": None, "srppo: values": None}

    def asked(*names):
        arguments = [planned[f"srppo: {name}"].arguments(made) for name in names]
        return {kinds(first, *frozen) for first, _, *frozen in arguments}

    assert {name: jitted.seen for name, jitted in recorded.items()} == {
        "score": asked("score", "score by the base"),
        "values": asked("values"),
        "policy_step": asked("policy update"),
        "critic_step": asked("critic update"),
    }
    last = tmp_path / "phases" / "srppo" / "iteration2"
    assert all("lora_" in path for path in stored(last))
    kept = json.loads((last / "state" / "checksums.json").read_text())
    assert any("value_head" in path for path in kept)
    assert not any("kernel" in path for path in kept), "no copy of the base in the state"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora__rank": 4, "train__trainable": (".*",)}, "adapters are trained in place"),
        ({"train__trainable": ("(",)}, "no regular expression"),
        ({"lora__rank": 4, "lora__target_modules": ()}, "target_modules is empty"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        tiny_config(tmp_path, **changes)


def test_a_pattern_without_a_parameter_lists_them(tmp_path):
    with pytest.raises(ValueError, match=r"'layers/7' matches no parameter; the parameters are embed, .*layers/block"):
        run(tiny_config(tmp_path, train__trainable=("layers/7",)))
