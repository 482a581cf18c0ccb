"""configs/llama_dpo.py at its full size: every compiled program is traced and lowered for a mesh of 8; nothing is
allocated and nothing is compiled.

What is lowered is what a run would compile, as the preflight plans it: the config as parsed, row shapes as the loaders
make them of pairs of full length, shardings from sera_jax/mesh.py.
"""

import jax
import numpy as np
import pytest

from configs.llama_dpo import get_config
from sera_jax.experiment.methods import parse
from tests.lowering import (
    assert_arguments_lie_as_asked,
    assert_state_returns_in_place,
    bytes_on_a_device,
    largest_logits,
    lowered_by_name,
    programs_for_eight,
    result_of,
)

CONFIG = parse(get_config())
PARAMETERS = 6_738_415_616  # Llama 2 7B
DEVICES = 8
T = CONFIG.data.row_tokens
SAMPLER = [f"candidates: {part}" for part in ("prepare", "empty cache", "prefill", "insert", "decode")]


@pytest.fixture(scope="module")
def planned():
    return programs_for_eight(CONFIG)


@pytest.fixture(scope="module")
def mesh(planned):
    assert dict(planned[1].shape) == {"data": 1, "fsdp": DEVICES, "tensor": 1}
    return planned[1]


@pytest.fixture(scope="module")
def align(planned):
    """(step, abstract state, abstract batch) of one DPO update."""
    update = planned[0]["train: update"]
    return (update.jitted, *update.arguments({}))


def test_the_config_has_the_size_it_is_named_after(align):
    assert sum(leaf.size for leaf in jax.tree.leaves(align[1].params)) == PARAMETERS
    assert CONFIG.data.max_prompt_length + CONFIG.data.max_completion_length == 2048
    assert (CONFIG.train.batch_size, T) == (64, 3072), "a row holds a pair, its prompt once"


def test_parameters_and_moments_are_split_over_all_devices(mesh, align):
    _, state, _ = align
    held = sum(map(bytes_on_a_device, jax.tree.leaves(state)))
    # float32 parameters and two moments; only norm scales and counters are whole on every device
    assert held == pytest.approx(3 * 4 * PARAMETERS / DEVICES, rel=1e-3)
    for path, leaf in jax.tree.leaves_with_path(state):
        if len(leaf.shape) > 2 or max(leaf.shape, default=0) >= CONFIG.model.vocab_size:
            assert "fsdp" in leaf.sharding.spec, jax.tree_util.keystr(path)


def test_an_update_holds_the_64_pairs_in_rows_spread_over_all_devices(align):
    _, _, batch = align
    parts = 64 // DEVICES
    assert batch.rows.tokens.shape == (parts, DEVICES, T), "a pair of full length fills a row, and a row a device"
    assert batch.rows.tokens.sharding.shard_shape(batch.rows.tokens.shape) == (parts, 1, T)
    scored = 2 * CONFIG.data.max_completion_length
    assert scored <= batch.rows.source.shape[-1] <= 1.125 * scored, "little but scored positions, in one of few widths"


def test_the_alignment_update_lowers_and_gives_its_state_back_in_place(mesh, align):
    step, state, batch = align
    with jax.set_mesh(mesh):
        lowered = step.lower(state, batch)
    assert_arguments_lie_as_asked(lowered, state, batch)
    after, metrics = lowered.out_info
    assert_state_returns_in_place(lowered, state, after)
    assert metrics["loss"].total.sharding.is_fully_replicated
    held = largest_logits(lowered, CONFIG.model, DEVICES)
    assert 0 < held <= CONFIG.train.logits_chunk_tokens * DEVICES, "logits of one chunk of positions at a time"


def test_the_sft_update_lowers(planned, mesh):
    update = planned[0]["sft: update"]
    with jax.set_mesh(mesh):
        lowered = update.jitted.lower(*update.arguments({}))
    assert_arguments_lie_as_asked(lowered, *update.arguments({}))


def test_the_scorer_lowers_and_returns_a_number_per_response(planned, mesh):
    score = planned[0]["score pairs"]
    arguments = score.arguments({})
    with jax.set_mesh(mesh):
        lowered = score.jitted.lower(*arguments)
    assert_arguments_lie_as_asked(lowered, *arguments)
    assert lowered.out_info.shape == (arguments[1].tokens.shape[0], arguments[1].num_slots)
    assert lowered.out_info.dtype == np.float32


def test_prefill_and_decode_lower_with_weights_and_cache_split_over_the_heads(planned, mesh):
    lowered = lowered_by_name(planned[0], mesh, SAMPLER)
    heads, depth = CONFIG.model.num_key_value_heads, CONFIG.model.head_dim
    prepared = jax.tree.leaves(result_of(lowered["candidates: prepare"][0]))
    assert sum(map(bytes_on_a_device, prepared)) == pytest.approx(2 * PARAMETERS / DEVICES, rel=1e-3)
    prompts = lowered["candidates: prefill"][0].out_info
    assert len(prompts.keys) == len(prompts.values) == CONFIG.model.num_hidden_layers
    assert prompts.keys[0].shape == (DEVICES, heads, depth, CONFIG.data.max_prompt_length)
    decode, (_, slots, *_) = lowered["candidates: decode"]
    after, report = decode.out_info
    for old, new in zip(jax.tree.leaves(slots), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype, new.sharding) == (old.shape, old.dtype, old.sharding)
    cache = after.cache.keys[0]
    assert cache.sharding.shard_shape(cache.shape)[1] == heads // DEVICES
    assert report.tokens.sharding.is_fully_replicated


def test_update_and_scorer_export_for_a_tpu(planned, mesh):
    with jax.set_mesh(mesh):
        for name in ("train: update", "score pairs"):
            exported = jax.export.export(planned[0][name].jitted, platforms=["tpu"])(*planned[0][name].arguments({}))
            assert exported.platforms == ("tpu",)
            assert exported.nr_devices == DEVICES
