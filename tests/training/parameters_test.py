"""Parameters from every source: the same values, each on its shards, and never more than a shard too many."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from sera_jax.checkpoint import Workdir, arrays
from sera_jax.core import Stream, key_for
from sera_jax.data.packing import Layout
from sera_jax.loops.runtime import Runtime
from sera_jax.mesh import make_mesh, param_shardings, placed_shapes
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params, init_params
from sera_jax.models.huggingface import save_pretrained
from sera_jax.training.parameters import load_params
from sera_jax.writer import MetricWriter

# As in a real model the layers outweigh the vocabulary, and no parameter is most of it.
CFG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
)
KEY = key_for(0, Stream.INIT)
MESH = (1, 4, 2)


@pytest.fixture(scope="module")
def host():
    """Parameters as numpy arrays."""
    return jax.device_get(load_params(CFG, make_mesh(devices=jax.devices()[:1]), KEY))


@pytest.fixture(scope="module")
def folder(host, tmp_path_factory):
    """The same in a Hugging Face folder of several files."""
    return save_pretrained(tmp_path_factory.mktemp("hf") / "model", CFG, host, max_shard_bytes=100_000)


def runtime(folder, mesh):
    return Runtime(
        cfg=CFG,
        mesh=mesh,
        workdir=Workdir(folder, {}),
        writer=MetricWriter(folder, tensorboard=False),
        seed=0,
        layout=Layout(64),
        chunk_tokens=64,
        stop_ids=(2,),
    )


@pytest.fixture
def peaks(monkeypatch):
    """Bytes on the fullest device, noted whenever a parameter was made or a program runs: the arrays that live there,
    and what the program was compiled to need besides. Arrays of other tests do not count."""
    noted, known = [], {id(array): array for array in jax.live_arrays()}

    def note(more=0):
        held = dict.fromkeys(jax.devices(), 0)
        for array in jax.live_arrays():
            for device in array.sharding.device_set if id(array) not in known else ():
                held[device] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        noted.append(max(held.values()) + more)

    def watched(jitted):
        def call(*args):
            compiled = jitted.lower(*args).compile()
            memory = compiled.memory_analysis()
            lives = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(args))
            moved = 0 if lives else memory.argument_size_in_bytes
            note(moved + memory.output_size_in_bytes + memory.temp_size_in_bytes)
            return compiled(*args)

        return call

    jit, make_array = jax.jit, jax.make_array_from_callback
    monkeypatch.setattr(jax, "jit", lambda function, **options: watched(jit(function, **options)))
    monkeypatch.setattr(arrays, "_sums", watched(arrays._sums))
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *args: (make_array(*args), note())[0])
    return noted


def allowed(mesh):
    """Bytes of one device's part of all parameters and of the largest one."""
    shapes = jax.tree.leaves(placed_shapes(mesh, abstract_params(CFG)))
    sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in shapes]
    return sum(sizes) + max(sizes)


@pytest.mark.parametrize("source", ["fresh", "folder"])
def test_a_device_holds_its_part_of_the_parameters_and_at_most_one_part_more(peaks, folder, tmp_path, source):
    mesh = make_mesh(*MESH)
    with jax.set_mesh(mesh):
        run = runtime(tmp_path, mesh)
        run.store("base", {}, lambda: load_params(CFG, mesh, KEY if source == "fresh" else folder))
    assert len(peaks) == 1 + len(jax.tree.leaves(abstract_params(CFG))), "one for each parameter, one for the checksums"
    assert max(peaks) <= allowed(mesh)


@pytest.mark.parametrize("leaves", ["of the host", "of one device"])
def test_parameters_that_a_program_meets_before_they_are_placed_do_not_pass_for_placed_ones(
    peaks, host, tmp_path, leaves
):
    mesh = make_mesh(*MESH)
    with jax.set_mesh(mesh):
        run = runtime(tmp_path, mesh)
        run.store("base", {}, lambda: host if leaves == "of the host" else jax.tree.map(jax.numpy.asarray, host))
    assert max(peaks) > 2 * allowed(mesh)


@pytest.mark.parametrize("shape", [MESH, (2, 2, 2)])
def test_a_folder_gives_every_device_its_own_part_of_the_same_values(host, folder, shape):
    mesh = make_mesh(*shape)
    found = load_params(CFG, mesh, folder)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), host)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == param_shardings(mesh, abstract_params(CFG))
    half = load_params(dataclasses.replace(CFG, param_dtype="bfloat16"), mesh, folder)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), jax.device_get(half), host)


def test_of_a_file_each_device_reads_its_own_part(folder, monkeypatch):
    read = []

    def spy(shape, sharding, part):
        indices = set(map(str, sharding.devices_indices_map(shape).values()))
        values = [part(index) for index in sharding.devices_indices_map(shape).values()]
        read.append(sum(value.size for value in values) / len(values) * len(indices) / math.prod(shape))
        return real(shape, sharding, part)

    real = jax.make_array_from_callback
    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    load_params(CFG, make_mesh(*MESH), folder)
    assert read == [1.0] * len(jax.tree.leaves(abstract_params(CFG)))


def test_what_a_run_saved_comes_back_on_any_mesh(host, folder, tmp_path):
    one, all_ = make_mesh(devices=jax.devices()[:1]), make_mesh(*MESH)
    policy = runtime(tmp_path, one).store("base", {}, lambda: load_params(CFG, one, folder))
    found = runtime(tmp_path, all_).load(policy)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), host)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == param_shardings(all_, abstract_params(CFG))


def test_fresh_parameters_are_those_of_one_program_on_one_device(host):
    alone = jax.jit(lambda key: init_params(CFG, key))(KEY)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(alone), host)
