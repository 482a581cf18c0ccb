"""The models that a run starts from: what is stored under which name, and which two cannot be base and SFT model."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax import world
from sera_jax.checkpoint import StaleWorkdir, Workdir
from sera_jax.config import Config, ModelGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.assembly import base_model, open_tokenizer
from sera_jax.experiment.corpus import Corpus
from sera_jax.experiment.methods import METHODS
from sera_jax.experiment.start import starting_policy
from sera_jax.export import main as export
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.models.huggingface import load_pretrained, save_pretrained
from sera_jax.models.lora import Lora, init_adapters, merged
from sera_jax.models.parts import merge, paths
from sera_jax.models.peft import kernels_of, load_adapter, save_adapter
from sera_jax.models.trained import Trained
from tests.loops.tiny import one_device_runtime, tiny_config, tiny_srppo

CFG = ModelConfig(
    vocab_size=len(world.VOCABULARY),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


LORA = Lora(2, 6.0, kernels_of(CFG, ("q_proj", "v_proj")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Hugging Face folders: two models of one shape, a third of another."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer = world.write_tokenizer(root / "tokenizer")
    small = dataclasses.replace(CFG, hidden_size=32)
    for seed, (name, cfg) in enumerate({"base": CFG, "sft": CFG, "wide": small}.items()):
        save_pretrained(root / name, cfg, init_params(cfg, key_for(seed, Stream.INIT)), tokenizer_dir=tokenizer)
    shutil.copytree(root / "base", root / "copy")
    fresh = init_adapters(LORA, init_params(CFG, key_for(0, Stream.INIT)), jax.random.key(1))
    save_adapter(root / "adapter", CFG, LORA, jax.tree.map(lambda x: x + 0.1, fresh), base=str(root / "base"))
    return root


def start(workdir, folders, *, base, sft, tiny=tiny_srppo, lora=None):
    """(base, SFT) as policies, what was said, and the runtime."""
    names = {"model__model_name_or_path": base, "model__sft_model_path": sft}
    paths = {field: str(folders / name) for field, name in names.items() if name}
    config: Config = tiny(workdir, data__max_prompt_length=32, **paths)
    tokenizer = Tokenizer.load(folders / "tokenizer")
    cfg, make_base = base_model(config.model, tokenizer, config.seed)
    cfg = dataclasses.replace(cfg, lora_scale=lora.scale) if lora else cfg
    words = Item("a", np.array([1, 4, 9, 5], np.int32), (np.array([10, 2], np.int32),))
    corpus = Corpus(tokenizer, "", [], [], [words] * 16, "data.demonstrations", [], [words] * 16, [], {}, [], None)
    how = {"layout": Layout(128), "chunk_tokens": 64, "stop_ids": tokenizer.stop_ids, "lora": lora}
    with one_device_runtime(workdir, cfg, **how) as run:
        return *starting_policy(config, run, corpus, make_base), run


def same(run, a, b):
    leaves = [jax.tree.leaves(run.params(policy)) for policy in (a, b)]
    return all(bool(jnp.array_equal(x, y)) for x, y in zip(*leaves, strict=True))


def test_two_folders_are_stored_as_base_and_sft(folders, tmp_path):
    base, sft, run = start(tmp_path, folders, base="base", sft="sft")
    assert base is not None
    assert (base.name, sft.name) == ("base", "sft")
    assert list(run.workdir.done) == ["base", "sft"]
    assert not same(run, base, sft)
    again, sft_again, _ = start(tmp_path / "more", folders, base="sft", sft="base")
    assert again is not None
    assert same(run, base, sft_again)
    assert same(run, sft, again)


def test_sera_from_a_named_sft_model_stores_no_base(folders, tmp_path):
    base, sft, run = start(tmp_path, folders, base="base", sft="sft", tiny=tiny_config)
    assert (base, sft.name, list(run.workdir.done)) == (None, "sft", ["sft"])


@pytest.mark.parametrize("tiny", [tiny_config, tiny_srppo])
def test_a_named_base_is_fine_tuned_and_both_are_handed_on(folders, tmp_path, tiny):
    base, sft, run = start(tmp_path, folders, base="base", sft="", tiny=tiny)
    assert base is not None
    assert (base.name, sft.name, list(run.workdir.done)) == ("base", "sft", ["base", "sft"])
    assert not same(run, base, sft)


def test_other_weights_at_the_place_of_the_old_are_refused_by_the_tensor(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "folders")
    here = tmp_path / "folders"
    start(tmp_path / "run", here, base="base", sft="sft")[2].workdir._lock.close()
    start(tmp_path / "run", here, base="base", sft="sft")[2].workdir._lock.close()
    other = init_params(CFG, key_for(7, Stream.INIT))
    save_pretrained(here / "sft", CFG, other, tokenizer_dir=here / "tokenizer", overwrite=True)
    with pytest.raises(StaleWorkdir, match=r"sft was made from other inputs \(first difference tensors\.model\."):
        start(tmp_path / "run", here, base="base", sft="sft")


def test_equal_weights_in_two_folders_are_refused_since_the_reward_would_be_nothing(folders, tmp_path):
    with pytest.raises(ValueError, match=r"equals the base: .* 0 everywhere.*copy.*holds the weights of .*base"):
        start(tmp_path, folders, base="base", sft="copy")
    start(tmp_path / "sera", folders, base="base", sft="copy", tiny=tiny_config)


@pytest.mark.parametrize("lora", [None, LORA])
def test_an_adapter_is_an_sft_model_over_the_base_or_merged_into_it(folders, tmp_path, lora):
    base, sft, run = start(tmp_path, folders, base="base", sft="adapter", lora=lora)
    assert base is not None
    assert list(run.workdir.done) == ["base", "sft"]
    kept = json.loads((sft.path / "params" / "checksums.json").read_text())
    assert len(kept) == (4 if lora else len(paths(run.params(base)))), "adapters alone, or a whole model"
    scaled = dataclasses.replace(CFG, lora_scale=LORA.scale)
    there = load_pretrained(folders / "base")[1], load_adapter(folders / "adapter", CFG)[1]
    wanted = paths(merged(scaled, merge(*there)))
    found = paths(merged(scaled, run.params(sft)))
    assert all((found[path] == leaf).all() for path, leaf in wanted.items())


def test_sera_goes_on_with_an_adapter_and_holds_no_second_base(folders, tmp_path):
    base, sft, run = start(tmp_path, folders, base="base", sft="adapter", tiny=tiny_config, lora=LORA)
    assert base is None
    assert sft.over is not None
    assert run.over(sft, Trained(lora=LORA)) == sft.over


def test_an_adapter_of_another_kind_is_refused_with_the_fields_that_would_do(folders, tmp_path):
    other = dataclasses.replace(LORA, rank=4)
    with pytest.raises(
        ValueError, match=r"--config.lora.rank=2 --config.lora.alpha=6.0 .*=q_proj,v_proj .*lora.rank=0"
    ):
        start(tmp_path, folders, base="base", sft="adapter", lora=other)


def test_an_adapter_is_a_policy_of_its_own_that_is_exported_whole(folders, tmp_path):
    assert export([f"--checkpoint={folders / 'adapter'}", f"--out={tmp_path / 'whole'}", "--merged"]) == 0
    scaled = dataclasses.replace(CFG, lora_scale=LORA.scale)
    there = load_pretrained(folders / "base")[1], load_adapter(folders / "adapter", CFG)[1]
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "whole")[1], merged(scaled, merge(*there)))


def test_an_sft_model_of_another_shape_is_refused_before_any_weights_are_stored(folders, tmp_path):
    with pytest.raises(ValueError, match=r"sft_model_path=.*wide.* is not of the base model's shape.*hidden_size"):
        start(tmp_path, folders, base="base", sft="wide")
    assert not (tmp_path / "phases").exists()


def test_the_chat_template_is_that_of_the_sft_model_unless_a_tokenizer_is_named(folders, tmp_path):
    data = tiny_srppo(tmp_path).data
    model = ModelGroup(model_name_or_path=str(folders / "base"), sft_model_path=str(folders / "sft"))
    workdir = Workdir(tmp_path, {})
    assert open_tokenizer(data, model, workdir, METHODS["srppo"])[1] == model.sft_model_path
    assert open_tokenizer(data, model, workdir, METHODS["sera"])[1] == model.model_name_or_path
    named = dataclasses.replace(model, tokenizer_name_or_path=str(folders / "tokenizer"))
    assert open_tokenizer(data, named, workdir, METHODS["srppo"])[1] == named.tokenizer_name_or_path
