"""The critic reads the state before each token, starts at 0, and says the same wherever its response lies; a reward
model reads the state after a response's last token."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sera_jax.core import Rows
from sera_jax.data.packing import RowSpec, build_rows, pack
from sera_jax.mesh import host_to_global, make_mesh, param_shardings
from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import (
    HEAD,
    critic_config,
    critic_params,
    read_values,
    row_scores,
    row_values,
    with_value_head,
    without_value_head,
)
from sera_jax.models.decoder import abstract_params, hidden_states, init_params
from sera_jax.training.score import make_values, place_rows
from tests import oracles
from tests.tolerances import TOLERANCES

UNTIED = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
    initializer_range=0.3,
)
CRITIC = critic_config(UNTIED)
R, T, SPEC = 16, 32, RowSpec(32, 24, 8)


def close(left, right, kind):
    np.testing.assert_allclose(left, right, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


@pytest.fixture(scope="module")
def policy():
    return jax.device_get(init_params(UNTIED, jax.random.key(0)))


@pytest.fixture(scope="module")
def critic(policy):
    head = np.random.default_rng(1).standard_normal(UNTIED.hidden_size).astype(np.float32)
    return {**critic_params(policy), HEAD: head}


@pytest.fixture(scope="module")
def items():
    return oracles.random_items(np.random.default_rng(0), 6, vocab=32, prompt=(1, 6), response=(1, 6))


@functools.cache
def programs():
    """One compilation each for all tests: values, and the hidden states they are read from."""
    return (
        jax.jit(functools.partial(row_values, CRITIC, window=T)),
        jax.jit(functools.partial(hidden_states, CRITIC, window=T)),
    )


def values_of(params, rows):
    return np.asarray(programs()[0](params, rows))


def lay(items, share_prompt=True, apart=False):
    assignment = [[i] for i in range(len(items))] if apart else pack(items, T, share_prompt, SPEC)
    return build_rows(items, assignment, SPEC, R, share_prompt)


def by_response(packed, values):
    """(item, response) -> the values of its tokens, in order."""
    return {
        (int(packed.item[r, k]), int(packed.response[r, k])): np.asarray(values)[r, packed.rows.slot[r] == k]
        for r, k in np.argwhere(packed.item >= 0)
    }


def test_a_new_critic_says_0_everywhere(policy, items):
    rows = lay(items).rows
    assert not values_of(critic_params(policy), rows).any()
    assert critic_params(policy)[HEAD].shape == (UNTIED.hidden_size,)


def test_a_critic_of_its_own_has_a_decoder_without_output_projection_and_a_head(policy):
    params = critic_params(policy)
    assert "head" in policy and "head" not in params
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), without_value_head(params))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(CRITIC))
    tied = dataclasses.replace(UNTIED, tie_word_embeddings=True)
    assert critic_config(tied) == tied
    assert params["embed"] is policy["embed"]  # nothing is copied before it must be


def test_taking_the_value_head_away_undoes_giving_one(policy):
    with_head = with_value_head(policy)
    assert set(with_head) - set(policy) == {HEAD}
    assert with_head[HEAD].dtype == policy["final_norm"]["scale"].dtype
    again = without_value_head(with_head)
    assert jax.tree.structure(again) == jax.tree.structure(policy)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(policy)))
    assert HEAD not in policy  # the given tree is left as it was


def test_the_value_of_a_token_is_read_at_the_state_that_predicts_it(critic, items):
    packed = lay(items)
    hidden = np.asarray(programs()[1](without_value_head(critic), packed.rows), np.float64)
    values = values_of(critic, packed.rows)
    rows = packed.rows
    for r, m in np.ndindex(rows.slot.shape):
        exact = hidden[r, rows.source[r, m]] @ critic[HEAD].astype(np.float64)
        close(values[r, m], exact if rows.slot[r, m] < rows.num_slots else 0.0, "decoder_oracle")


def test_a_later_token_changes_no_earlier_value_and_the_value_before_the_last_token_does_not_see_it(critic):
    item = oracles.random_items(np.random.default_rng(3), 1, vocab=32, prompt=(4, 4), response=(6, 6), most=1)[0]
    before = by_response(lay([item]), values_of(critic, lay([item]).rows))[0, 0]
    for changed in range(6):
        response = item.responses[0].copy()
        response[changed] = (response[changed] + 5) % 32
        other = dataclasses.replace(item, responses=(response,))
        after = by_response(lay([other]), values_of(critic, lay([other]).rows))[0, 0]
        np.testing.assert_array_equal(after[: changed + 1], before[: changed + 1])
        assert (after[changed + 1 :] != before[changed + 1 :]).all()


def test_a_responses_values_are_the_same_alone_packed_and_with_its_prompt_shared_or_not(critic, items):
    found = []
    for options in ({}, {"share_prompt": False}, {"apart": True}):
        packed = lay(items, **options)
        found.append(by_response(packed, values_of(critic, packed.rows)))
    for start in range(0, sum(len(item.responses) for item in items), R):  # each response in a row of its own
        singles = [
            (i, k, dataclasses.replace(item, responses=(response,)))
            for i, item in enumerate(items)
            for k, response in enumerate(item.responses)
        ][start : start + R]
        packed = lay([item for *_, item in singles], apart=True)
        alone = by_response(packed, values_of(critic, packed.rows))
        for at, (i, k, _) in enumerate(singles):
            for layout in found:
                close(layout[i, k], alone[at, 0], "decoder_oracle")


def test_values_on_eight_devices_are_those_on_one(critic, items):
    rows = lay(items).rows
    mesh = make_mesh(2, 2, 2)
    shardings = param_shardings(mesh, critic)
    with jax.transfer_guard("disallow"), jax.set_mesh(mesh):
        params, placed = host_to_global(critic, shardings), place_rows(rows, mesh)
        spread = make_values(CRITIC, mesh, window=T)(params, placed)
    assert spread.sharding.shard_shape(spread.shape) == (R // 4, SPEC.scored)
    close(jax.device_get(spread), values_of(critic, rows), "mesh")


def test_values_are_float32_sums_whatever_the_dtype_of_the_hidden_states():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, 4, 64)), jnp.bfloat16)
    head = jnp.asarray(rng.standard_normal(64), jnp.bfloat16).astype(jnp.float32)
    places = np.array([[2, 0, 1, 3]], np.int32)
    whole = np.zeros((1, 4), np.int32)
    rows = Rows(whole, whole, whole, whole, places, whole, np.array([[0, 0, 1, 2]], np.int32), num_slots=2)
    values = read_values(hidden, head, rows)
    assert values.dtype == jnp.float32
    exact = np.asarray(hidden, np.float64)[0, places[0, :3]] @ np.asarray(head, np.float64)
    close(values[0, :3], exact, "closed_form")
    assert values[0, 3] == 0.0


@functools.cache
def scorer():
    return jax.jit(functools.partial(row_scores, CRITIC, window=T))


def scores_of(packed, params):
    """(item, response) -> its score."""
    scores = np.asarray(scorer()(params, packed.rows))
    empty = packed.item < 0
    assert not scores[empty].any()
    places = np.argwhere(~empty)
    return {(int(packed.item[r, k]), int(packed.response[r, k])): scores[r, k] for r, k in places}


def test_a_responses_score_is_read_at_its_own_last_token_wherever_it_lies(critic, items):
    """Oracle: the response alone behind its prompt, where the last token is that of the row."""
    short = oracles.random_items(np.random.default_rng(7), 1, vocab=32, prompt=(2, 2), response=(1, 1), most=1)
    items, expected = [*items, *short], {}
    for i, item in enumerate(items):
        for k, response in enumerate(item.responses):
            packed = lay([dataclasses.replace(item, responses=(response,))])
            hidden = np.asarray(programs()[1](without_value_head(critic), packed.rows), np.float64)
            expected[i, k] = hidden[0, len(item.prompt) + len(response) - 1] @ critic[HEAD].astype(np.float64)
    for options in ({}, {"share_prompt": False}, {"apart": True}):
        found = scores_of(lay(items, **options), critic)
        assert found.keys() == expected.keys()
        for place, score in found.items():
            close(score, expected[place], "decoder_oracle")


def test_a_response_that_fills_its_row_to_the_end_has_a_score_too(critic):
    item = oracles.random_items(np.random.default_rng(5), 1, vocab=32, prompt=(20, 20), response=(12, 12), most=1)[0]
    packed = lay([item])
    assert item.tokens == T and packed.rows.segment[0, -1] == 1
    hidden = np.asarray(programs()[1](without_value_head(critic), packed.rows), np.float64)
    close(scores_of(packed, critic)[0, 0], hidden[0, -1] @ critic[HEAD].astype(np.float64), "decoder_oracle")
