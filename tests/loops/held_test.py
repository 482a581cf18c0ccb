"""What a run holds in its phases: one policy to score or sample with, one state to train, and nothing afterwards."""

import gc
import math

import jax
import numpy as np
import pytest

from sera_jax import memory
from sera_jax.config import SamplingGroup, TrainGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.items import Item
from sera_jax.loops.restartable import LOWER
from sera_jax.loops.runtime import LOWER_ROWS, LOWER_SLOTS
from sera_jax.loops.sft import sft
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params, init_params
from sera_jax.sampling import engine
from tests.loops.tiny import one_device_runtime

CFG = ModelConfig(vocab_size=4096, hidden_size=64, num_hidden_layers=1)
PARAMETERS = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(CFG)))
ITEMS = [Item("a", np.array([1, 4, 9], np.int32), (np.array([10, 2], np.int32),))] * 2


def base_policy():
    """Drawn under jit: Flax's own bookkeeping would hold two copies of what it draws until they are collected."""
    return jax.device_get(jax.jit(init_params, static_argnums=0)(CFG, key_for(0, Stream.INIT)))


def live_bytes():
    """Of buffers: those of a saved array's shards, which orbax asks for, are its own. What tests before left in cycles
    is no longer there; what they left on several devices counts by its parts."""
    gc.collect()
    shards = (shard.data for array in jax.live_arrays() for shard in array.addressable_shards)
    return sum({data.unsafe_buffer_pointer(): data.nbytes for data in shards}.values())


@pytest.fixture
def run(tmp_path):
    with one_device_runtime(tmp_path, CFG) as run:
        yield run


def test_training_holds_one_state_and_every_phase_lets_go_of_what_the_next_does_not_need(run):
    before, while_training = live_bytes(), []

    def look():
        while_training.append((live_bytes() - before) / PARAMETERS)
        return False

    base = run.store("base", {}, base_policy)
    run.score("base/items", base, ITEMS)
    assert (live_bytes() - before) / PARAMETERS == pytest.approx(1, rel=0.02), "the policy that is scored"

    run.stop_requested = look
    group = TrainGroup(batch_size=2, max_steps=2)
    trained = sft(run, "sft", base, ITEMS, group)
    assert while_training == pytest.approx([3, 3], rel=0.02), "parameters and two moments"
    assert (live_bytes() - before) / PARAMETERS == pytest.approx(1, rel=0.02), "the policy that was trained"

    run.stop_requested = lambda: False
    run.sample("sft/items", trained, ITEMS[:1], 1, SamplingGroup(max_new_tokens=2, slots=1), round_=0)
    assert (live_bytes() - before) / PARAMETERS == pytest.approx(1, rel=0.02), "the sampler's own copy is let go"
    run.release()
    assert live_bytes() - before < 0.02 * PARAMETERS


def test_a_phase_of_sampling_that_does_not_fit_is_named_with_what_to_lower(run, monkeypatch):
    """Before it begins, and where memory runs out within."""
    policy = run.store("base", {}, base_policy)
    how = SamplingGroup(max_new_tokens=2, slots=1)
    lower = "config.sampling.slots or the answers' max_new_tokens under a new --config.workdir"
    monkeypatch.setattr(engine, "programs", lambda *_: bytearray(2**52))
    with pytest.raises(memory.OutOfMemory, match=rf"^phase base/answers ran out of memory \(MemoryError\); .*{lower}"):
        run.sample("base/answers", policy, ITEMS[:1], 1, how, round_=0)
    monkeypatch.setattr(memory, "host_bytes", lambda: 2**10)
    with pytest.raises(memory.OutOfMemory, match=rf"^slots=1 and max_new_tokens=2: a decode cache of .*{lower}"):
        run.sample("base/answers", policy, ITEMS[:1], 1, how, round_=0)


@pytest.mark.parametrize("way_out", [memory.WAY_OUT, LOWER, LOWER_ROWS, LOWER_SLOTS])
def test_a_way_out_of_memory_that_makes_another_run_says_that_it_needs_another_folder(way_out):
    words = way_out.partition("under a new --config.workdir")
    assert words[1] and words[0].startswith("take more devices"), "which the same folder may go on with"
