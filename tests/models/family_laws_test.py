"""Laws that every family keeps, on small shapes with all its switches: decoding is scoring, and files come back."""

import functools

import jax
import numpy as np
import pytest

from sera_jax.data.batches import score_batches
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout, gather_scores
from sera_jax.mesh import make_mesh, placed_shapes
from sera_jax.models.decoder import abstract_params, init_params
from sera_jax.models.families import config_from_hf
from sera_jax.models.huggingface import load_pretrained, save_pretrained
from sera_jax.models.parts import split
from sera_jax.sampling import Draws, SamplingParams, engine, generate
from sera_jax.sampling.cache import Split, Stacked
from sera_jax.training.score import make_score, place_rows
from tests.tolerances import TOLERANCES

SHAPE = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    initializer_range=0.3,
)
KEYS = dict(num_key_value_heads=2)
SMALL_WINDOW = dict(sliding_window=4)
# Each family by what distinguishes it; all switches stand in one of them at least.
FAMILIES = {
    "llama": KEYS | dict(attention_bias=True, mlp_bias=True),
    "mistral": KEYS | SMALL_WINDOW,
    "qwen2": KEYS | SMALL_WINDOW | dict(use_sliding_window=True, max_window_layers=1),
    "qwen3": KEYS | dict(head_dim=8),
    "smollm3": KEYS | dict(no_rope_layers=[1, 0, 1]),
    "gemma": KEYS | dict(head_dim=16),
    "gemma2": KEYS | SMALL_WINDOW | dict(head_dim=16, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": KEYS | SMALL_WINDOW | dict(head_dim=16, sliding_window_pattern=2, rope_theta=100.0),
    "phi3": KEYS | dict(partial_rotary_factor=0.5),
    "olmo2": KEYS,
    "gpt_neox": dict(rotary_pct=0.5),
}
DECODED = ("gemma3_text", "gemma2", "gpt_neox", "smollm3", "olmo2")  # compiled, so only as many as there are switches


def config_of(family):
    return config_from_hf(SHAPE | FAMILIES[family] | {"model_type": family})


@functools.cache
def params_of(family):
    """Random parameters, norms and biases too."""
    params = jax.jit(lambda key: init_params(config_of(family), key))(jax.random.key(0))
    moved = jax.tree.map(lambda x: x + 0.2 * np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype), params)
    return jax.tree.map(np.asarray, moved)


@pytest.mark.parametrize("form", [Split, Stacked])
@pytest.mark.parametrize("family", DECODED)
def test_what_is_decoded_is_what_is_scored(family, form, monkeypatch):
    monkeypatch.setattr(engine, "form_for", lambda devices: form)
    cfg, params = config_of(family), params_of(family)
    prompts = [np.arange(3, 10, dtype=np.int32), np.array([5], np.int32), np.arange(20, 32, dtype=np.int32)]
    sampling = SamplingParams(max_new_tokens=9, stop_ids=(1,))
    samples = generate(cfg, params, Draws(prompts, range(3)), sampling, slots=2)
    items = [Item(str(s.prompt), prompts[s.prompt], (s.tokens,)) for s in samples]
    batches = score_batches(items, Layout(48), 1)
    score = make_score(cfg, make_mesh(devices=jax.devices()[:1]), window=48, chunk_tokens=0)
    found = [score(params, place_rows(packed.rows, make_mesh(devices=jax.devices()[:1]))) for packed in batches]
    scored = np.concatenate(gather_scores(found, batches, items))
    bound = TOLERANCES["decoding"]
    np.testing.assert_allclose([s.logps.sum() for s in samples], scored, rtol=bound["rtol"], atol=9 * bound["atol"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_comes_back_to_the_bit_on_any_mesh(family, tmp_path):
    cfg, params = config_of(family), params_of(family)
    save_pretrained(tmp_path, cfg, params, max_shard_bytes=20000)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    found, loaded = load_pretrained(tmp_path, mesh=mesh)
    assert found == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    wanted = placed_shapes(mesh, abstract_params(cfg))
    jax.tree.map(
        lambda x, leaf: x.sharding.is_equivalent_to(leaf.sharding, x.ndim) or pytest.fail(str(x)), loaded, wanted
    )
    kernels = split(loaded, "layers/block/.*/kernel")[0]
    assert all(x.addressable_shards[0].data.size * 4 == x.size for x in jax.tree.leaves(kernels))
