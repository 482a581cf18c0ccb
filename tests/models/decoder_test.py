"""The decoder against a float64 numpy one, and what precision, remat and packing may not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.aot.collectives import collectives
from sera_jax.core import Rows
from sera_jax.mesh import make_mesh, placed_shapes, rows_sharding
from sera_jax.models import decoder, rope
from sera_jax.models.config import ModelConfig, RopeScaling
from sera_jax.models.decoder import (
    abstract_params,
    forward,
    head_matrix,
    hidden_states,
    init_params,
    row_attention,
    unembedding,
)
from sera_jax.ops.attention import Places
from sera_jax.ops.logprob import sum_by_slot, token_logps, token_logps_and_entropies
from tests.tolerances import TOLERANCES

CFG = ModelConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    tie_word_embeddings=False,
    initializer_range=0.3,
)
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 64)


def close(left, right, kind):
    np.testing.assert_allclose(left, right, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


def numpy_logits(cfg, params, tokens):
    """Llama's forward pass of one sequence i32[T] in float64: logits [T, V]."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    block = params["layers"]["block"]
    heads, groups, depth = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    angles = np.outer(np.arange(len(tokens)), cfg.rope_theta ** (-np.arange(0, depth, 2) / depth))
    turn = np.exp(1j * angles)[:, None]

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + cfg.rms_norm_eps) * scale

    def rotated(x):
        z = (x[..., : depth // 2] + 1j * x[..., depth // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = params["embed"][tokens]
    for layer in range(cfg.num_hidden_layers):
        y = norm(x, block["attention_norm"]["scale"][layer])
        q, k, v = ((y @ block[n]["kernel"][layer]).reshape(len(tokens), -1, depth) for n in "qkv")
        q, k = rotated(q), rotated(k)
        mixed = np.zeros_like(q)
        for head in range(heads):
            group = head // (heads // groups)
            scores = np.where(np.tri(len(tokens), dtype=bool), q[:, head] @ k[:, group].T / np.sqrt(depth), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, group]
        x = x + mixed.reshape(len(tokens), -1) @ block["o"]["kernel"][layer]
        y = norm(x, block["mlp_norm"]["scale"][layer])
        gate = y @ block["gate"]["kernel"][layer]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ block["up"]["kernel"][layer])) @ block["down"]["kernel"][layer]
    head = params["embed"].T if cfg.tie_word_embeddings else params["head"]
    return norm(x, params["final_norm"]["scale"]) @ head


def one_sequence(tokens):
    """Rows that hold one unbranched sequence, every token but the first a target."""
    tokens = np.asarray(tokens, np.int32)[None]
    length = tokens.shape[1]
    steps = np.arange(length, dtype=np.int32)[None]
    ones = np.ones_like(tokens)
    return Rows(
        tokens=tokens,
        positions=steps,
        segment=ones,
        branch=ones * 0,
        source=steps[:, :-1],
        target=tokens[:, 1:],
        slot=steps[:, :-1] * 0,
        num_slots=1,
    )


def logits(cfg, params, rows):
    return jax.jit(lambda p, r: hidden_states(cfg, p, r) @ head_matrix(cfg, p))(params, rows)


def random_params(cfg, seed=0):
    """Fresh parameters, with norms that are not 1 so that a norm left out would show."""
    params = init_params(cfg, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: rng.uniform(0.5, 1.5, x.shape).astype(x.dtype) if "scale" in str(path) else np.asarray(x),
        params,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_logits_equal_those_of_a_plain_numpy_llama(tied, groups):
    cfg = dataclasses.replace(CFG, tie_word_embeddings=tied, num_key_value_heads=groups)
    params = random_params(cfg)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, 37)
    close(logits(cfg, params, one_sequence(tokens))[0], numpy_logits(cfg, params, tokens), "decoder_oracle")


def test_a_response_scores_the_same_beside_its_sibling_as_alone():
    params = random_params(CFG)
    rng = np.random.default_rng(2)
    prompt, first, second = (rng.integers(1, CFG.vocab_size, n).astype(np.int32) for n in (7, 5, 9))
    alone = []
    for response in (first, second):
        table = numpy_logits(CFG, params, np.concatenate([prompt, response]))[len(prompt) - 1 : -1]
        table = table - np.log(np.exp(table).sum(-1, keepdims=True))
        alone.append(table[np.arange(len(response)), response].sum())

    pad = 4
    lengths = (len(prompt), len(first), len(second), pad)
    branch = np.repeat([0, 1, 2, 0], lengths)
    segment = np.repeat([1, 1, 1, 0], lengths)
    positions = np.concatenate([np.arange(7), 7 + np.arange(5), 7 + np.arange(9), np.zeros(pad)])
    source = np.concatenate([[6], 7 + np.arange(4), [6], 12 + np.arange(8)])
    rows = Rows(
        tokens=np.concatenate([prompt, first, second, np.zeros(pad, np.int32)])[None],
        positions=positions.astype(np.int32)[None],
        segment=segment.astype(np.int32)[None],
        branch=branch.astype(np.int32)[None],
        source=source.astype(np.int32)[None],
        target=np.concatenate([first, second])[None],
        slot=np.repeat([0, 1], (5, 9)).astype(np.int32)[None],
        num_slots=2,
    )

    @jax.jit
    def score(params, rows):
        hidden = hidden_states(CFG, params, rows, window=21)
        return sum_by_slot(token_logps(hidden, unembedding(CFG, params), rows, chunk=4), rows)

    close(score(params, rows)[0], alone, "packing")


def test_llama3_scaling_keeps_fast_rotations_and_slows_slow_ones():
    cfg = dataclasses.replace(CFG, head_dim=16, rope_theta=10000.0)
    plain, scaled = rope.frequencies(cfg), rope.frequencies(dataclasses.replace(cfg, rope_scaling=LLAMA3))
    turns = 64 * plain / (2 * np.pi)
    close(scaled[turns >= 4], plain[turns >= 4], "closed_form")
    close(scaled[turns <= 1], plain[turns <= 1] / 8, "closed_form")
    between = (turns > 1) & (turns < 4)
    assert between.any()
    share = (turns[between] - 1) / 3
    close(scaled[between], plain[between] * (share + (1 - share) / 8), "closed_form")


def test_rotation_depends_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 6)).astype(np.float32)
    products = []
    for shift in (0, 5, 300):
        tables = [rope.tables(CFG, jnp.full((1, 1), shift + offset)) for offset in (11, 4)]
        products.append(np.sum(rope.rotate(q, *tables[0]) * rope.rotate(k, *tables[1])))
    np.testing.assert_allclose(products, products[0], rtol=1e-4)  # float32 angles of up to 311 radians


@pytest.mark.parametrize("remat", ["full", "dots", "groups"])
def test_rematerialisation_changes_memory_and_not_the_gradient(remat):
    cfg = dataclasses.replace(CFG, num_hidden_layers=6)
    rows = one_sequence(np.random.default_rng(3).integers(0, cfg.vocab_size, 64))
    params = random_params(cfg)

    def compiled(cfg):
        def loss(params, rows):
            return -token_logps(hidden_states(cfg, params, rows), unembedding(cfg, params), rows, chunk=32).sum()

        return jax.jit(jax.grad(loss)).lower(params, rows).compile()

    def memory(program):
        return program.memory_analysis().temp_size_in_bytes

    plain, again = compiled(cfg), compiled(dataclasses.replace(cfg, remat=remat))
    jax.tree.map(functools.partial(close, kind="microbatch"), plain(params, rows), again(params, rows))
    assert memory(again) < 0.8 * memory(plain)


@pytest.mark.parametrize("remat", ["full", "groups"])
def test_the_feed_forward_of_a_few_columns_at_a_time_is_that_of_all(remat, monkeypatch):
    cfg = dataclasses.replace(CFG, num_hidden_layers=4, remat=remat)
    rows = one_sequence(np.random.default_rng(3).integers(0, cfg.vocab_size, 64))
    params = random_params(cfg)

    def loss(params):
        return -token_logps(hidden_states(cfg, params, rows), unembedding(cfg, params), rows, chunk=32).mean()

    def compiled():
        return jax.jit(lambda params: jax.value_and_grad(loss)(params)).lower(params).compile()

    whole = compiled()
    monkeypatch.setattr(decoder, "COLUMNS", 16)
    parts = compiled()
    hidden = f"f32[1,64,{cfg.intermediate_size}]"
    assert hidden in whole.as_text()
    assert hidden not in parts.as_text()
    jax.tree.map(functools.partial(close, kind="microbatch"), whole(params), parts(params))


def test_on_several_devices_a_feed_forward_gathers_its_kernels_once_for_many_tokens(monkeypatch):
    """What is moved does not grow with the tokens of a row."""
    cfg = dataclasses.replace(CFG, remat="full")
    monkeypatch.setattr(decoder, "COLUMNS", 16)
    mesh = make_mesh(1, 8, 1, devices=jax.devices()[:8])
    params = placed_shapes(mesh, abstract_params(cfg))

    def moved(tokens):
        rows = jax.tree.map(lambda x: np.repeat(x, 8, 0), one_sequence(np.zeros(tokens)))
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_sharding(mesh)), rows)
        with jax.set_mesh(mesh):
            program = jax.jit(jax.grad(lambda params, rows: (hidden_states(cfg, params, rows) ** 2).sum()))
            return sum(found.bytes for found in collectives(program.lower(params, given).compile().as_text()))

    once = moved(16)
    assert 0 < moved(64) <= once
    monkeypatch.setattr(decoder, "TOKENS", 16)
    assert moved(64) > 1.2 * once


@pytest.mark.parametrize(("rows", "length", "columns"), [(None, 4096, 1024), (None, 1500, 1500), (1, 4096, 4096),
    (3, 4096, 2048), (8, 4096, 1024), (1, 6144, 3072), (3, 6144, 2048), (1, 512, 512)])  # fmt: skip
def test_the_parts_of_a_feed_forward_divide_a_row(rows, length, columns):
    assert decoder._columns(length, rows) == columns


def test_kernels_are_multiplied_in_the_compute_dtype_and_their_gradients_come_in_that_of_the_parameters():
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    rows = one_sequence(np.random.default_rng(3).integers(0, cfg.vocab_size, 64))
    params = random_params(cfg)
    made = jax.make_jaxpr(lambda p: hidden_states(cfg, p, rows))(params)
    scans = [eqn for eqn in made.eqns if eqn.primitive.name == "scan"]
    given = [v.aval for v in scans[0].invars if v.aval.ndim == 3 and v.aval.shape[0] == cfg.num_hidden_layers]
    assert len(given) == 7 and {aval.dtype for aval in given} == {jnp.dtype("bfloat16")}
    grads = jax.eval_shape(jax.grad(lambda p: hidden_states(cfg, p, rows).astype(jnp.float32).sum()), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_the_program_does_not_grow_with_the_number_of_layers():
    def size(layers):
        cfg = dataclasses.replace(CFG, num_hidden_layers=layers)
        rows = one_sequence(np.zeros(8))
        return len(jax.jit(functools.partial(hidden_states, cfg)).lower(abstract_params(cfg), rows).as_text())

    assert size(24) < 1.05 * size(2)


def test_a_step_moves_nothing_between_host_and_device_by_itself():
    params, rows = jax.device_put((random_params(CFG), one_sequence(np.arange(9))))
    step = jax.jit(jax.grad(lambda p, r: token_logps(hidden_states(CFG, p, r), unembedding(CFG, p), r, chunk=4).sum()))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(step(params, rows))


def test_parameters_compute_and_log_probs_have_their_own_dtypes():
    cfg = dataclasses.replace(CFG, dtype="bfloat16", param_dtype="float32")
    params, rows = abstract_params(cfg), one_sequence(np.arange(9))

    def forward(params):
        hidden, head = hidden_states(cfg, params, rows), head_matrix(cfg, params)
        return hidden, head, token_logps(hidden, unembedding(cfg, params), rows, chunk=4)

    hidden, head, logps = jax.eval_shape(forward, params)
    assert (hidden.dtype, head.dtype, logps.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    grads = jax.eval_shape(jax.grad(lambda p: forward(p)[2].sum()), params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    half = abstract_params(dataclasses.replace(CFG, param_dtype="bfloat16"))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half))


def test_bfloat16_matmuls_stay_near_float32_ones():
    params, rows = random_params(dataclasses.replace(CFG, initializer_range=0.1)), one_sequence(np.arange(9))
    exact = logits(CFG, params, rows)
    rounded = logits(dataclasses.replace(CFG, dtype="bfloat16"), params, rows).astype(np.float32)
    np.testing.assert_allclose(rounded, exact, atol=0.03 * np.abs(exact).max())  # bfloat16 keeps 8 bits


def test_keys_and_values_come_out_layer_by_layer_on_request():
    params, rows = random_params(CFG), one_sequence(np.arange(9))
    attend = row_attention(CFG, Places.in_rows(rows.segment, rows.branch, rows.positions), keep_kv=True)
    hidden, (k, v) = forward(CFG, params, rows.tokens, rows.positions, attend)
    assert k.shape == v.shape == (2, 1, 2, 9, 6)
    first = jax.tree.map(lambda x: x[0], params["layers"]["block"])
    x = params["embed"][rows.tokens]
    y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + CFG.rms_norm_eps) * first["attention_norm"]["scale"]
    close(v[0, 0], (y @ first["v"]["kernel"])[0].reshape(9, 2, 6).swapaxes(0, 1), "decoder_oracle")
    assert hidden.shape == (1, 9, 16)


def test_abstract_parameters_are_the_shapes_of_fresh_ones():
    fresh = init_params(CFG, jax.random.key(0))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), fresh)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(CFG))
    kernel = np.asarray(fresh["layers"]["block"]["q"]["kernel"])
    assert not np.array_equal(kernel[0], kernel[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("remat", "some"),
        ("dtype", "float8"),
        ("hidden_size", 0),
    ],
)
def test_a_config_that_makes_no_model_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        dataclasses.replace(CFG, **{field: value})


def test_an_unknown_attention_is_refused_with_the_list():
    cfg = dataclasses.replace(CFG, attn_implementation="flash")
    with pytest.raises(ValueError, match=r"'flash' is unknown; choose one of auto, xla"):
        hidden_states(cfg, random_params(CFG), one_sequence(np.arange(4)))


def test_ids_that_the_tokenizer_does_not_have_leave_entropies_and_gradients_to_the_others():
    """As if their columns of the projection were not there."""
    cfg = dataclasses.replace(CFG, absent_ids=((2, 4), (20, 23)))
    known = np.setdiff1d(np.arange(CFG.vocab_size), [2, 3, 20, 21, 22])
    head = jax.random.normal(jax.random.key(1), (CFG.hidden_size, CFG.vocab_size))
    hidden = jax.random.normal(jax.random.key(2), (1, 5, CFG.hidden_size))
    place, slot = np.arange(5)[None], np.zeros((1, 5), np.int32)

    def total(head, unembed, target):
        rows = Rows(target, place, slot + 1, slot, place, target, slot, num_slots=1)
        logps, entropies = token_logps_and_entropies(hidden, unembed(head), rows, chunk=2)
        return jnp.sum(logps) + jnp.sum(entropies**2), (logps, entropies)

    both = jax.value_and_grad(total, has_aux=True)
    ours, of_ours = both(head, lambda head: unembedding(cfg, {"head": head}), known[place])
    left, of_left = both(head[:, known], lambda head: lambda hidden: hidden @ head, place)
    jax.tree.map(functools.partial(close, kind="packing"), ours, left)
    close(of_ours[:, known], of_left, "packing")
    assert not np.delete(np.asarray(of_ours), known, axis=1).any()
