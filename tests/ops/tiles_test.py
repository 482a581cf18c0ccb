"""Tiles of attention: only those that are not empty are computed, once in each direction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params, hidden_states
from sera_jax.ops import tiles
from sera_jax.ops.attention import Places
from sera_jax.ops.backends import ATTENTION
from sera_jax.ops.kernels import of_kernel
from tests.ops.attention_test import packed_rows, places, random_heads

ATTEND = ATTENTION["xla_tiles"].attend


def test_the_tiles_are_those_in_which_something_is_seen():
    rng = np.random.default_rng(0)
    size, rows, across = tiles.TILE, 3, 4
    seen = np.zeros((rows, across * size, across * size), bool)
    full = rng.random((rows, across, across)) < 0.4
    for row, i, j in np.argwhere(full):
        seen[row, i * size + rng.integers(size), j * size + rng.integers(size)] = True
    found = tiles._tiles_of(jnp.asarray(seen))
    count = int(found.full)
    assert count == full.sum()
    row, i, j = np.argwhere(full).T
    np.testing.assert_array_equal(found.queries[:count], row * across + i)
    np.testing.assert_array_equal(found.keys[:count], row * across + j)
    for number, at in zip(np.asarray(found.number[:count]), zip(row, i, j), strict=True):
        where = seen[at[0]].reshape(across, size, across, size)[at[1], :, at[2]]
        np.testing.assert_array_equal(found.seen[number], where)


def test_items_and_answers_that_do_not_see_each_other_cost_nothing():
    length, size = 16 * tiles.TILE, tiles.TILE
    parts = [(item, branch, size) for item in (1, 2, 3, 4) for branch in (0, 1, 2)] + [(0, 0, 4 * size)]
    segment, branch = (np.repeat([part[k] for part in parts], [n for *_, n in parts])[None] for k in (0, 1))
    at = Places.in_rows(segment, branch, np.zeros_like(segment))
    counted = []

    def counting(q, k, v, seen, *, scale, soft_cap):
        counted.append(tiles._tiles_of(seen).full)
        return q

    of_kernel(counting, size)(*[jnp.zeros((1, 1, length, 4))] * 3, at, at)
    assert int(counted[0]) == 4 * (3 + 2) + 4, "each part, each answer's prompt, and padding on the diagonal"


@pytest.mark.parametrize("axis", ["rows", "padding"])
def test_what_no_query_sees_changes_no_bit(axis):
    rows = packed_rows(row_tokens=150, count=40)[1].rows
    heads = random_heads(rows)
    real = (rows.segment > 0)[:, None, :, None]
    attend = jax.jit(functools.partial(ATTEND, queries=places(rows), keys=places(rows)))
    before = attend(*heads)
    if axis == "rows":
        after = attend(*(x.at[1:].add(1.0) for x in heads))
        np.testing.assert_array_equal(after[0], before[0])
    else:
        after = attend(*(jnp.where(real, x, 1e4) for x in heads))
        np.testing.assert_array_equal(*(np.where(real, x, 0.0) for x in (after, before)))
        assert np.isfinite(after).all()


@pytest.mark.parametrize(("name", "operation"), [("xla_tiles", "while"), ("xla", "exponential")])
def test_what_attention_gave_is_not_computed_again_for_its_gradient(name, operation):
    """Counted in the program of a gradient: of tiles the loops, of plain XLA the softmaxes."""
    rows = packed_rows()[1].rows

    def count(remat):
        cfg = ModelConfig(remat=remat, attn_implementation=name, gated_mlp=False, activation="gelu")
        total = jax.grad(lambda params: jnp.sum(hidden_states(cfg, params, rows)))
        return jax.jit(total).lower(abstract_params(cfg)).as_text().count(f"stablehlo.{operation}")

    assert count("dots") == count("none") < count("full")


def test_masks_of_layers_that_differ_are_not_kept():
    """Made again for the backward pass: of all layers they would be layers x rows x tokens x tokens."""
    kinds = ("sliding_attention", "full_attention")
    cfg = ModelConfig(remat="dots", attn_implementation="xla_tiles", sliding_window=4, layer_types=kinds)
    rows = packed_rows(row_tokens=64)[1].rows
    total = jax.grad(lambda params: jnp.sum(hidden_states(cfg, params, rows)))
    text = jax.jit(total).lower(abstract_params(cfg)).as_text()
    count, length = rows.tokens.shape
    assert f"tensor<{count}x{length}x{length}xi1>" in text
    assert f"tensor<{len(kinds)}x{count}x{length}x{length}xi1>" not in text
