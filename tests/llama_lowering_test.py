"""configs/llama_dpo.py at its full size: every compiled program is traced and lowered for a mesh of 8; nothing is
allocated and nothing is compiled.

What is lowered is what a run would compile: the config as parsed, row shapes as the loaders make them of 64 pairs of
full length, shardings from sera_jax/mesh.py.
"""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.llama_dpo import get_config
from sera_jax.data.batches import ItemLoader, PairLoader, score_batches
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import Layout
from sera_jax.experiment.assembly import model_config
from sera_jax.experiment.methods import parse
from sera_jax.losses.preference import resolve
from sera_jax.mesh import ROW_AXES, make_mesh, row_shards, rows_sharding
from sera_jax.models.decoder import abstract_params
from sera_jax.sampling import SamplingParams
from sera_jax.sampling.cache import Stacked
from sera_jax.sampling.decode import programs
from sera_jax.sampling.engine import mesh_for
from sera_jax.training.objectives import align_objective, sft_objective
from sera_jax.training.optimizer import make_optimizer
from sera_jax.training.score import make_score
from sera_jax.training.step import abstract_state, make_step
from tests.lowering import (
    assert_arguments_lie_as_asked,
    assert_state_returns_in_place,
    bytes_on_a_device,
    largest_logits,
    params_on,
    result_of,
    shapes,
    tokenizer_without_gaps,
)

CONFIG = parse(get_config())
CFG = model_config(CONFIG.model, tokenizer_without_gaps(CONFIG.model.vocab_size))
PARAMETERS = 6_738_415_616  # Llama 2 7B
DEVICES = 8
T = CONFIG.data.row_tokens


@pytest.fixture(scope="module")
def mesh():
    mesh = make_mesh(CONFIG.mesh.data, CONFIG.mesh.fsdp, CONFIG.mesh.tensor)
    assert dict(mesh.shape) == {"data": 1, "fsdp": DEVICES, "tensor": 1}
    return mesh


def pairs(count):
    """Pairs of the longest prompts and responses that the config admits: 2 x 2048 tokens, the prompt counted twice."""
    prompt = np.ones(CONFIG.data.max_prompt_length, np.int32)
    response = np.ones(CONFIG.data.max_completion_length, np.int32)
    return [
        PairItem(Item(str(i), prompt, (response, response)), ref_logp=np.zeros(2, np.float32)) for i in range(count)
    ]


def training_batch(group, mesh, loader):
    return shapes(loader.batch(0).arrays, NamedSharding(mesh, P(None, ROW_AXES)), group.gradient_accumulation_steps)


def loader_options(group, mesh):
    microbatches = group.gradient_accumulation_steps
    layout = Layout(
        T, multiple=CONFIG.data.row_multiple, shards=row_shards(mesh), max_shapes=CONFIG.data.max_row_shapes
    )
    return dict(layout=layout.accumulated(microbatches), batch_size=group.batch_size, seed=0)


@pytest.fixture(scope="module")
def align(mesh):
    """(step, abstract state, abstract batch) of one DPO update."""
    group = CONFIG.train
    batch = training_batch(group, mesh, PairLoader(pairs(group.batch_size), **loader_options(group, mesh)))
    loss = resolve(**dataclasses.asdict(CONFIG.loss))
    objective = align_objective(CFG, loss, window=T, chunk_tokens=group.logits_chunk_tokens, shards=row_shards(mesh))
    optimizer = make_optimizer(group, 1000)
    state = abstract_state(CFG, optimizer, mesh)
    return make_step(objective, optimizer, state, mesh), state, batch


@pytest.fixture(scope="module")
def sampler(mesh):
    sampling = SamplingParams(
        temperature=CONFIG.sampling.temperature,
        top_p=CONFIG.sampling.top_p,
        top_k=CONFIG.sampling.top_k,
        max_new_tokens=CONFIG.sampling.max_new_tokens,
        min_new_tokens=CONFIG.sampling.min_new_tokens,
        stop_ids=(2,),
    )
    return programs(CFG, sampling, mesh_for(CFG, mesh), CONFIG.sampling.slots, Stacked)


def test_the_config_has_the_size_it_is_named_after(mesh):
    tree = abstract_params(CFG)
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == PARAMETERS
    assert CONFIG.data.max_prompt_length + CONFIG.data.max_completion_length == 2048
    assert (CONFIG.train.batch_size, T) == (64, 4096)


def test_parameters_and_moments_are_split_over_all_devices(mesh, align):
    _, state, _ = align
    held = sum(map(bytes_on_a_device, jax.tree.leaves(state)))
    # float32 parameters and two moments; only norm scales and counters are whole on every device
    assert held == pytest.approx(3 * 4 * PARAMETERS / DEVICES, rel=1e-3)
    for path, leaf in jax.tree.leaves_with_path(state):
        if len(leaf.shape) > 2 or max(leaf.shape, default=0) >= CFG.vocab_size:
            assert "fsdp" in leaf.sharding.spec, jax.tree_util.keystr(path)


def test_an_update_holds_the_64_pairs_in_rows_spread_over_all_devices(align):
    _, _, batch = align
    accumulation = CONFIG.train.gradient_accumulation_steps
    assert batch.rows.tokens.shape == (accumulation, 64 // accumulation, T), "a pair of full length fills a row"
    assert batch.rows.tokens.sharding.shard_shape(batch.rows.tokens.shape) == (accumulation, 64 // accumulation // 8, T)
    assert batch.rows.source.shape[-1] == 2 * CONFIG.data.max_completion_length, "scored positions only"


def test_the_alignment_update_lowers_and_gives_its_state_back_in_place(mesh, align):
    step, state, batch = align
    with jax.set_mesh(mesh):
        lowered = step.lower(state, batch)
    assert_arguments_lie_as_asked(lowered, state, batch)
    after, metrics = lowered.out_info
    assert_state_returns_in_place(lowered, state, after)
    assert metrics["loss"].total.sharding.is_fully_replicated
    held = largest_logits(lowered, CFG.vocab_size)
    assert 0 < held <= CONFIG.train.logits_chunk_tokens * DEVICES, "logits of one chunk of positions at a time"


def test_the_sft_update_lowers(mesh):
    group = CONFIG.sft
    items = [Item(pair.item.id, pair.item.prompt, pair.item.responses[:1]) for pair in pairs(group.batch_size)]
    batch = training_batch(group, mesh, ItemLoader(items, **loader_options(group, mesh)))
    objective = sft_objective(CFG, window=T, chunk_tokens=group.logits_chunk_tokens, shards=row_shards(mesh))
    optimizer = make_optimizer(group, 1000)
    state = abstract_state(CFG, optimizer, mesh)
    with jax.set_mesh(mesh):
        lowered = make_step(objective, optimizer, state, mesh).lower(state, batch)
    assert_arguments_lie_as_asked(lowered, state, batch)


def score_program(mesh):
    packed = score_batches([pair.item for pair in pairs(16)], Layout(T), 4 * row_shards(mesh))[0]
    score = make_score(CFG, mesh, window=T, chunk_tokens=CONFIG.train.logits_chunk_tokens)
    return score, (params_on(CFG, mesh), shapes(packed.rows, rows_sharding(mesh)))


def test_the_scorer_lowers_and_returns_a_number_per_response(mesh):
    score, arguments = score_program(mesh)
    with jax.set_mesh(mesh):
        lowered = score.lower(*arguments)
    assert_arguments_lie_as_asked(lowered, *arguments)
    assert lowered.out_info.shape == (arguments[1].tokens.shape[0], arguments[1].num_slots)
    assert lowered.out_info.dtype == np.float32


def test_prefill_and_decode_lower_with_weights_and_cache_split_over_the_heads(mesh, sampler):
    columns = CONFIG.data.max_prompt_length + CONFIG.sampling.max_new_tokens
    prompts = jax.ShapeDtypeStruct((16, CONFIG.data.max_prompt_length), np.int32)
    with jax.set_mesh(mesh_for(CFG, mesh)):
        prepared = result_of(sampler.prepare.lower(params_on(CFG, mesh)))
        slots = sampler.empty.lower(CONFIG.sampling.slots, columns).out_info
        prefill = sampler.prefill.lower(prepared, prompts)
        decode = sampler.lower_decode(columns)
    assert sum(map(bytes_on_a_device, jax.tree.leaves(prepared))) == pytest.approx(2 * PARAMETERS / DEVICES, rel=1e-3)
    block = (CFG.num_hidden_layers, 16, prompts.shape[1], CFG.num_key_value_heads, CFG.head_dim)
    assert prefill.out_info.keys.shape == block
    after, report = decode.out_info
    for old, new in zip(jax.tree.leaves(slots), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype, new.sharding) == (old.shape, old.dtype, old.sharding)
    cache = after.cache.keys
    assert cache.sharding.shard_shape(cache.shape)[3] == CFG.num_key_value_heads // DEVICES
    assert report.tokens.sharding.is_fully_replicated


def test_update_and_scorer_export_for_a_tpu(mesh, align):
    step, state, batch = align
    score, arguments = score_program(mesh)
    with jax.set_mesh(mesh):
        for program, given in ((step, (state, batch)), (score, arguments)):
            exported = jax.export.export(program, platforms=["tpu"])(*given)
            assert exported.platforms == ("tpu",)
            assert exported.nr_devices == DEVICES
