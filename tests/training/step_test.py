"""One update: the same whatever the microbatches, the mesh, or the row layout; and never a step into nan."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from sera_jax.config import TrainGroup
from sera_jax.core import Mean, Stream, key_for
from sera_jax.data.batches import ItemLoader, PairLoader
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import Layout
from sera_jax.losses.preference import LOSSES, resolve
from sera_jax.mesh import host_to_global, make_mesh, param_shardings, replicated, row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.models.parts import split
from sera_jax.training.objectives import align_objective, sft_objective
from sera_jax.training.optimizer import make_optimizer, schedule
from sera_jax.training.step import abstract_state, init_state, make_step, place_batch
from tests.tolerances import TOLERANCES

CFG = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
T = 64


def _pairs(count, seed=0):
    rng = np.random.default_rng(seed)

    def tokens(low, high):
        return rng.integers(1, 64, rng.integers(low, high)).astype(np.int32)

    return [
        PairItem(
            Item(f"p{i}", tokens(2, 10), (tokens(1, 12), tokens(1, 12))),
            ref_logp=rng.normal(-30, 5, 2).astype(np.float32),
        )
        for i in range(count)
    ]


@functools.cache
def _params():
    return jax.device_get(init_params(CFG, key_for(0, Stream.INIT)))


def _loader(mesh, microbatches, count=24, **options):
    layout = Layout(T, options.pop("share_prompt", True), shards=row_shards(mesh), microbatches=microbatches)
    return PairLoader(_pairs(count), layout, batch_size=16, seed=0, **options)


def _update(mesh, microbatches=1, loss="dpo", batch_of=0, loader=None, optimizer=None, params=None, **options):
    """Parameters and metrics after one SGD update with rate 1: the difference of parameters is the gradient."""
    optimizer = optimizer or optax.sgd(1.0)
    loader = loader or _loader(mesh, microbatches, **options)
    state = abstract_state(CFG, optimizer, mesh)
    objective = align_objective(CFG, resolve(loss), window=T, chunk_tokens=64, shards=row_shards(mesh))
    step = make_step(objective, optimizer, state, mesh)
    params = host_to_global(params or _params(), param_shardings(mesh, _params()))
    start = jax.jit(
        lambda p: init_state(p, optimizer.init(p)), out_shardings=jax.tree.map(lambda s: s.sharding, state)
    )(params)
    batch = loader.batch(batch_of)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        new, metrics = step(start, place_batch(batch.arrays, microbatches, mesh))
    return jax.device_get(new), jax.device_get(metrics), batch


def _gradient(new):
    return jax.tree.map(lambda a, b: a - b, _params(), new.params)


def _assert_close(a, b, kind):
    tolerance = {k: TOLERANCES[kind][k] for k in ("rtol", "atol")}
    for path, x in jax.tree.leaves_with_path(a):
        y = functools.reduce(lambda tree, key: tree[key.key], path, b)
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.fixture(scope="module")
def one():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def plain(one):
    return _update(one)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_the_gradient_does_not_depend_on_the_microbatches(one, plain, microbatches):
    new, metrics, _ = _update(one, microbatches)
    _assert_close(_gradient(new), _gradient(plain[0]), "microbatch")
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        np.testing.assert_allclose(metrics[name].value(), plain[1][name].value(), rtol=1e-4, atol=1e-5)
        assert metrics[name].weight == plain[1][name].weight == 16


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_the_gradient_does_not_depend_on_the_mesh(plain, shape):
    new, metrics, _ = _update(make_mesh(*shape))
    _assert_close(_gradient(new), _gradient(plain[0]), "mesh")
    np.testing.assert_allclose(metrics["loss"].value(), plain[1]["loss"].value(), rtol=1e-4)


def test_the_gradient_does_not_depend_on_prompt_sharing(one):
    shared, _, a = _update(one, order="given")
    repeated, _, b = _update(one, order="given", share_prompt=False)
    assert sorted(a.ids) == sorted(b.ids)
    _assert_close(_gradient(repeated), _gradient(shared), "microbatch")


def test_the_last_partial_batch_weighs_only_its_real_pairs(one):
    new, metrics, batch = _update(one, batch_of=1)
    assert metrics["loss"].weight == 8
    assert len(batch.ids) == 8
    alone = PairLoader([p for p in _pairs(24) if p.item.id in batch.ids], Layout(T), batch_size=8, seed=0)
    again, _, _ = _update(one, loader=alone)
    _assert_close(_gradient(new), _gradient(again), "microbatch")


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_steps_downhill_on_its_own_batch(one, loss):
    group = TrainGroup(learning_rate=1e-3, warmup_ratio=0.0, lr_scheduler_type="constant")
    optimizer = make_optimizer(group, 10)
    loader = _loader(one, 1)
    before, metrics, _ = _update(one, loss=loss, loader=loader, optimizer=optimizer)
    _, after, _ = _update(one, loss=loss, loader=loader, optimizer=optimizer, params=before.params)
    assert np.isfinite(metrics["loss"].value())
    assert after["loss"].value() < metrics["loss"].value()


def test_a_batch_that_is_not_finite_changes_nothing_and_stops_all_later_steps(one):
    optimizer = optax.adam(1e-3)
    loader = _loader(one, 1)
    state = abstract_state(CFG, optimizer, one)
    objective = align_objective(CFG, resolve("dpo"), window=T, chunk_tokens=64, shards=1)
    step = make_step(objective, optimizer, state, one)
    start = init_state(jax.device_put(_params()), optimizer.init(jax.device_put(_params())))
    good, bad = loader.batch(0).arrays, loader.batch(1).arrays
    bad = dataclasses.replace(bad, ref_logp=np.full_like(bad.ref_logp, np.nan))
    state_1, _ = step(start, place_batch(good, 1, one))
    expected = jax.device_get(state_1)
    state_2, _ = step(state_1, place_batch(bad, 1, one))
    state_3, _ = step(state_2, place_batch(good, 1, one))
    assert not bool(state_3.ok)
    assert int(state_3.step) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state_3.params), expected.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state_3.opt_state), expected.opt_state)


@functools.cache
def _choosy():
    """Adam on the mean squared distance to the batch, of updates whose loss is at most 1 only."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    optimizer = optax.adam(0.1)

    def objective(params, batch):
        loss = Mean.of(jax.numpy.square(params["w"] - batch), jax.numpy.ones_like(batch))
        return loss.total, loss.weight, {"loss": loss}

    def start():
        params = {"w": jax.numpy.zeros(3)}
        return init_state(params, optimizer.init(params))

    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), jax.eval_shape(start)
    )
    step = make_step(objective, optimizer, state, mesh, lambda metrics: metrics["loss"].total <= metrics["loss"].weight)
    return jax.jit(start), step


def _steps(state, *distances):
    """The states and metrics after batches [A=2, R=2, 3] at these distances from 0, one after the other."""
    out = []
    for distance in distances:
        state, metrics = _choosy()[1](state, np.full((2, 2, 3), distance, np.float32))
        out.append(jax.device_get((state, metrics)))
        state = jax.device_put(out[-1][0])
    return out


def test_an_update_that_is_not_accepted_leaves_the_state_as_it_is_and_stops_none_after_it():
    (one, taken), (two, refused), (three, again) = _steps(_choosy()[0](), 0.5, 3.0, 0.5)
    assert [float(m["accepted"]) for m in (taken, refused, again)] == [1.0, 0.0, 1.0]
    jax.tree.map(np.testing.assert_array_equal, two, one)  # parameters, moments, their count, step, ok
    assert (int(one.step), int(two.step), int(three.step)) == (1, 1, 2)
    assert all(bool(state.ok) for state in (one, two, three))
    # the metrics are those of the parameters that stay
    np.testing.assert_allclose(refused["loss"].value(), np.mean(np.square(3.0 - one.params["w"])), rtol=1e-5)
    # the one after it is as if the refused batch had not been
    jax.tree.map(np.testing.assert_array_equal, three, _steps(_choosy()[0](), 0.5, 0.5)[1][0])


def test_a_batch_that_is_not_finite_is_not_accepted_and_says_that_the_state_is_not_ok():
    for bad in (np.nan, np.inf):
        (one, _), (two, refused), (three, later) = _steps(_choosy()[0](), 0.5, bad, 0.5)
        assert float(refused["accepted"]) == float(later["accepted"]) == 0.0
        assert bool(one.ok) and not bool(two.ok) and not bool(three.ok)
        for state in (two, three):
            jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (one.params, one.opt_state))
            assert int(state.step) == 1


def test_a_step_that_may_not_refuse_says_nothing_of_acceptance(plain):
    assert "accepted" not in plain[1]


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "lion"])
def test_an_update_of_bfloat16_parameters_keeps_every_dtype_and_float32_optimiser_state(one, optim):
    cfg = dataclasses.replace(CFG, param_dtype="bfloat16")
    optimizer = make_optimizer(TrainGroup(optim=optim), 10)
    state = abstract_state(cfg, optimizer, one)
    objective = align_objective(cfg, resolve("dpo"), window=T, chunk_tokens=64, shards=1)
    batch = jax.tree.map(lambda x: x[None], _loader(one, 1).batch(0).arrays)
    after, _ = jax.eval_shape(make_step(objective, optimizer, state, one), state, batch)
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (state, after)]
    assert dtypes[0] == dtypes[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jax.numpy.dtype("bfloat16")}
    floats = {x.dtype for x in jax.tree.leaves(after.opt_state) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating)}
    assert floats == {np.dtype(np.float32)}


@pytest.mark.parametrize("optim", ["adamw", "adafactor", "lion"])
def test_every_optimiser_steps_on_a_sharded_mesh_as_on_one_device(one, optim):
    optimizer = make_optimizer(TrainGroup(learning_rate=1e-2, optim=optim, warmup_ratio=0.0), 10)
    plain_, _, _ = _update(one, optimizer=optimizer)
    spread, _, _ = _update(make_mesh(2, 2, 2), optimizer=optimizer)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), _params(), plain_.params)
    assert all(x > 0 for x in jax.tree.leaves(moved))
    # the sign rules of these optimisers magnify rounding where a gradient is nearly 0: compare in the mean
    off = jax.tree.map(lambda a, b: np.abs(a - b).mean(), plain_.params, spread.params)
    assert max(jax.tree.leaves(off)) < 1e-3


def test_sft_averages_over_tokens_whatever_the_microbatches(one):
    items = [Item(p.item.id, p.item.prompt, p.item.responses[:1]) for p in _pairs(16)]
    optimizer = optax.sgd(1.0)
    state = abstract_state(CFG, optimizer, one)
    step = make_step(sft_objective(CFG, window=T, chunk_tokens=64, shards=1), optimizer, state, one)
    results = []
    for microbatches in (1, 4):
        loader = ItemLoader(items, Layout(T, microbatches=microbatches), batch_size=16, seed=0)
        start = init_state(jax.device_put(_params()), optimizer.init(_params()))
        new, metrics = step(start, place_batch(loader.batch(0).arrays, microbatches, one))
        assert metrics["loss"].weight == sum(len(i.responses[0]) for i in items)
        results.append(_gradient(jax.device_get(new)))
    _assert_close(results[1], results[0], "microbatch")


def test_what_is_frozen_is_seen_gets_no_gradient_and_takes_no_optimiser_state(one, plain):
    """The gradient of the part that is trained is that part of the whole gradient."""
    pattern = r"layers/.*|final_norm/.*"

    def part(params):
        return split(params, pattern)[0]

    optimizer = optax.adam(1.0)
    moments = abstract_state(CFG, optimizer, one, part).opt_state[0].mu
    assert jax.tree.structure(moments) == jax.tree.structure(part(_params()))

    optimizer = optax.sgd(1.0)
    trained, frozen = split(jax.device_put(_params(), replicated(one)), pattern)
    objective = align_objective(CFG, resolve("dpo"), window=T, chunk_tokens=64, shards=1)
    step = make_step(objective, optimizer, abstract_state(CFG, optimizer, one, part), one)
    with jax.set_mesh(one):
        start = jax.jit(lambda p: init_state(p, optimizer.init(p)))(trained)
        new, metrics = step(start, place_batch(_loader(one, 1).batch(0).arrays, 1, one), frozen)
    gradient = jax.tree.map(lambda a, b: a - b, part(_params()), jax.device_get(new.params))
    _assert_close(gradient, part(_gradient(plain[0])), "microbatch")
    np.testing.assert_allclose(metrics["loss"].value(), plain[1]["loss"].value(), rtol=1e-6)


def test_the_schedule_warms_up_from_the_first_update_and_decays_to_zero():
    group = TrainGroup(learning_rate=1.0, warmup_ratio=0.1, lr_scheduler_type="linear")
    rate = schedule(group, 100)
    assert [round(float(rate(i)), 4) for i in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(0.0)
    cosine = schedule(dataclasses.replace(group, lr_scheduler_type="cosine", warmup_ratio=0.0), 100)
    assert float(cosine(50)) == pytest.approx(0.5)
    assert float(schedule(dataclasses.replace(group, lr_scheduler_type="constant"), 100)(99)) == 1.0
