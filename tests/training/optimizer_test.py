"""Parameters in bfloat16 are a float32 master copy, rounded; parameters in float32 have none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sera_jax.config import TrainGroup
from sera_jax.core import Mean, Stream, key_for
from sera_jax.data.batches import ItemLoader
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout
from sera_jax.mesh import host_to_global, make_mesh, param_shardings, replicated, row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.training.objectives import sft_objective
from sera_jax.training.optimizer import MasterWeights, init_optimizer, make_optimizer
from sera_jax.training.step import abstract_state, init_state, make_step, place_batch
from tests.tolerances import TOLERANCES

CFG = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8, param_dtype="bfloat16"
)
CLOSE = {k: TOLERANCES["closed_form"][k] for k in ("rtol", "atol")}
OPTIMS = ["adamw", "adafactor", "lion"]
bf16 = np.dtype(jnp.bfloat16)


@functools.cache
def one():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.mark.parametrize("optim", OPTIMS)
def test_weight_decay_takes_off_its_share_of_the_learning_rate(optim):
    group = TrainGroup(optim=optim, learning_rate=1e-2, lr_scheduler_type="constant", warmup_ratio=0, weight_decay=0.5)
    optimizer, params = make_optimizer(group, 10), {"w": jnp.linspace(-1.0, 1.0, 5)}
    updates, _ = optimizer.update({"w": jnp.zeros(5)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-2 * 0.5 * params["w"], **CLOSE)


# ---- the rule, on a loss whose gradient is known


def squares(optimizer, dtype=jnp.bfloat16, *, updates, microbatches=1, weight=1.0, **master):
    """States after each update of the loss `weight` * w^2 / 2: its gradient, `weight` * w, is no longer than w."""

    def objective(params, batch):
        w = params["w"].astype(jnp.float32)
        loss = Mean((batch * w * w / 2).sum(), jnp.ones(()))
        return loss.total, loss.weight, {"loss": loss}

    start = np.random.default_rng(0).normal(1, 0.2, (130, 130)).astype(dtype)
    params = {"w": jnp.asarray(start)}
    state = init_state(params, init_optimizer(optimizer, params, **master))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(one())), state)
    step, batch, out = make_step(objective, optimizer, abstract, one()), np.full((microbatches, 1, 1), weight), []
    for _ in range(updates):
        state, _ = step(state, batch.astype(np.float32))
        out.append(jax.device_get(state))
        state = jax.device_put(out[-1])
    return start, out


def assert_rounded(state):
    """The stored parameters are exactly the master copy's, rounded."""
    assert isinstance(state.opt_state, MasterWeights)
    for stored, master in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.opt_state.master), strict=True):
        assert (stored.dtype, master.dtype) == (bf16, np.float32)
        np.testing.assert_array_equal(stored, master.astype(bf16))


def descent(master, moments, update, gradient):
    return master - 1e-3 * gradient, moments


def adamw(master, moments, update, gradient):
    """AdamW of rate 1e-4 and weight decay 0.1, of update 0, 1, ..."""
    mean, square = moments or (0.0, 0.0)
    mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
    first, second = mean / (1 - 0.9 ** (update + 1)), square / (1 - 0.999 ** (update + 1))
    return master - 1e-4 * (first / (np.sqrt(second) + 1e-8) + 0.1 * master), (mean, square)


@pytest.mark.parametrize(
    ("optimizer", "rule"), [(optax.sgd(1e-3), descent), (optax.adamw(1e-4, weight_decay=0.1), adamw)]
)
def test_the_master_copy_takes_float32_updates_by_gradients_at_the_rounded_parameters(optimizer, rule):
    master, states = squares(optimizer, updates=60)
    master, at_master = (master.astype(np.float64) for _ in range(2))
    moments = others = None
    for update, state in enumerate(states):
        master, moments = rule(master, moments, update, master.astype(np.float32).astype(bf16).astype(np.float64))
        at_master, others = rule(at_master, others, update, at_master)
        np.testing.assert_allclose(state.opt_state.master["w"], master, **CLOSE)
        assert_rounded(state)
    if rule is descent:  # Adam's step does not know a gradient's size
        assert not np.allclose(states[-1].opt_state.master["w"], at_master, **CLOSE)


@pytest.mark.parametrize("optim", OPTIMS)
def test_every_optimiser_moves_the_master_copy_as_it_would_move_float32_parameters(optim):
    group = TrainGroup(optim=optim, learning_rate=1e-6, lr_scheduler_type="constant")
    optimizer = make_optimizer(group, 10)
    start, states = squares(optimizer, updates=5)
    master = {"w": start.astype(np.float32)}
    rule = optimizer.init(master)
    for state in states:
        # its master's, so that no rounding near a tie is in the way
        updates, rule = optimizer.update({"w": master["w"].astype(bf16).astype(np.float32)}, rule, master)
        master = jax.device_get(optax.apply_updates(master, updates))
        np.testing.assert_allclose(state.opt_state.master["w"], master["w"], rtol=1e-6)
        assert_rounded(state)
        master = state.opt_state.master
    assert (master["w"] != start.astype(np.float32)).mean() > 0.9
    _, without = squares(optimizer, updates=5, master_weights=False)
    assert (without[-1].params["w"] == start).all()


@pytest.mark.parametrize("optim", OPTIMS)
def test_float32_parameters_have_no_second_copy_and_the_update_that_optax_gives_them(optim):
    optimizer = make_optimizer(TrainGroup(optim=optim, learning_rate=1e-2), 10)
    start, states = squares(optimizer, jnp.float32, updates=1)
    rule = optimizer.init({"w": start})
    assert jax.tree.structure(states[0].opt_state) == jax.tree.structure(rule)

    def by_hand(params, rule):
        updates, rule = optimizer.update(params, rule, params)
        return optax.apply_updates(params, updates), rule

    expected = jax.device_get(jax.jit(by_hand)({"w": start}, rule))
    jax.tree.map(np.testing.assert_array_equal, (states[0].params, states[0].opt_state), expected)


def test_gradients_of_microbatches_are_added_in_float32():
    """300 equal gradients: their sum in bfloat16 would stick at 256 of them."""
    start, (state,) = squares(optax.sgd(2.0**-8), updates=1, microbatches=300)
    expected = start.astype(np.float32) * (1 - 2.0**-8)
    np.testing.assert_allclose(state.opt_state.master["w"], expected, rtol=1e-6)


def test_an_update_that_is_not_finite_leaves_the_master_copy():
    start, (state,) = squares(optax.adam(1e-2), updates=1, weight=np.nan)
    assert not bool(state.ok)
    np.testing.assert_array_equal(state.params["w"], start)
    np.testing.assert_array_equal(state.opt_state.master["w"], start.astype(np.float32))


# ---- a model


OPTIMIZER = make_optimizer(TrainGroup(), 100)


@functools.cache
def fresh_params():
    return jax.device_get(jax.jit(functools.partial(init_params, CFG))(key_for(0, Stream.INIT)))


@functools.cache
def program(mesh, **master):
    """How a state starts, and its step: SFT at the default settings."""
    abstract = abstract_state(CFG, OPTIMIZER, mesh, **master)
    objective = sft_objective(CFG, window=32, chunk_tokens=64, shards=row_shards(mesh))
    start = jax.jit(
        lambda params: init_state(params, init_optimizer(OPTIMIZER, params, **master)),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )
    return start, make_step(objective, OPTIMIZER, abstract, mesh)


def trained(mesh, *, updates=1, microbatches=1, **master):
    """The state after `updates` on the same 16 answers."""
    rng = np.random.default_rng(0)
    items = [
        Item(f"{i}", rng.integers(1, 64, 5).astype(np.int32), (rng.integers(1, 64, 20).astype(np.int32),))
        for i in range(16)
    ]
    layout = Layout(32, shards=row_shards(mesh), microbatches=microbatches)
    arrays = ItemLoader(items, layout, batch_size=16, seed=0).batch(0).arrays
    start, step = program(mesh, **master)
    with jax.set_mesh(mesh):
        state = start(host_to_global(fresh_params(), param_shardings(mesh, fresh_params())))
        for _ in range(updates):
            state, _ = step(state, place_batch(arrays, microbatches, mesh))
    return jax.device_get(state)


def moved(tree):
    """Share of the numbers that are not the fresh parameters'."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(fresh_params()), strict=True))
    return sum((a != b.astype(a.dtype)).sum() for a, b in pairs) / sum(a.size for a, _ in pairs)


def test_at_the_default_rate_parameters_move_that_would_all_but_stand_still():
    state, without = trained(one(), updates=100), trained(one(), updates=100, master_weights=False)
    assert_rounded(state)
    assert moved(state.opt_state.master) > 0.99
    assert moved(without.params) < 0.05
    assert moved(state.params) > 5 * moved(without.params)


@pytest.mark.parametrize(("shape", "microbatches"), [((1, 1, 1), 4), ((2, 2, 2), 1)])
def test_master_copy_and_moments_are_alike_on_every_mesh_and_in_every_number_of_microbatches(shape, microbatches):
    mesh = one() if shape == (1, 1, 1) else make_mesh(*shape)
    alone, split = trained(one()), trained(mesh, microbatches=microbatches)
    assert_rounded(split)
    for a, b in zip(jax.tree.leaves(alone.opt_state.rule), jax.tree.leaves(split.opt_state.rule), strict=True):
        # each gradient of a bfloat16 parameter is itself rounded, to 1/512 of its size
        assert np.linalg.norm(a - b) <= np.linalg.norm(a) / 100
    masters = zip(jax.tree.leaves(alone.opt_state.master), jax.tree.leaves(split.opt_state.master), strict=True)
    # Adam's first step is the rate, 1e-7, whatever the gradient's size: compare in the mean
    assert max(np.abs(a - b).mean() for a, b in masters) < 1e-8


@pytest.mark.parametrize("optim", OPTIMS)
def test_the_master_copy_and_its_moments_lie_as_the_parameters_do(optim):
    state = abstract_state(CFG, make_optimizer(TrainGroup(optim=optim), 10), make_mesh(2, 2, 2))
    lie = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert lie.opt_state.master == lie.params
    if optim != "adafactor":
        assert next(part.mu for part in lie.opt_state.rule[1] if hasattr(part, "mu")) == lie.params
