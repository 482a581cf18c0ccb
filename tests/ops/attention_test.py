"""Attention over packed rows against the whole mask at once, and what blocks, bands and a cache may not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.data.packing import build_rows, pack, spec_for, window_for
from sera_jax.ops import attention
from sera_jax.ops.attention import Places, blocked_attention, cached_attention, visible
from sera_jax.ops.backends import ATTENTION
from tests import oracles
from tests.tolerances import TOLERANCES

OF_MODEL = [{}, {"sliding_window": 4}, {"scale": 0.7, "soft_cap": 1.5}]


def close(left, right, kind):
    np.testing.assert_allclose(left, right, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


def packed_rows(share_prompt=True, row_tokens=40, seed=0, count=9):
    rng = np.random.default_rng(seed)
    items = oracles.random_items(rng, count, vocab=20, prompt=(1, 8), response=(1, 6))
    assignment = pack(items, row_tokens, share_prompt)
    return items, build_rows(
        items, assignment, spec_for(items, assignment, row_tokens), len(assignment) + 1, share_prompt
    )


def places(rows):
    return Places.in_rows(rows.segment, rows.branch, rows.positions)


def random_heads(rows, heads=4, groups=2, depth=6, seed=0):
    rng = np.random.default_rng(seed)
    count, length = rows.tokens.shape
    draw = [rng.standard_normal((count, h, length, depth)).astype(np.float32) for h in (heads, groups, groups)]
    return [jnp.asarray(x) for x in draw]


def whole_mask(rows, sliding_window=None):
    """bool[R, T, T] from the layout's rule, key by key; padding sees itself, so that it stays finite."""
    count, length = rows.tokens.shape
    seen = np.zeros((count, length, length), bool)
    for r, query, key in np.argwhere(rows.segment[:, :, None] == rows.segment[:, None, :]):
        near = sliding_window is None or rows.positions[r, query] - rows.positions[r, key] < sliding_window
        seen[r, query, key] = query == key or (near and oracles.visible(rows, r, query, key))
    return seen


def plain_attention(q, k, v, seen, *, scale=None, soft_cap=None):
    """Every query against every key, the keys and values of a group repeated for its heads."""
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("rhtd,rhsd->rhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    return jnp.einsum("rhts,rhsd->rhtd", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1), v)


def mixed(attend, rows, heads):
    """Values of real tokens [R, H, T, d] and the gradient of a function of them."""
    real = (rows.segment > 0)[:, None, :, None]

    def total(heads):
        out = jnp.where(real, attend(*heads), 0.0)
        return jnp.sum(jnp.sin(out) * out), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(heads)
    return out, *grads


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that rows of some tens of tokens hold every kind of band."""
    for name, value in (("BLOCK", 8), ("BAND", 2)):
        monkeypatch.setattr(attention, name, value)


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("sliding_window", [None, 4])
def test_the_mask_is_the_layouts_rule(share_prompt, sliding_window):
    rows = packed_rows(share_prompt)[1].rows
    mask = np.asarray(visible(places(rows), places(rows), sliding_window=sliding_window))
    real = rows.segment > 0
    np.testing.assert_array_equal(mask[real], whole_mask(rows, sliding_window)[real])
    assert not mask[~real][np.repeat(real, (~real).sum(1), axis=0)].any(), "padding sees padding only"


@pytest.mark.parametrize(("share_prompt", "of_model"), [(False, {}), *((True, own) for own in OF_MODEL)], ids=str)
def test_each_token_mixes_exactly_the_tokens_it_may_see(share_prompt, of_model):
    rows = packed_rows(share_prompt)[1].rows
    heads, own = random_heads(rows), dict(of_model)
    plain = functools.partial(plain_attention, seen=whole_mask(rows, own.pop("sliding_window", None)), **own)
    blocked = functools.partial(blocked_attention, queries=places(rows), keys=places(rows), **of_model)
    for got, want in zip(mixed(blocked, rows, heads), mixed(plain, rows, heads), strict=True):
        close(got, want, "closed_form")


@pytest.mark.parametrize("name", ["xla", "xla_loop"])
@pytest.mark.parametrize("bounded", [False, True])
def test_blocks_and_bands_change_nothing(small_blocks, bounded, name):
    length = 53
    items, packed = packed_rows(row_tokens=length, count=14)
    rows, longest = packed.rows, max(item.tokens for item in items)
    bands = attention._bands(length, longest if bounded else length)
    assert max(stop - start for start, stop in bands) > attention.BLOCK, "some blocks share a loop"
    plain = functools.partial(plain_attention, seen=whole_mask(rows, 7), soft_cap=2.0)
    blocked = functools.partial(
        ATTENTION[name].attend,
        queries=places(rows),
        keys=places(rows),
        soft_cap=2.0,
        sliding_window=7,
        longest_item=longest if bounded else None,
    )
    heads = random_heads(rows, heads=2, groups=1, depth=4)
    for got, want in zip(mixed(blocked, rows, heads), mixed(plain, rows, heads), strict=True):
        close(got, want, "closed_form")


@pytest.mark.parametrize("length", [attention.BLOCK + 37, 3 * attention.BLOCK])
def test_a_bound_that_holds_every_item_changes_nothing(length):
    items, packed = packed_rows(row_tokens=length, count=60)
    rows, longest = packed.rows, window_for(items, length)
    assert longest < length
    heads = random_heads(rows, heads=2, groups=1, depth=4)
    whole = functools.partial(blocked_attention, queries=places(rows), keys=places(rows))
    bounded = functools.partial(whole, longest_item=longest)
    for got, want in zip(mixed(bounded, rows, heads), mixed(whole, rows, heads), strict=True):
        close(got, want, "closed_form")


@pytest.mark.parametrize("length", [1, 127, 128, 448, 1024, 1100, 4096, 5000])
@pytest.mark.parametrize("longest", [64, 320, 2048])
def test_bands_follow_each_other_and_share_loops_only_in_whole_blocks(length, longest):
    bands = attention._bands(length, min(longest, length))
    assert [start for start, _ in bands] == [0, *(stop for _, stop in bands[:-1])]
    assert bands[-1][1] == length
    for start, stop in bands:
        assert stop - start < attention.BLOCK or (stop - start) % attention.BLOCK == 0
    assert len(bands) <= 2 + max(attention.BAND, longest // (attention.BAND * attention.BLOCK))


def test_the_program_does_not_grow_with_rows_beyond_the_longest_item():
    def size(length):
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        q = jax.ShapeDtypeStruct((1, 1, length, 4), jnp.float32)
        attend = functools.partial(blocked_attention, longest_item=300)
        return len(jax.jit(attend).lower(q, q, q, Places(*[ids] * 4), Places(*[ids] * 4)).as_text())

    assert size(8192) < 1.05 * size(1024)


def test_one_loop_makes_a_smaller_program_of_long_rows():
    def size(name):
        length = 16 * attention.BLOCK
        q = jax.ShapeDtypeStruct((1, 2, length, 4), jnp.float32)
        at = jax.ShapeDtypeStruct((1, length), jnp.int32)
        back_end = ATTENTION[name].attend

        def mix(q, at):
            return back_end(q, q, q, Places(at, at, at, at), Places(at, at, at, at))

        return len(jax.jit(mix).lower(q, at).as_text())

    assert size("xla_loop") < 0.7 * size("xla")


def test_padding_changes_nothing_and_stays_finite(small_blocks):
    rows = packed_rows()[1].rows
    q, k, v = random_heads(rows)
    padding = jnp.asarray(rows.segment == 0)[:, None, :, None]
    attend = jax.jit(functools.partial(blocked_attention, queries=places(rows), keys=places(rows)))
    clean = attend(q, k, v)
    dirty = attend(*(jnp.where(padding, 1e4, x) for x in (q, k, v)))
    np.testing.assert_array_equal(*(np.where(padding, 0.0, x) for x in (clean, dirty)))
    assert np.isfinite(dirty).all()


def test_what_comes_later_changes_nothing_earlier(small_blocks):
    rows = packed_rows()[1].rows
    q, k, v = random_heads(rows)
    real = (rows.segment > 0)[:, None, :, None]
    attend = jax.jit(functools.partial(blocked_attention, queries=places(rows), keys=places(rows)))
    before = attend(q, k, v)
    for cut in (1, 8, 30):
        after = attend(q, *(x.at[:, :, cut:].add(1.0) for x in (k, v)))
        np.testing.assert_array_equal(*(np.where(real, x, 0.0)[:, :, :cut] for x in (after, before)))
        assert not np.array_equal(after[:, :, cut:], before[:, :, cut:])


@pytest.mark.parametrize("orders", [("sgdc", "sgcd"), ("scgd", "scgd")], ids=str)
@pytest.mark.parametrize("of_model", OF_MODEL, ids=str)
def test_one_query_over_a_cache_mixes_what_it_does_in_its_row(of_model, orders):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, h, 12, 6)), jnp.float32) for h in (4, 2, 2))
    ones, steps = np.ones((3, 12), np.int32), np.repeat(np.arange(12)[None], 3, 0)
    row = Places(ones, 0 * ones, steps, steps)
    position = np.array([11, 0, 6])
    want = np.asarray(blocked_attention(q, k, v, row, row, **of_model))[np.arange(3), :, position]
    query = Places(*(x[np.arange(3), position][:, None] for x in row))
    cache = (jnp.einsum(f"sgcd->{order}", x) for order, x in zip(orders, (k, v), strict=True))
    fed, columns = q[np.arange(3), :, position][:, :, None], Places(*(x[:1] for x in row))
    got = cached_attention(fed, *cache, query, columns, orders=orders, **of_model)
    close(got[:, :, 0], want, "closed_form")
