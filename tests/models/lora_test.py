"""Adapters: nothing where they are off, a low-rank change of the kernels where they are on, and PEFT's folder."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.core import Rows
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import hidden_states, init_params
from sera_jax.models.lora import Lora, dropped, dropping, init_adapters, merged
from sera_jax.models.parts import joined, merge, nested, paths
from sera_jax.models.peft import kernels_of, load_adapter, save_adapter
from sera_jax.models.trained import Trained, laid_over

CFG = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.3,
    lora_scale=2.0,
)
LORA = Lora(4, 8.0, kernels_of(CFG, ("all-linear",)))


def tokens():
    ids = np.random.default_rng(0).integers(0, 24, (2, 7)).astype(np.int32)
    none = np.zeros((2, 1), np.int32)
    at = np.tile(np.arange(7, dtype=np.int32), (2, 1))
    return Rows(ids, at, np.ones_like(ids), np.zeros_like(ids), none, none, none + 1, 1)


@pytest.fixture(scope="module")
def base():
    return init_params(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def adapters(base):
    """With b drawn, too."""
    fresh = paths(init_adapters(LORA, base, jax.random.key(1)))
    return nested(
        {p: 0.1 * jax.random.normal(jax.random.key(2), x.shape) if p.endswith("_b") else x for p, x in fresh.items()}
    )


def run(params, cfg=CFG):
    return np.asarray(hidden_states(cfg, params, tokens()))


def test_fresh_adapters_and_those_of_alpha_0_change_nothing(base, adapters):
    alone = run(base)
    np.testing.assert_array_equal(run(merge(base, init_adapters(LORA, base, jax.random.key(1)))), alone)
    np.testing.assert_array_equal(run(merge(base, adapters), dataclasses.replace(CFG, lora_scale=0.0)), alone)
    assert np.abs(run(merge(base, adapters)) - alone).max() > 1e-2


def test_merged_is_applied_and_each_kernel_has_moved_by_the_scaled_product(base, adapters):
    whole = merge(base, adapters)
    out = merged(CFG, whole)
    assert paths(out).keys() == paths(base).keys()
    np.testing.assert_allclose(run(out), run(whole), atol=2e-5)
    for path in LORA.kernels:
        a, b = (np.asarray(paths(adapters)[path.replace("kernel", name)], np.float64) for name in ("lora_a", "lora_b"))
        np.testing.assert_allclose(paths(out)[path] - paths(base)[path], 2 * a @ b, atol=1e-6)


def test_gradients_of_adapters_are_those_of_the_kernel_through_the_product(base, adapters):
    def loss(params):
        return jnp.sum(jnp.sin(hidden_states(CFG, params, tokens())))

    of_parts = paths(jax.grad(lambda part: loss(merge(base, part)))(adapters))
    of_kernels = paths(jax.grad(loss)(merged(CFG, merge(base, adapters))))
    for path in LORA.kernels:
        beside = path.removesuffix("kernel")
        a, b = (np.asarray(paths(adapters)[beside + name]) for name in ("lora_a", "lora_b"))
        full = np.asarray(of_kernels[path])
        np.testing.assert_allclose(of_parts[beside + "lora_a"], 2 * full @ b.swapaxes(1, 2), rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(of_parts[beside + "lora_b"], 2 * a.swapaxes(1, 2) @ full, rtol=2e-3, atol=2e-4)


def test_a_part_holds_what_moves_and_lies_over_the_rest(base):
    whole = Trained(lora=LORA).adapted(base, jax.random.key(1))
    part, frozen = Trained(lora=LORA).divide(whole)
    assert all(path.endswith(("lora_a", "lora_b")) for path in paths(part))
    assert paths(laid_over(part, base)).keys() == paths(whole).keys()
    assert all(paths(frozen)[path] is leaf for path, leaf in paths(base).items()), "no copy of the base"
    assert paths(Trained((".*norm/scale",)).divide(base)[0]).keys() == {p for p in paths(base) if "norm" in p}
    assert Trained().divide(base) == (base, {})


def test_adapters_do_not_depend_on_what_else_is_adapted(base):
    some = Lora(4, 8.0, kernels_of(CFG, ("q_proj", "up_proj")))
    fewer = paths(init_adapters(some, base, jax.random.key(1)))
    more = paths(init_adapters(LORA, base, jax.random.key(1)))
    assert len(fewer) == 4
    assert all((leaf == more[path]).all() for path, leaf in fewer.items())


def test_scale_is_alpha_over_rank_or_over_its_root():
    assert Lora(4, 8.0, ()).scale == 2
    assert Lora(4, 8.0, (), use_rslora=True).scale == 4


def test_a_target_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"'w_proj' names no linear layer; .*q_proj.*down_proj"):
        kernels_of(CFG, ("q_proj", "w_proj"))
    with pytest.raises(ValueError, match="in some layers only"):
        kernels_of(CFG, ("model.layers.0.mlp.up_proj",))


def test_a_peft_folder_holds_the_adapters_to_the_bit(base, adapters, tmp_path):
    folder = save_adapter(tmp_path / "out", CFG, LORA, adapters, base="base")
    lora, back = load_adapter(folder, CFG)
    assert lora == LORA
    assert all((paths(back)[path] == leaf).all() for path, leaf in paths(adapters).items())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8.0, "CAUSAL_LM")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora=True is not supported"):
        load_adapter(folder, CFG)


def test_dropout_keeps_the_mean_and_is_drawn_for_every_layer_and_kernel_anew():
    x = jnp.ones((200, 50))
    out = np.asarray(dropped(x, jax.random.key_data(jax.random.key(0)), 0.25))
    assert set(np.unique(out)) == {0, np.float32(1 / 0.75)}
    assert out.mean() == pytest.approx(1, abs=0.02)
    two = dataclasses.replace(CFG, num_hidden_layers=2)
    keyed = paths(dropping(LORA, init_params(two, jax.random.key(0)), jax.random.key(1)))
    keys = np.concatenate([leaf for path, leaf in keyed.items() if path.endswith("lora_key")])
    assert len(np.unique(keys, axis=0)) == len(keys) == 2 * len(LORA.kernels)


def test_dropout_touches_adapters_alone_and_follows_its_key(base, adapters):
    cfg = dataclasses.replace(CFG, lora_dropout=0.5)
    whole = merge(base, adapters)
    fresh = merge(base, init_adapters(LORA, base, jax.random.key(1)))
    one, other = (functools.partial(dropping, LORA, key=jax.random.key(i)) for i in (1, 2))
    np.testing.assert_array_equal(run(one(fresh), cfg), run(base), err_msg="b is 0: there is nothing to drop")
    np.testing.assert_array_equal(run(one(whole), cfg), run(one(whole), cfg))
    assert np.abs(run(one(whole), cfg) - run(other(whole), cfg)).max() > 1e-2
    np.testing.assert_array_equal(run(whole, cfg), run(whole), err_msg="without a key nothing is dropped")


DEEP = dataclasses.replace(CFG, num_hidden_layers=4)


@pytest.mark.parametrize("remat", ["none", "groups"])
@pytest.mark.parametrize("pattern", ["layers/(2|3)/.*", "layers/3/(q|up)/kernel", "layers/[0-3]/.*"])
def test_last_layers_move_alone_and_the_model_stays_the_same_function(pattern, remat):
    cfg = dataclasses.replace(DEEP, remat=remat)
    whole = init_params(cfg, jax.random.key(3))
    part, frozen = Trained((pattern,)).divide(whole)
    assert all(leaf is paths(whole)[path] for path, leaf in paths(frozen).items()), "no copy of what does not move"
    np.testing.assert_allclose(run(merge(part, frozen), cfg), run(whole, cfg), atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, joined(laid_over(part, whole)), whole)

    moved = jax.tree.map(lambda x: x + 1, part)
    again, rest = Trained((pattern,)).divide(laid_over(moved, whole))
    jax.tree.map(np.testing.assert_array_equal, (again, rest), (moved, frozen))
    whole_again, nothing = Trained((".*",)).divide(laid_over(moved, whole))
    assert not nothing
    jax.tree.map(np.testing.assert_array_equal, whole_again, joined(laid_over(moved, whole)))

    def loss(params):
        return jnp.sum(jnp.sin(hidden_states(cfg, params, tokens())))

    found = paths(jax.grad(lambda moving: loss(merge(moving, frozen)))(part))
    wanted = paths(jax.grad(loss)(whole))
    for path, leaf in found.items():
        of_all = wanted[path.replace("/last/", "/block/")]
        np.testing.assert_allclose(leaf, of_all[-leaf.shape[0] :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["layers/0/.*", "layers/(1|3)/.*", "layers/3/q/kernel|layers/(2|3)/up/kernel"])
def test_layers_that_are_not_the_last_are_refused(pattern):
    with pytest.raises(ValueError, match="only the last layers can be trained alone, and as many of each"):
        Trained((pattern,)).divide(init_params(DEEP, jax.random.key(0)))
