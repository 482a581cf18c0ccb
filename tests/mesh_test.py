"""Meshes and sharding rules, on the 8 simulated devices of conftest.py."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax import mesh as meshes
from sera_jax.core import Rows
from sera_jax.mesh import (
    device_grid,
    host_to_global,
    make_mesh,
    mesh_shape,
    param_shardings,
    replicated,
    rows_sharding,
)
from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import with_value_head
from sera_jax.models.decoder import abstract_params, hidden_states, init_params, unembedding
from sera_jax.models.lora import Lora, dropping
from sera_jax.models.peft import kernels_of
from sera_jax.models.trained import Trained
from sera_jax.ops.logprob import sum_by_slot, token_logps
from sera_jax.sampling import engine
from tests.tolerances import TOLERANCES

CFG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
    initializer_range=0.2,
)


def tiny_mesh(data, fsdp, tensor):
    return make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


def random_rows(count=8, length=24):
    """Rows of two items each; every token but an item's first is scored."""
    rng = np.random.default_rng(0)
    half = length // 2
    segment = np.repeat([[1] * half + [2] * half], count, 0).astype(np.int32)
    tokens = rng.integers(0, CFG.vocab_size, (count, length)).astype(np.int32)
    source = np.concatenate([np.arange(half - 1), half + np.arange(half - 1)]).astype(np.int32)
    return Rows(
        tokens=tokens,
        positions=np.repeat(np.tile(np.arange(half, dtype=np.int32), 2)[None], count, 0),
        segment=segment,
        branch=segment * 0,
        source=np.repeat(source[None], count, 0),
        target=tokens[:, source + 1],
        slot=np.repeat(np.repeat([0, 1], half - 1)[None], count, 0).astype(np.int32),
        num_slots=2,
    )


def gradient(mesh, cfg, params, rows, *, context):
    """Scores and gradient of their sum of squares, with everything laid on the mesh by the rules."""

    def loss(params, rows):
        hidden = hidden_states(cfg, params, rows)
        scores = sum_by_slot(token_logps(hidden, unembedding(cfg, params), rows, chunk=8), rows)
        return jnp.sum(jnp.square(scores / 10)), scores

    shardings = param_shardings(mesh, abstract_params(cfg))
    step = jax.jit(jax.grad(loss, has_aux=True), out_shardings=(shardings, rows_sharding(mesh)))
    params, rows = host_to_global(params, shardings), host_to_global(rows, rows_sharding(mesh))
    with jax.transfer_guard("disallow"):
        if not context:
            return jax.block_until_ready(step(params, rows))
        with jax.set_mesh(mesh):
            return jax.block_until_ready(step(params, rows))


@pytest.mark.parametrize(("tied", "context"), [(False, False), (True, True)])
def test_the_gradient_of_the_scorer_is_the_same_on_every_mesh(context, tied):
    cfg = dataclasses.replace(CFG, tie_word_embeddings=tied)
    params, rows = jax.device_get(init_params(cfg, jax.random.key(0))), random_rows()
    alone = gradient(tiny_mesh(1, 1, 1), cfg, params, rows, context=False)
    for shape in ((2, 2, 2), (1, 4, 2)):
        spread = gradient(tiny_mesh(*shape), cfg, params, rows, context=context)
        jax.tree.map(
            functools.partial(
                np.testing.assert_allclose, rtol=TOLERANCES["mesh"]["rtol"], atol=TOLERANCES["mesh"]["atol"]
            ),
            jax.device_get(spread),
            jax.device_get(alone),
        )
        assert spread[0]["layers"]["block"]["q"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")


def test_hidden_states_stay_split_by_rows_under_a_mesh_in_context():
    mesh = tiny_mesh(2, 2, 2)
    params = host_to_global(init_params(CFG, jax.random.key(0)), param_shardings(mesh, abstract_params(CFG)))
    rows = host_to_global(random_rows(), rows_sharding(mesh))
    with jax.set_mesh(mesh):
        hidden = jax.jit(functools.partial(hidden_states, CFG))(params, rows)
    assert hidden.sharding.is_equivalent_to(rows_sharding(mesh), hidden.ndim)
    odd = dataclasses.replace(CFG, vocab_size=33)  # sizes that do not divide: left to the compiler, but it runs
    with jax.set_mesh(mesh):
        params = jax.jit(functools.partial(init_params, odd))(jax.random.key(0))
        jax.jit(functools.partial(hidden_states, odd))(params, jax.tree.map(lambda x: x[:3], random_rows()))


def test_under_a_mesh_in_context_activations_are_not_moved_between_shardings():
    mesh = tiny_mesh(2, 2, 2)
    cfg = dataclasses.replace(CFG, vocab_size=64, hidden_size=32, intermediate_size=64)
    shardings = param_shardings(mesh, abstract_params(cfg))

    def loss(params, rows):
        return token_logps(hidden_states(cfg, params, rows), unembedding(cfg, params), rows, chunk=8).sum()

    def on_mesh(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(on_mesh, abstract_params(cfg), shardings)
    rows = jax.tree.map(lambda leaf: on_mesh(leaf, rows_sharding(mesh)), random_rows())
    with jax.set_mesh(mesh):
        program = str(jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, rows).compile().as_text())
    assert "all-gather" in program
    assert "all-to-all" not in program


def test_every_parameter_matches_exactly_one_rule(monkeypatch):
    shapes = abstract_params(CFG)
    param_shardings(tiny_mesh(2, 2, 2), shapes)
    with pytest.raises(ValueError, match=r"parameter value/kernel of shape .* matches no rule"):
        param_shardings(tiny_mesh(1, 1, 1), {**shapes, "value": {"kernel": jax.ShapeDtypeStruct((16, 1), jnp.float32)}})
    monkeypatch.setattr(meshes, "RULES", (*meshes.RULES, (r"layers/block/q/.*", P(None, None, None))))
    with pytest.raises(ValueError, match=r"layers/block/q/kernel .* matches the rules .*q/"):
        param_shardings(tiny_mesh(1, 1, 1), shapes)


def test_no_rule_is_left_without_a_parameter():
    cfg = dataclasses.replace(CFG, qkv_bias=True, out_bias=True, mlp_bias=True)
    adapters = Trained(lora=Lora(2, 2.0, kernels_of(cfg, ("all-linear",))))

    def everything(params):
        whole = adapters.adapted(with_value_head(params), jax.random.key(0))
        return dropping(adapters.lora, whole, jax.random.key(0))

    params = jax.eval_shape(everything, abstract_params(cfg))
    names = [meshes.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern, _ in meshes.RULES:
        assert any(meshes.re.fullmatch(pattern, name) for name in names), pattern


def test_a_size_that_does_not_divide_names_the_parameter_the_size_and_the_axis():
    shapes = abstract_params(dataclasses.replace(CFG, vocab_size=33))
    with pytest.raises(ValueError, match=r"parameter embed of shape \(33, 16\).*33 is not divisible by mesh.tensor=2"):
        param_shardings(tiny_mesh(1, 1, 2), shapes)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 1, 1), (8, 1, 1)), ((2, 4, 1), (2, 4, 1))],
)
def test_minus_one_takes_the_devices_that_remain(sizes, shape):
    data, fsdp, tensor = sizes
    assert mesh_shape(data, fsdp, tensor, 8) == shape
    mesh = make_mesh(data, fsdp, tensor)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, 1), "data=2, fsdp=2, tensor=1: sizes multiply to 4, which does not equal the 8 devices"),
        ((3, -1, 1), "multiply to 3, which does not divide the 8 devices"),
        ((-1, -1, 1), "only one axis may be -1"),
        ((0, 8, 1), "mesh.data=0"),
        ((1, -2, 1), "mesh.fsdp=-2"),
    ],
)
def test_sizes_that_do_not_make_a_mesh_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(*sizes)


def chips(slices, each, platform="tpu"):
    """Devices of several slices, in an order in which they come by turns."""
    about = dict(platform=platform, device_kind="made up", process_index=0)
    return [types.SimpleNamespace(id=i, slice_index=i % slices, **about) for i in range(slices * each)]


@pytest.fixture
def as_they_come(monkeypatch):
    """Devices of a slice without coordinates."""
    lay = lambda shape, devices, **_: np.array(devices).reshape(shape)  # noqa: E731
    monkeypatch.setattr(meshes.mesh_utils, "create_device_mesh", lay)


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2), (4, 2, 1), (8, 1, 1)])
def test_every_slice_holds_whole_copies(shape, as_they_come):
    devices = chips(2, 4)
    grid = device_grid(shape, devices)
    assert grid.shape == shape and {d.id for d in grid.flat} == set(range(8))
    for copy in grid:
        assert len({device.slice_index for device in copy.flat}) == 1
    half = shape[0] // 2
    assert [copy.flat[0].slice_index for copy in grid] == [0] * half + [1] * half


@pytest.mark.parametrize("devices", [chips(1, 8), chips(2, 4, "gpu")], ids=["one slice", "hosts of GPUs"])
def test_other_devices_may_share_a_copy_wherever_they_are(devices, as_they_come):
    assert [device.id for device in device_grid((1, 8, 1), devices).flat] == list(range(8))


@pytest.mark.parametrize(("slices", "together"), [(1, 8), (2, 4), (4, 2)])
def test_answers_are_decoded_within_a_slice(slices, together, as_they_come, monkeypatch):
    """A token costs two sums between the devices that share a copy: they are those of one slice."""
    monkeypatch.setattr(engine, "decoding_mesh", lambda mesh, tensor: tensor)
    monkeypatch.setattr(engine, "WHOLE_BYTES", 0)
    cfg = dataclasses.replace(CFG, num_attention_heads=8, num_key_value_heads=8)
    mesh = types.SimpleNamespace(size=8, devices=device_grid((slices, 8 // slices, 1), chips(slices, 8 // slices)))
    assert engine.mesh_for(cfg, mesh) == together
    with pytest.raises(ValueError, match=rf"decode_tensor=3 does not divide the {together} devices"):
        engine.mesh_for(cfg, mesh, 3)


def test_a_copy_that_lies_on_two_slices_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"mesh\.data=1 with 2 slices of 4 chips: .* set --config\.mesh\.data to 2"):
        device_grid((1, 8, 1), chips(2, 4))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1e-3),
        optax.lion(1e-3),
        optax.adafactor(1e-3, min_dim_size_to_factor=8),
        optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)),
        optax.MultiSteps(optax.adamw(1e-3, mu_dtype=jnp.bfloat16), 2),
    ],
    ids=["adamw", "lion", "adafactor", "chain", "multisteps"],
)
def test_optimiser_state_lies_as_its_parameters_and_a_sharded_update_runs(optimizer):
    mesh = tiny_mesh(2, 2, 2)
    shapes = abstract_params(CFG)
    by_shape = {}
    for sharding, leaf in zip(jax.tree.leaves(param_shardings(mesh, shapes)), jax.tree.leaves(shapes), strict=True):
        by_shape.setdefault(leaf.shape, sharding)
    state_shapes = jax.eval_shape(optimizer.init, shapes)
    shardings = meshes.state_shardings(mesh, state_shapes)
    assert jax.tree.structure(shardings) == jax.tree.structure(state_shapes)
    for sharding, leaf in zip(jax.tree.leaves(shardings), jax.tree.leaves(state_shapes), strict=True):
        assert isinstance(sharding, NamedSharding)
        if len(leaf.shape) == 3:
            assert sharding.spec == by_shape[leaf.shape].spec
        if len(leaf.shape) == 0:
            assert sharding.is_fully_replicated
        sharding.shard_shape(leaf.shape)  # raises where an axis does not divide

    params = host_to_global(init_params(CFG, jax.random.key(0)), param_shardings(mesh, shapes))
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    step = jax.jit(lambda p, s: optimizer.update(p, s, p), out_shardings=(param_shardings(mesh, shapes), shardings))
    updates, state = step(params, state)
    assert jax.tree.structure(state) == jax.tree.structure(state_shapes)
    jax.tree.map(lambda u: np.testing.assert_array_equal(np.isfinite(u), True), updates)


def test_parameters_inside_a_training_state_must_match_a_rule_too():
    mesh = tiny_mesh(1, 2, 1)
    leaf = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    state = {
        "params": abstract_params(CFG),
        "opt_state": {"mu": {"other": leaf}},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    shardings = meshes.state_shardings(mesh, state)
    assert shardings["params"] == param_shardings(mesh, abstract_params(CFG))
    assert shardings["opt_state"]["mu"]["other"] == shardings["step"] == replicated(mesh)
    with pytest.raises(ValueError, match="parameter other"):
        meshes.state_shardings(mesh, {"params": {"other": leaf}})


def test_a_value_head_and_its_moments_lie_whole_on_every_device_and_are_not_taken_for_a_vocabulary_projection():
    mesh = tiny_mesh(2, 2, 2)
    params = with_value_head(abstract_params(CFG))  # untied: it has a `head`, too
    state = {"params": params, "opt_state": jax.eval_shape(optax.adamw(1e-3).init, params)}
    shardings = meshes.state_shardings(mesh, state)
    moments = shardings["opt_state"][0]
    for tree in (shardings["params"], moments.mu, moments.nu):
        assert tree["value_head"].is_fully_replicated
        assert tree["head"].spec == P("fsdp", "tensor")


def test_host_values_reach_the_mesh_whole_and_explicitly():
    mesh = tiny_mesh(2, 2, 2)
    rows = random_rows()
    with jax.transfer_guard("disallow"):
        placed = host_to_global(rows, rows_sharding(mesh))
    assert placed.tokens.sharding.shard_shape(placed.tokens.shape) == (2, 24)
    assert meshes.row_shards(mesh) == 4
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed), rows)
    assert host_to_global(np.float32(3), replicated(mesh)).sharding.is_fully_replicated


def test_a_fresh_model_is_made_in_place_and_equals_one_made_on_one_device():
    mesh = tiny_mesh(1, 4, 2)
    make = functools.partial(init_params, CFG)
    spread = jax.jit(make, out_shardings=param_shardings(mesh, abstract_params(CFG)))(jax.random.key(5))
    # The same bits are drawn; turning them into normals may differ in the last place.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=TOLERANCES["closed_form"]["rtol"]),
        jax.device_get(spread),
        jax.device_get(jax.jit(make)(jax.random.key(5))),
    )
