"""The attention back ends: which one a name stands for, and that the kernels mix what plain attention does."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from sera_jax.data.packing import build_rows, pack, spec_for
from sera_jax.mesh import AXES, make_mesh
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params, hidden_states
from sera_jax.ops import kernels
from sera_jax.ops.attention import KEPT, Places, blocked_attention
from sera_jax.ops.backends import (
    ATTENTION,
    AUTO,
    LONGEST,
    SHORT,
    Asked,
    BackEnd,
    anywhere,
    choose,
    devices,
    error_of,
)
from tests import oracles
from tests.ops.attention_test import close, mixed, places, plain_attention, random_heads, whole_mask

LENGTH = 250  # two blocks of a kernel, the second one filled up
KERNELS = {
    "splash": kernels.of_kernel(functools.partial(kernels.splash, interpret=True), kernels.LANES),
    "cudnn": kernels.of_kernel(functools.partial(kernels.dot_product, implementation="xla"), 4),
    "xla_tiles": ATTENTION["xla_tiles"].attend,
}
WANTED = Asked("tpu", "bfloat16", 128, 4096)
DEVICES = {
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
    "cuda": AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
    "gpu": AbstractDevice("AMD Instinct MI300X", 304, "gpu"),
}


def mesh_of(kind):
    return AbstractMesh((1, 1, 1), AXES, (AxisType.Auto,) * 3, abstract_device=DEVICES[kind])


@pytest.fixture(autouse=True)
def smallest_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCKS", (kernels.LANES,))


@pytest.fixture(scope="module")
def rows():
    """Rows of long and short items, some with a prompt that several answers share, and one of padding alone."""
    rng = np.random.default_rng(0)
    items = oracles.random_items(rng, 8, vocab=20, prompt=(1, 60), response=(1, 60))
    assignment = pack(items, LENGTH, True)
    rows = build_rows(items, assignment, spec_for(items, assignment, LENGTH), len(assignment) + 1, True).rows
    assert rows.branch.max() > 1, "branches that must not see each other"
    return rows


@pytest.mark.parametrize(
    ("name", "of_model"),
    [
        *((name, {}) for name in KERNELS),
        ("splash", {"sliding_window": 17, "scale": 0.7, "soft_cap": 1.5}),
        ("cudnn", {"sliding_window": 17, "scale": 0.7}),
        ("xla_tiles", {"sliding_window": 17, "scale": 0.7, "soft_cap": 1.5}),
    ],
    ids=str,
)
def test_a_kernel_mixes_exactly_the_tokens_that_may_be_seen(rows, name, of_model):
    """Values and gradients, for grouped heads, over packed rows with shared prompts and padding."""
    heads, own = random_heads(rows, depth=8), dict(of_model)
    plain = functools.partial(plain_attention, seen=whole_mask(rows, own.pop("sliding_window", None)), **own)
    kernel = functools.partial(KERNELS[name], queries=places(rows), keys=places(rows), **of_model)
    for got, want in zip(mixed(kernel, rows, heads), mixed(plain, rows, heads), strict=True):
        close(got, want, "packing")


@pytest.mark.parametrize(
    ("name", "count", "groups"), [("splash", 4, 2), ("splash", 4, 1), ("xla_tiles", 4, 2), ("xla_tiles", 3, 1)]
)
def test_each_device_computes_its_own_rows_and_heads(rows, name, count, groups):
    """With one group the heads are no multiple of the devices that share them, and are on all of them; so are three
    rows."""
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    heads = [np.resize(x, (count, *x.shape[1:])) for x in random_heads(rows, groups=groups, depth=8)]
    at = Places.in_rows(*(np.resize(x, (count, LENGTH)) for x in (rows.segment, rows.branch, rows.positions)))
    attend, plain = (functools.partial(of, queries=at, keys=at) for of in (KERNELS[name], blocked_attention))
    want = mixed(plain, at, heads)
    with jax.set_mesh(mesh):
        got, own = mixed(attend, at, heads), jax.jit(attend)(*heads)
    assert own.sharding.shard_shape(own.shape)[:2] == (2 if count == 4 else 3, 2 if groups == 2 else 4)
    for left, right in zip(got, want, strict=True):
        close(left, right, "packing")


def test_splash_names_what_it_gave_so_that_it_may_be_kept(rows):
    """Else its forward pass stands in the backward pass once more. Traced alone, of two rows: one after the other."""
    heads = [np.resize(x, (2, *x.shape[1:])) for x in random_heads(rows, depth=8)]
    at = Places.in_rows(*(np.resize(x, (2, LENGTH)) for x in (rows.segment, rows.branch, rows.positions)))

    def kernels_of(policy):
        attend = jax.checkpoint(functools.partial(KERNELS["splash"], queries=at, keys=at), policy=policy)
        return str(jax.make_jaxpr(jax.grad(lambda q, k, v: attend(q, k, v).sum()))(*heads)).count("pallas_call")

    assert 0 < kernels_of(jax.checkpoint_policies.save_only_these_names(KEPT)) < kernels_of(None)


def test_tiles_take_bfloat16_and_a_window_that_is_known_only_within_the_program(rows):
    assert error_of("xla_tiles", Asked("cpu", "bfloat16", 16, 512)) < 0.02
    heads = random_heads(rows, depth=8)
    attend = functools.partial(KERNELS["xla_tiles"], queries=places(rows), keys=places(rows))
    given = jax.jit(lambda window: attend(*heads, sliding_window=window))
    close(given(jnp.asarray(17)), attend(*heads, sliding_window=17), "packing")


@pytest.mark.parametrize("kind", DEVICES)
def test_devices_are_those_of_the_mesh_that_is_set(kind):
    assert devices(make_mesh()) == devices() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh_of(kind)):
        assert devices() == kind


@pytest.mark.parametrize(
    ("asked", "name", "why"),
    [
        ({"devices": "cpu"}, "xla_tiles", ""),
        ({"devices": "cpu", "tokens": SHORT}, "xla", ""),
        ({"devices": "cpu", "tokens": SHORT + 1}, "xla_tiles", ""),
        ({"devices": "cpu", "tokens": LONGEST + 1}, "xla", ""),
        ({"devices": "gpu"}, "xla_loop", ""),
        ({}, "splash", ""),
        ({"soft_cap": 50.0, "depth": 256, "dtype": "float32"}, "splash", ""),
        ({"dtype": "float16"}, "xla_loop", "splash computes in float32 or bfloat16"),
        ({"tokens": LONGEST + 1}, "xla_loop", f"rows of {LONGEST + 1} are above {LONGEST}: lower data.row_tokens"),
        ({"devices": "cuda"}, "cudnn", ""),
        ({"devices": "cuda", "dtype": "float32"}, "xla_loop", "set model.dtype=bfloat16"),
        ({"devices": "cuda", "soft_cap": 50.0}, "xla_loop", "no soft cap of scores, and this model's is 50.0"),
        ({"devices": "cuda", "depth": 256}, "xla_loop", "this model's have 256"),
        ({"devices": "cuda", "depth": 36}, "xla_loop", "this model's have 36"),
        ({"devices": "cuda", "tokens": LONGEST + 1}, "xla_loop", "lower data.row_tokens"),
    ],
)
def test_auto_takes_the_kernel_of_the_devices_or_says_why_not(asked, name, why):
    asked = WANTED._replace(**asked)
    found, said = choose(AUTO, asked)
    assert found == name
    assert why in said and bool(said) == bool(why)
    assert choose(name, asked) == (name, ""), "what was chosen can be named"
    if why:
        with pytest.raises(ValueError, match=r"attn_implementation='\w+' .*; or choose auto or xla_loop") as refused:
            choose(said.split()[0], asked)
        assert why.removeprefix("splash ") in str(refused.value)


@pytest.mark.parametrize(("name", "here"), [("splash", "cpu"), ("splash", "cuda"), ("cudnn", "tpu"), ("cudnn", "cpu")])
def test_a_kernel_that_is_named_is_refused_on_other_devices(name, here):
    with pytest.raises(ValueError, match=rf"{name}' runs on {ATTENTION[name].devices} devices, and these are {here};"):
        choose(name, WANTED._replace(devices=here))


def test_a_saved_model_is_opened_on_any_devices():
    assert {name: anywhere(name) for name in (AUTO, *ATTENTION)} == {
        **dict.fromkeys((AUTO, "splash", "cudnn"), AUTO),
        "xla": "xla",
        "xla_loop": "xla_loop",
        "xla_tiles": "xla_tiles",
    }


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        ("tpu", ["splash_mha_fwd_residuals", "splash_mha_dq_no_residuals", "splash_mha_dkv_no_residuals"]),
        ("cuda", ["__cudnn$fmhaScaleBiasSoftmax(", "__cudnn$fmhaScaleBiasSoftmaxBackward("]),
        ("gpu", []),
    ],
)
def test_a_model_is_lowered_to_the_kernel_of_devices_that_are_not_here(rows, kind, calls, monkeypatch):
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)  # asks the library, which only GPUs have
    cfg = ModelConfig(dtype="bfloat16")

    def total(params):
        return jnp.sum(hidden_states(cfg, params, rows).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(mesh_of(kind)):
        traced = jax.jit(jax.grad(total)).trace(abstract_params(cfg))
    text = traced.lower(lowering_platforms=("cuda" if kind == "gpu" else kind,)).as_text()
    for call in calls:
        assert call in text
    assert calls or not re.search("splash|cudnn", text)


def test_a_kernel_is_tried_by_a_row_in_which_a_wrong_mask_shows(monkeypatch):
    def without_branches(q, k, v, queries, keys, **of_model):
        keys = keys._replace(branch=0 * keys.branch)
        return KERNELS["cudnn"](q, k, v, queries, keys, **of_model)

    def error(attend):
        monkeypatch.setitem(ATTENTION, "cudnn", BackEnd(attend, "cuda"))
        return error_of("cudnn", WANTED._replace(dtype="float32", depth=8))

    assert error(KERNELS["cudnn"]) < 1e-5
    assert error(without_branches) > 0.1
