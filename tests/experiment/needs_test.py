"""Sizes that no machine holds are refused from the config alone; what could run is not."""

import dataclasses
import importlib
import types

import jax
import numpy as np
import pytest

from sera_jax import memory
from sera_jax.config import TrainGroup, parse_fields
from sera_jax.data.planning import choose_sizes
from sera_jax.experiment.needs import batches_in_words, check_memory, parameter_count
from sera_jax.mesh import make_mesh
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params
from sera_jax.sampling import Draws, SamplingParams, generate
from sera_jax.training.optimizer import make_optimizer
from tests.config_test import SRPPO, refused
from tests.loops.tiny import tiny_config, tiny_srppo

GIB = 2**30
ABSURD = {
    "sampling.slots": "a decode cache of",
    "data.row_tokens": "activations of a single row of",
    "data.row_multiple": "1000000000 rows",
    "train.gradient_accumulation_steps": "1000000000 rows",
    "model.vocab_size": "a table of pieces of",
    **dict.fromkeys(
        ["model.hidden_size", "model.intermediate_size", "model.num_hidden_layers", "model.head_dim"],
        " parameters with gradients",
    ),
}


@pytest.fixture
def have(monkeypatch):
    """Sets what the host, and so its CPU devices, may hold."""
    return lambda size: monkeypatch.setattr(memory, "host_bytes", lambda: size)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def corpus_of(pairs, reward_pairs=()):
    """50 texts, 16 demonstrations, and entries of so many pairs each, for training and for a reward model."""
    train, reward = ([types.SimpleNamespace(pairs=[(0, 1)] * n) for n in counts] for counts in (pairs, reward_pairs))
    return types.SimpleNamespace(pretrain=[0] * 50, demonstrations=[0] * 16, train=train, reward_pairs=reward)


def absurd(tmp_path, path):
    return tiny_config(tmp_path, **{path.replace(".", "__"): 10**9})


@pytest.mark.parametrize("path", ABSURD)
def test_an_absurd_size_is_refused_with_its_need_the_limit_and_the_way_out(path, tmp_path, mesh, have):
    have(24 * GIB)
    with pytest.raises(memory.OutOfMemory) as error:
        check_memory(absurd(tmp_path, path), mesh)
    words = str(error.value)
    assert f"{path.split('.')[1]}=1000000000" in words and ABSURD[path] in words
    assert "more than the 24.0 GiB of the " in words


@pytest.mark.parametrize("path", ABSURD)
def test_nothing_is_refused_where_the_memory_is_unknown_or_enough(path, tmp_path, mesh, have):
    config = absurd(tmp_path, path)
    for size in (None, 2**70):
        have(size)
        check_memory(config, mesh)


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("sera.num_samples", {}),
        ("train.batch_size", {"method": "srppo"}),
        ("ppo.best_of", {"method": "srppo", "ppo__arms": ("srppo", "best_of_n")}),
    ],
)
def test_more_answers_than_the_host_can_hold_are_refused_when_the_config_is_read(path, changes, have):
    have(24 * GIB)
    base = SRPPO if changes else {}
    assert f"config.{path}=1000000000: 1000000000 answers at a time, at least 372.5 GiB, more than" in refused(
        **{**base, **changes, path.replace(".", "__"): 10**9}
    )


def test_a_sampler_refuses_a_cache_and_answers_that_cannot_fit_before_it_compiles(have):
    cfg = ModelConfig()
    draws = Draws([np.array([1, 2])], [0])
    have(GIB)
    for changes, slots, words in (
        ({}, 10**9, "slots=1000000000 and max_new_tokens=128: a decode cache of"),
        ({"num_samples": 10**9}, 1, "num_samples=1000000000 to each of 1 prompts: 1000000000 answers at a time"),
    ):
        with pytest.raises(memory.OutOfMemory, match=words):
            generate(cfg, None, dataclasses.replace(draws, **changes), SamplingParams(stop_ids=(2,)), slots=slots)


def test_a_batch_larger_than_its_data_is_said(tmp_path):
    corpus = corpus_of(pairs=[1] * 15)
    (line,) = batches_in_words(tiny_config(tmp_path), corpus)
    assert line == "config.train.batch_size=16 is more than the 15 pairs there are: every update takes all of them"
    said = batches_in_words(tiny_config(tmp_path, pretrain__batch_size=99, sft__batch_size=99), corpus)
    assert [text.split(" there")[0].split(" the ")[1] for text in said] == ["15 pairs", "16 demonstrations", "50 texts"]
    (line,) = batches_in_words(tiny_srppo(tmp_path), corpus_of(pairs=[], reward_pairs=[1] * 9))
    assert line.startswith("config.reward_model.batch_size=64 is more than the 9 pairs there are")


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (tiny_config, {"model__model_name_or_path": "x"}, ["config.sft"]),
        (tiny_config, {"model__sft_model_path": "x"}, []),
        (tiny_srppo, {"model__sft_model_path": "x", "model__model_name_or_path": "y"}, []),
    ],
)
def test_a_batch_of_a_training_that_is_not_run_is_not_said(make, changes, said, tmp_path):
    config = make(tmp_path, pretrain__batch_size=99, sft__batch_size=99, **changes)
    lines = batches_in_words(config, corpus_of(pairs=[2] * 8))  # 16 pairs of 8 prompts fill a batch
    assert [line.split(".batch_size")[0] for line in lines] == said


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, True),
        ({"eval__num_prompts": -1}, False),
        ({"world__heldout_prompts": 0}, False),
        ({"eval__max_new_tokens": 64}, False),
        ({"sampling__max_new_tokens": 1, "eval__max_new_tokens": 65}, True),
    ],
)
def test_only_a_cache_that_is_made_is_refused(changes, refused, tmp_path, mesh, have):
    """Of 65 tokens to an answer, which take 128 columns of the cache; there is room for 64."""
    changes = {"sampling__max_new_tokens": 65, **changes}
    config = tiny_config(tmp_path, sampling__slots=10**5, data__row_tokens=512, **changes)
    have(1_200_000_000)
    if refused:
        group = "eval" if "eval__max_new_tokens" in changes else "sampling"
        words = rf"config.sampling.slots=100000 and config.{group}.max_new_tokens=65: a decode cache of .*; lower them"
        with pytest.raises(memory.OutOfMemory, match=words):
            check_memory(config, mesh)
    else:
        check_memory(config, mesh)


def test_more_updates_than_are_counted_are_refused_and_more_shapes_than_there_are_cost_nothing():
    with pytest.raises(ValueError, match=r"2147483648 updates .* num_train_epochs=7"):
        make_optimizer(TrainGroup(num_train_epochs=7), 2**31)
    assert choose_sizes([3, 5, 5], multiple=1, most=10**9) == (3, 5)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_the_decoder_makes_them(tied):
    cfg = ModelConfig(num_hidden_layers=3, tie_word_embeddings=tied, head_dim=6, vocab_size=77)
    assert parameter_count(cfg) == sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)))


@pytest.mark.parametrize("name", ["llama_dpo", "llama_srppo"])
def test_the_shipped_pod_configs_are_not_refused_by_a_pod(name, monkeypatch):
    raw = importlib.import_module(f"configs.{name}").get_config()
    raw.workdir, raw.model.model_name_or_path = "runs/x", ""
    raw.model.update(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128
    )
    monkeypatch.setattr(memory, "device_bytes", lambda devices: 8 * 70 * GIB)
    check_memory(parse_fields(raw), make_mesh(1, 8, 1))
