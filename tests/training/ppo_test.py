"""PPO's updates: the policy gradient, plain regression, their sum; whatever the microbatches, mesh and layout."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sera_jax.config import PpoGroup, RewardGroup, TrainGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout, RowSpec, build_rows, pack
from sera_jax.data.planning import deal_rows
from sera_jax.data.rollouts import lay_rollouts, lay_token_values
from sera_jax.mesh import host_to_global, make_mesh, param_shardings, row_shards, rows_sharding
from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import HEAD, critic_config, critic_params, row_values, with_value_head, without_value_head
from sera_jax.models.decoder import init_params
from sera_jax.training.objectives import row_token_logps
from sera_jax.training.optimizer import MasterWeights
from sera_jax.training.ppo import (
    Experience,
    head_objective,
    joint_objective,
    policy_objective,
    value_objective,
)
from sera_jax.training.ppo_steps import make_programs
from sera_jax.training.rewards import Scored, coherent_reward, noise
from sera_jax.training.score import place_rows
from sera_jax.training.step import abstract_state, init_state, make_step, place_batch
from tests import oracles, ppo_oracles
from tests.tolerances import TOLERANCES

CFG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.25,
)
UNTIED = dataclasses.replace(CFG, tie_word_embeddings=False)
R, T, SPEC = 16, 32, RowSpec(32, 24, 8)
CLIP, VF, ENTROPY, SCALE = 0.2, 0.3, 0.05, 2.0
FIELDS = ("old_logp", "sft_logp", "advantage", "old_value", "returns")
HOW = dict(window=T, chunk_tokens=1024, cliprange=CLIP)
OBJECTIVES = {
    "policy": lambda shards: policy_objective(CFG, shards=shards, entropy_coef=0.0, kl_estimator="k2", **HOW),
    "value": lambda shards: value_objective(critic_config(UNTIED), window=T, cliprange_value=CLIP),
    "joint": lambda shards: joint_objective(
        CFG, shards=shards, cliprange_value=CLIP, vf_coef=VF, entropy_coef=ENTROPY, kl_estimator="k3", **HOW
    ),
    "head": lambda shards: head_objective(CFG, window=T, cliprange_value=CLIP),
}


def close(left, right, kind):
    """Two trees of arrays."""
    tolerance = {k: TOLERANCES[kind][k] for k in ("rtol", "atol")}
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, x), y in zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right)):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


def added(*terms):
    """The sum of (weight, tree)."""
    return jax.tree.map(lambda *x: sum(w * y for (w, _), y in zip(terms, x)), *(tree for _, tree in terms))


@functools.cache
def one():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@functools.cache
def decoder():
    return jax.device_get(jax.jit(functools.partial(init_params, CFG))(key_for(0, Stream.INIT)))


@functools.cache
def with_head():
    head = np.random.default_rng(1).standard_normal(CFG.hidden_size).astype(np.float32)
    return {**decoder(), HEAD: head}


def params_of(kind):
    return decoder() if kind == "policy" else with_head()


@functools.cache
def items():
    return tuple(oracles.random_items(np.random.default_rng(0), 7, vocab=32, prompt=(1, 6), response=(1, 6)))


def lay(*, share_prompt=True, apart=False, groups=1):
    """All items in R rows of T tokens: packed, or each in a row of its own. The rest of the rows is empty.

    `groups`: equal parts of the rows (microbatches x devices) that the filled ones are dealt over.
    """
    assignment = [[i] for i in range(len(items()))] if apart else pack(items(), T, share_prompt, SPEC)
    return build_rows(items(), deal_rows(assignment, [1] * len(assignment), groups, R), SPEC, R, share_prompt)


def used(packed):
    return packed.rows.slot < SPEC.slots


TOKENS = sum(len(r) for item in items() for r in item.responses)


@functools.cache
def scorers():
    """Token log-probs, values, and the gradient of any weighted sum of either: one compilation each for all tests."""
    logps = functools.partial(row_token_logps, CFG, window=T, chunk_tokens=1024, shards=1)
    values = functools.partial(row_values, CFG, window=T)
    return {
        "logp": jax.jit(lambda params, rows: logps(params, rows)),
        "value": jax.jit(lambda params, rows: values(params, rows)),
        "logp_gradient": jax.jit(jax.grad(lambda params, rows, w: jnp.sum(w * logps(params, rows)))),
        "value_gradient": jax.jit(jax.grad(lambda params, rows, w: jnp.sum(w * values(params, rows)))),
    }


def told(name, kind="logp"):
    """What the policy (its value head) says of every scored token of the packed layout, f32[R, M]."""
    return np.asarray(scorers()[kind](decoder() if kind == "logp" else with_head(), name.rows))


def reference(kind, packed, weights):
    """Gradient of sum(weights * log-prob) or of sum(weights * value), of the tree that has the head in any case."""
    return jax.device_get(scorers()[f"{kind}_gradient"](params_of("joint"), packed.rows, np.float32(weights)))


def by_item(packed, laid):
    """Laid values f32[R, M] by item and response: what lay_token_values lays."""
    out = [[None] * len(item.responses) for item in items()]
    for r, k in np.argwhere(packed.item >= 0):
        out[packed.item[r, k]][packed.response[r, k]] = laid[r, packed.rows.slot[r] == k]
    return out


@functools.cache
def drawn():
    """Per item and response: an experience in which some ratios and values are cut and some are not."""
    rng = np.random.default_rng(2)
    packed = lay()
    shape = packed.rows.slot.shape
    logp, value = told(packed), told(packed, "value")
    fields = dict(
        old_logp=logp + 0.25 * rng.standard_normal(shape),
        sft_logp=logp + 0.5 * rng.standard_normal(shape),
        advantage=rng.standard_normal(shape),
        old_value=value + 0.25 * rng.standard_normal(shape),
        returns=value + rng.standard_normal(shape),
    )
    return {name: by_item(packed, x.astype(np.float32)) for name, x in fields.items()}


def experience(packed, kl_coef=0.0, **fields):
    """The drawn experience in this layout, with some fields replaced by laid ones f32[R, M]."""
    laid = {name: lay_token_values(packed, values) for name, values in drawn().items()}
    return Experience(
        rows=packed.rows,
        **laid | fields,
        kl_coef=np.full(R, kl_coef, np.float32),
        value_scale=np.full(R, SCALE, np.float32),
    )


@functools.cache
def step_of(kind, mesh, optimizer_rate=1.0):
    optimizer = optax.sgd(optimizer_rate)
    cfg, of_params = (UNTIED, critic_params) if kind == "value" else (CFG, lambda p: p)
    if kind in ("joint", "head"):
        of_params = with_value_head
    state = abstract_state(cfg, optimizer, mesh, of_params)
    return optimizer, make_step(OBJECTIVES[kind](row_shards(mesh)), optimizer, state, mesh)


def update(kind, batch, mesh=None, microbatches=1, params=None):
    """The gradient and the metrics: SGD of rate 1, so the difference of parameters is the gradient."""
    mesh = mesh or one()
    optimizer, step = step_of(kind, mesh)
    before = params_of(kind) if params is None else params
    placed = host_to_global(before, param_shardings(mesh, before))
    zero = host_to_global(np.int32(0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    yes = host_to_global(np.bool_(True), zero.sharding)
    state = dataclasses.replace(init_state(placed, optimizer.init(placed)), step=zero, ok=yes)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        after, metrics = step(state, place_batch(batch, microbatches, mesh))
    after, metrics = jax.device_get((after, metrics))
    return jax.tree.map(lambda a, b: a - b, before, after.params), metrics


@functools.cache
def plain():
    """The joint gradient of the drawn experience, packed, in one batch on one device."""
    return update("joint", experience(lay(), kl_coef=0.1))


# ---- what the gradient is


def test_the_first_step_is_the_policy_gradient():
    packed = lay()
    batch = experience(packed, old_logp=told(packed))
    got, metrics = update("policy", batch)
    close(got, without_value_head(reference("logp", packed, -batch.advantage / TOKENS)), "microbatch")
    assert metrics["loss"].weight == TOKENS
    assert metrics["policy/clipfrac_avg"].total == 0
    assert metrics["policy/approxkl_avg"].value() < 1e-10  # scorer and update are two programs: not the same bits
    np.testing.assert_allclose(metrics["val/ratio"].value(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/policy_avg"].total, -batch.advantage.sum(), rtol=1e-5)


def test_a_later_step_weighs_each_token_by_its_ratio_and_drops_the_clipped_ones():
    packed = lay()
    batch = experience(packed)
    got, metrics = update("policy", batch)
    ratio = np.exp(told(packed).astype(np.float64) - batch.old_logp)
    cases = np.vectorize(lambda r, a: ppo_oracles.policy_loss(r, a, CLIP))(ratio, batch.advantage)
    loss, slope = (np.where(used(packed), x, 0.0) for x in cases)
    close(got, without_value_head(reference("logp", packed, slope / TOKENS)), "microbatch")
    cut = used(packed) & (slope == 0)
    assert 0.1 < cut.sum() / TOKENS < 0.5
    for name, want in {
        "loss": loss,
        "policy/clipfrac_avg": cut,
        "policy/approxkl_avg": np.log(ratio) ** 2 / 2,
        "val/ratio": ratio,
        "val/ratio_squared": ratio**2,
    }.items():
        np.testing.assert_allclose(metrics[name].value(), want[used(packed)].mean(), rtol=1e-4, err_msg=name)


def test_a_kl_in_the_loss_pulls_towards_the_sft_model_in_proportion_to_its_coefficient():
    packed = lay()
    still = dict(old_logp=told(packed), advantage=np.zeros_like(told(packed)))
    d = np.where(used(packed), told(packed) - experience(packed).sft_logp, 0.0)
    for coef in (0.5, 1.0):
        got, metrics = update("policy", experience(packed, coef, **still))
        close(got, without_value_head(reference("logp", packed, coef * d / TOKENS)), "microbatch")  # of d^2 / 2
        np.testing.assert_allclose(metrics["loss"].value(), coef * np.sum(d**2) / 2 / TOKENS, rtol=1e-4)
    # k3's slope is 1 - exp(-d); everything else of the joint loss is the same at any coefficient
    weak, strong = (update("joint", experience(packed, coef))[0] for coef in (0.5, 1.0))
    slope = np.where(used(packed), -np.expm1(-d), 0.0)
    close(added((2.0, strong), (-2.0, weak)), reference("logp", packed, slope / TOKENS), "mesh")


@pytest.mark.parametrize("kind", ["policy", "joint"], ids=["k2", "k3"])
def test_a_kl_in_the_loss_has_no_slope_where_the_policy_is_the_sft_model(kind):
    packed = lay()
    at_sft = dict(sft_logp=told(packed))
    without, with_kl = (update(kind, experience(packed, coef, **at_sft)) for coef in (0.0, 10.0))
    close(with_kl[0], without[0], "microbatch")
    np.testing.assert_allclose(with_kl[1]["loss"].value(), without[1]["loss"].value(), rtol=1e-5)


def test_the_critic_is_plainly_regressed_on_the_returns_where_nothing_is_cut():
    packed = lay()
    value = told(packed, "value")
    batch = experience(packed, old_value=value)
    error = np.where(used(packed), value.astype(np.float64) - batch.returns, 0.0)
    got, metrics = update("value", batch)
    close(got, reference("value", packed, error / SCALE**2 / TOKENS), "microbatch")
    np.testing.assert_allclose(metrics["loss/value_avg"].value(), np.sum((error / SCALE) ** 2) / 2 / TOKENS, rtol=1e-5)
    assert metrics["val/clipfrac_avg"].total == 0
    assert metrics["loss"].total == metrics["loss/value_avg"].total and metrics["loss"].weight == TOKENS


def test_a_value_that_is_cut_has_no_slope():
    packed = lay()
    batch = experience(packed)
    cases = np.vectorize(lambda *x: ppo_oracles.value_loss(*x, CLIP, SCALE))(
        told(packed, "value"), batch.old_value, batch.returns
    )
    loss, slope = (np.where(used(packed), x, 0.0) for x in cases)
    got, metrics = update("value", batch)
    close(got, reference("value", packed, slope / TOKENS), "microbatch")
    np.testing.assert_allclose(metrics["loss"].value(), loss.sum() / TOKENS, rtol=1e-5)
    assert 0 < metrics["val/clipfrac_avg"].value() < 0.6


def only_entropy():
    packed = lay()
    value = told(packed, "value")
    return experience(packed, advantage=np.zeros_like(value), old_value=value, returns=value)


def test_the_joint_gradient_is_the_policys_and_vf_coef_times_the_values_on_the_shared_trunk():
    packed = lay()
    value, logp = told(packed, "value"), told(packed)
    batch = experience(packed, old_logp=logp, old_value=value)
    got, metrics = update("joint", batch)
    of_entropy, alone = update("joint", only_entropy())
    of_policy = reference("logp", packed, -batch.advantage / TOKENS)
    of_value = reference("value", packed, np.where(used(packed), value - batch.returns, 0.0) / SCALE**2 / TOKENS)
    close(got, added((1.0, of_policy), (VF, of_value), (1.0, of_entropy)), "microbatch")
    trunk = without_value_head(of_value)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(trunk))  # the value reaches all of the trunk
    assert not of_policy[HEAD].any()
    parts = metrics["loss/policy_avg"].value(), VF * metrics["loss/value_avg"].value(), alone["loss"].value()
    np.testing.assert_allclose(metrics["loss"].value(), sum(parts), rtol=1e-5)
    assert metrics["loss"].weight == TOKENS


def test_the_entropy_bonus_raises_the_entropy():
    gradient, before = update("joint", only_entropy())
    np.testing.assert_allclose(before["loss"].value(), -ENTROPY * before["policy/entropy_avg"].value(), rtol=1e-5)
    size = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(gradient)))
    stepped = jax.tree.map(lambda p, g: p - 0.01 / size * g, with_head(), gradient)
    _, after = update("joint", only_entropy(), params=stepped)
    rise = after["policy/entropy_avg"].value() - before["policy/entropy_avg"].value()
    np.testing.assert_allclose(rise, 0.01 * size / ENTROPY, rtol=0.1)  # to first order


def test_the_warm_up_of_a_head_moves_nothing_else():
    packed = lay()
    value = told(packed, "value")
    batch = experience(packed, old_value=value)
    got, metrics = update("head", batch)
    of_value = reference("value", packed, np.where(used(packed), value - batch.returns, 0.0) / SCALE**2 / TOKENS)
    np.testing.assert_allclose(got[HEAD], of_value[HEAD], rtol=1e-4, atol=1e-6)
    assert got[HEAD].all()
    assert not any(x.any() for x in jax.tree.leaves(without_value_head(got)))
    assert metrics["loss"].weight == TOKENS


# ---- what it does not depend on


def assert_same(got, kind):
    (gradient, metrics), (want, want_metrics) = got, plain()
    close(gradient, want, kind)
    assert metrics.keys() == want_metrics.keys()
    for name, value in want_metrics.items():
        if name == "grad_norm":
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4)
        else:
            assert metrics[name].weight == value.weight == TOKENS
            np.testing.assert_allclose(metrics[name].value(), value.value(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_gradient_does_not_depend_on_the_microbatches():
    assert_same(update("joint", experience(lay(groups=4), kl_coef=0.1), microbatches=4), "microbatch")


@pytest.mark.parametrize(("shape", "microbatches"), [((8, 1, 1), 1), ((2, 2, 2), 2), ((1, 4, 2), 1)])
def test_the_gradient_depends_neither_on_the_mesh_nor_on_its_microbatches(shape, microbatches):
    mesh = make_mesh(*shape)
    batch = experience(lay(groups=microbatches * row_shards(mesh)), kl_coef=0.1)
    assert_same(update("joint", batch, mesh, microbatches), "mesh")


@pytest.mark.parametrize("layout", [dict(share_prompt=False), dict(apart=True)], ids=str)
def test_the_gradient_depends_neither_on_prompt_sharing_nor_on_the_rows_that_items_lie_in(layout):
    """The layouts have other unused columns and empty rows, too."""
    packed = lay(**layout)
    assert (packed.item < 0).all(axis=1).any() and not np.array_equal(packed.rows.slot, lay().rows.slot)
    assert_same(update("joint", experience(packed, kl_coef=0.1)), "microbatch")


def test_what_unused_columns_and_empty_rows_hold_reaches_neither_gradient_nor_metrics():
    packed = lay()
    clean = experience(packed, kl_coef=0.1)
    junk = {name: np.where(used(packed), getattr(clean, name), 1e3).astype(np.float32) for name in FIELDS}
    empty = ~used(packed).any(axis=1)
    assert empty.any()
    got = update("joint", dataclasses.replace(clean, **junk, kl_coef=np.where(empty, np.nan, clean.kl_coef)))
    assert_same(got, "exact")


# ---- the programs of an iteration


GROUPS = dict(
    reward=coherent_reward(RewardGroup()),
    train=TrainGroup(
        learning_rate=1e-2,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        logits_chunk_tokens=1024,
    ),
    window=T,
)
PPO = {
    "model": PpoGroup(iterations=3, num_mini_batches=2, critic_learning_rate=2e-2, ratio_limit=1.02, target_kl=0.5),
    "head": PpoGroup(iterations=3, num_mini_batches=2, critic="head"),
}


@functools.cache
def programs(critic, mesh, baseline="critic"):
    return make_programs(CFG, mesh, ppo=PPO[critic], baseline=baseline, **GROUPS)


@functools.cache
def eight():
    return make_mesh(2, 2, 2)


def on_mesh(mesh, params):
    return host_to_global(params, param_shardings(mesh, params))


@functools.cache
def base():
    return jax.device_get(jax.jit(functools.partial(init_params, CFG))(key_for(1, Stream.INIT)))


def rollouts(mesh):
    """Two minibatches of 16 random responses, and the rows of each on the mesh."""
    rng = np.random.default_rng(5)
    some = [
        Item(f"r{i}", rng.integers(1, 32, 3).astype(np.int32), (rng.integers(1, 32, 1 + i % 6).astype(np.int32),))
        for i in range(16)
    ]
    # as many rows on every mesh, so that all compute the same
    parts = lay_rollouts(some, 2, Layout(T, shards=8), seed=0, iteration=1)
    return parts, [place_rows(part.rows, mesh) for part in parts]


@functools.cache
def iteration(critic, mesh):
    """A state before the first iteration, its experience, the control after it and its metrics: every transfer made
    beforehand. The sampler is taken at its word: its log-probs are the scorer's."""
    made = programs(critic, mesh)
    parts, rows = rollouts(mesh)
    sft, other = on_mesh(mesh, decoder()), on_mesh(mesh, base())
    host = [dict(finished=part.item >= 0, given=np.zeros(part.item.shape, np.float32)) for part in parts]
    placed = [host_to_global(x, rows_sharding(mesh)) for x in host]
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        state = made.start(sft)
        policy = without_value_head(state.policy.params)
        values_of = state.policy.params if state.critic is None else state.critic.params
        scored = []
        for row, rest in zip(rows, placed):
            logp = made.score(policy, row)
            scored.append(
                Scored(
                    rows=row,
                    logp=logp,
                    sft_logp=made.score(sft, row),
                    base_logp=made.score(other, row),
                    sampled_logp=logp,
                    value=made.values(values_of, row),
                    **rest,
                )
            )
        experience, control, metrics = made.experience(scored, state.control)
    laid = sum(int((part.rows.segment > 0).sum()) for part in parts)
    return state, experience, jax.device_get(control), jax.device_get(metrics), laid


def take(step, state, batch, mesh):
    """The state and metrics after an update, on the host; the given state stays."""
    copy = jax.tree.map(lambda x: x.copy(), state)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        return jax.device_get(step(copy, batch))


@pytest.mark.parametrize(("critic", "baseline"), [("model", "critic"), ("head", "critic"), ("model", "batch_mean")])
def test_the_state_that_iterations_start_from_has_the_abstract_shapes_and_shardings(critic, baseline):
    made = programs(critic, eight(), baseline)
    params = on_mesh(eight(), decoder())
    with jax.set_mesh(eight()), jax.transfer_guard("disallow"):
        state = made.start(params)
    assert jax.tree.structure(state) == jax.tree.structure(made.abstract)
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(made.abstract)):
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    assert (state.critic is None) == ((critic, baseline) != ("model", "critic"))
    assert (HEAD in state.policy.params) == (critic == "head")
    assert (made.values is None) == (made.critic_step is None) == (baseline != "critic")
    split = state.policy.opt_state[1][0].mu["layers"]["block"]["q"]["kernel"]
    assert split.sharding.shard_shape(split.shape)[1:] == (split.shape[1] // 2, split.shape[2] // 2)


@pytest.mark.parametrize("critic", ["model", "head"])
def test_policy_and_critic_in_bfloat16_start_with_master_copies_of_both_unless_told_otherwise(critic):
    cfg, params = (
        dataclasses.replace(CFG, param_dtype="bfloat16"),
        jax.tree.map(lambda p: p.astype(jnp.bfloat16), base()),
    )
    for wanted in (True, False):
        groups = GROUPS | {"train": dataclasses.replace(GROUPS["train"], master_weights=wanted)}
        made = make_programs(cfg, one(), ppo=PPO[critic], **groups)
        with jax.set_mesh(one()):
            state = jax.device_get(made.start(on_mesh(one(), params)))
        assert jax.tree.structure(state) == jax.tree.structure(made.abstract)
        for part in filter(None, (state.policy, state.critic)):
            assert isinstance(part.opt_state, MasterWeights) == wanted
            if wanted:
                master = jax.tree.map(lambda p: p.astype(np.float32), part.params)
                jax.tree.map(np.testing.assert_array_equal, part.opt_state.master, master)


def test_the_first_state_has_buffers_of_its_own():
    params = on_mesh(eight(), decoder())
    with jax.set_mesh(eight()):
        state = programs("model", eight()).start(params)
    for leaf in jax.tree.leaves(state.policy):  # as an update does that takes over the buffers
        leaf.delete()
    assert jax.device_get(params)["embed"].any() and jax.device_get(state.critic.params)["embed"].any()


def test_an_iteration_on_eight_devices_finds_what_one_device_does_whatever_the_critic_is():
    """A critic that says 0 everywhere, be it a model or a head, changes nothing of the policy's first update."""
    _, experience, control, metrics, laid = iteration("model", eight())
    _, alone, control_alone, metrics_alone, _ = iteration("head", one())
    close(jax.device_get(experience), jax.device_get(alone), "mesh")
    assert metrics.keys() == metrics_alone.keys()
    for name, value in metrics.items():
        if not name.startswith("cost/"):  # below
            np.testing.assert_allclose(value, metrics_alone[name], rtol=1e-4, atol=1e-4, err_msg=name)
    assert metrics["objective/kl"] == metrics["rollout/decode_score_gap"] == 0.0
    # passes: decoding, three scores, the critic's values; forward and backward (two) of the policy, and of the critic
    assert control.passes_tokens == (4 + 1 + 3 + 3) * laid
    assert control_alone.passes_tokens == (4 + 1 + 3) * laid


def test_an_update_moves_policy_and_critic_at_their_own_rates():
    state, experience, *_ = iteration("model", eight())
    made = programs("model", eight())
    before = jax.device_get(state)
    policy, metrics = take(made.policy_step, state.policy, experience[0], eight())
    critic, _ = take(made.critic_step, state.critic, experience[0], eight())
    moved = [
        max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(old.params)))
        for new, old in ((policy, before.policy), (critic, before.critic))
    ]
    np.testing.assert_allclose(moved, [1e-2, 2e-2], rtol=0.01)  # Adam's first step is the rate
    assert (int(policy.step), int(critic.step), float(metrics["accepted"])) == (1, 1, 1.0)


def test_a_kl_that_the_reward_carries_is_not_in_the_loss():
    state, experience, *_ = iteration("model", eight())
    far = dataclasses.replace(experience[0], sft_logp=experience[0].sft_logp - 3)
    assert np.all(jax.device_get(far.kl_coef) > 0)
    _, metrics = take(programs("model", eight()).policy_step, state.policy, far, eight())
    assert metrics["loss"].total == metrics["loss/policy_avg"].total


@pytest.mark.parametrize(
    ("shift", "ratio", "kl"), [(-0.3, np.exp(0.3), 0.045), (2.0, np.exp(-2.0), 2.0)], ids=["ratio_limit", "target_kl"]
)
def test_an_update_past_a_limit_is_refused_and_leaves_the_policy_as_it_is(shift, ratio, kl):
    """Each limit by itself: a ratio of 1.35 at a KL below its target, and a KL of 2 at a ratio below its limit."""
    state, experience, *_ = iteration("model", eight())
    shifted = dataclasses.replace(experience[0], old_logp=experience[0].old_logp + shift)
    after, metrics = take(programs("model", eight()).policy_step, state.policy, shifted, eight())
    np.testing.assert_allclose(metrics["val/ratio"].value(), ratio, rtol=1e-4)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"].value(), kl, rtol=1e-3)
    assert float(metrics["accepted"]) == 0.0
    close(after, jax.device_get(state.policy), "exact")
    assert bool(after.ok)


def test_arms_that_compute_the_same_share_their_programs_and_no_others():
    for critic in ("model", "head"):
        first = programs(critic, eight())
        paying_noise = GROUPS | {"reward": noise(RewardGroup())}
        random = make_programs(CFG, eight(), ppo=PPO[critic], like=first, **paying_noise)
        plain_ = make_programs(CFG, eight(), ppo=PPO[critic], baseline="batch_mean", like=first, **GROUPS)
        assert random.score is plain_.score is first.score
        assert random.policy_step is first.policy_step and random.critic_step is first.critic_step
        assert (plain_.policy_step is first.policy_step) == (critic == "model")  # with a head its tree differs
        assert plain_.values is plain_.critic_step is None
        assert random.experience is not first.experience is not plain_.experience
