"""Attention over packed rows against an obvious loop, and what a window may not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.data.packing import build_rows, pack, spec_for, window_for
from sera_jax.ops.attention import BLOCK, packed_attention, row_mask
from tests import oracles
from tests.tolerances import TOLERANCES


def close(left, right, kind):
    np.testing.assert_allclose(left, right, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


def packed_rows(share_prompt=True, row_tokens=40, seed=0, count=9):
    rng = np.random.default_rng(seed)
    items = oracles.random_items(rng, count, vocab=20, prompt=(1, 8), response=(1, 6))
    assignment = pack(items, row_tokens, share_prompt)
    return items, build_rows(
        items, assignment, spec_for(items, assignment, row_tokens), len(assignment) + 1, share_prompt
    )


def random_heads(rows, heads=4, groups=2, depth=6, seed=0):
    rng = np.random.default_rng(seed)
    count, length = rows.tokens.shape
    draw = [rng.standard_normal((count, h, length, depth)).astype(np.float32) for h in (heads, groups, groups)]
    return [jnp.asarray(x) for x in draw]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_mask_is_the_layouts_rule(share_prompt):
    rows = packed_rows(share_prompt)[1].rows
    mask = np.asarray(row_mask(rows.segment, rows.branch, rows.segment, rows.branch)) & np.tri(40, dtype=bool)
    for r, query, key in np.ndindex(mask.shape):
        if rows.segment[r, query]:
            assert mask[r, query, key] == oracles.visible(rows, r, query, key), (r, query, key)
        else:
            assert not mask[r, query, key] or rows.segment[r, key] == 0


@pytest.mark.parametrize("share_prompt", [True, False])
def test_each_token_mixes_exactly_the_tokens_it_may_see(share_prompt):
    rows = packed_rows(share_prompt)[1].rows
    q, k, v = random_heads(rows)
    out = np.asarray(packed_attention(q, k, v, rows.segment, rows.branch))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for r, t in np.argwhere(rows.segment > 0):
        seen = [key for key in range(t + 1) if oracles.visible(rows, r, t, key)]
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            scores = k[r, group, seen] @ q[r, head, t] / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max())
            close(out[r, head, t], weights / weights.sum() @ v[r, group, seen], "closed_form")
    assert np.isfinite(out).all()


@pytest.mark.parametrize("length", [BLOCK + 37, 3 * BLOCK])
def test_a_window_that_holds_every_item_changes_nothing(length):
    items, packed = packed_rows(row_tokens=length, count=60)
    rows = packed.rows
    heads = random_heads(rows, heads=2, groups=1, depth=4)
    window = window_for(items, length)
    assert window < length

    def mixed(window):
        def total(heads):
            out = packed_attention(*heads, rows.segment, rows.branch, window=window)
            return jnp.sum(jnp.where((rows.segment > 0)[:, None, :, None], out, 0.0) ** 2)

        return jax.jit(jax.value_and_grad(total))(heads)

    (value, grads), (value_all, grads_all) = mixed(window), mixed(None)
    close(value, value_all, "closed_form")
    for left, right in zip(grads, grads_all):
        close(left, right, "closed_form")


def test_padding_changes_nothing_and_stays_finite():
    rows = packed_rows()[1].rows
    q, k, v = random_heads(rows)
    padding = jnp.asarray(rows.segment == 0)[:, None, :, None]
    clean = packed_attention(q, k, v, rows.segment, rows.branch)
    dirty = packed_attention(*(jnp.where(padding, 1e4, x) for x in (q, k, v)), rows.segment, rows.branch)
    np.testing.assert_array_equal(*(np.where(padding, 0.0, x) for x in (clean, dirty)))
    assert np.isfinite(dirty).all()
