"""The law of the layout: a response scores the same alone or packed, shared or not; and chunks change nothing.

The entropies beside the log-probs are those of the whole distribution, and as smooth.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax.aot.collectives import collectives
from sera_jax.core import Rows
from sera_jax.data.packing import build_rows, gather_scores, pack, spec_for, window_for
from sera_jax.mesh import make_mesh, rows_sharding
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import head_matrix, hidden_states, init_params, unembedding
from sera_jax.ops.logprob import slot_lengths, sum_by_slot, sum_slots, token_logps, token_logps_and_entropies
from tests import oracles
from tests.tolerances import TOLERANCES

CFG = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    initializer_range=0.3,
)
T = 48


def close(left, right, kind):
    np.testing.assert_allclose(left, right, rtol=TOLERANCES[kind]["rtol"], atol=TOLERANCES[kind]["atol"])


@pytest.fixture(scope="module")
def params():
    return init_params(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def items():
    return oracles.random_items(np.random.default_rng(0), 8, vocab=CFG.vocab_size, prompt=(1, 7), response=(1, 6))


def by(head):
    """The unembedding by an output projection [D, V]."""
    return lambda hidden: hidden @ head


@functools.partial(jax.jit, static_argnames=("chunk", "window"))
def score(params, rows, chunk=1000, window=None):
    """Sums f32[R, K] and per-token log-probs f32[R, M]."""
    logps = token_logps(hidden_states(CFG, params, rows, window=window), unembedding(CFG, params), rows, chunk=chunk)
    return sum_by_slot(logps, rows), logps


@pytest.fixture(scope="module")
def scored_alone(params, items):
    """Log-prob of every response on its own row, from the logits of the whole sequence."""
    longest = 13

    @jax.jit
    def logits(rows):
        return hidden_states(CFG, params, rows) @ head_matrix(CFG, params)

    scores = []
    for item in items:
        found = []
        for k in range(len(item.responses)):
            rows = oracles.alone(item, k)
            length = rows.tokens.shape[1]
            pad = ((0, 0), (0, longest - length))  # causal: what follows cannot matter; one shape compiles once
            wide = rows.replace(
                tokens=np.pad(rows.tokens, pad),
                positions=np.pad(rows.positions, pad),
                segment=np.pad(rows.segment, pad, constant_values=1),
                branch=np.pad(rows.branch, pad, constant_values=1),
                source=np.zeros((1, 1), np.int32),
                target=np.zeros((1, 1), np.int32),
                slot=np.zeros((1, 1), np.int32),
            )
            exact = np.asarray(logits(wide)[0], np.float64)
            exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
            found.append(sum(exact[s, t] for s, t in zip(rows.source[0], rows.target[0])))
        scores.append(np.array(found))
    return scores


def packed(items, order, share_prompt, row_tokens=T):
    """Rows of the items in another order, and the scores put back into the order of `items`."""
    some = [items[i] for i in order]
    assignment = pack(some, row_tokens, share_prompt)
    return some, build_rows(some, assignment, spec_for(some, assignment, row_tokens), 8, share_prompt)


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_a_response_scores_the_same_alone_or_packed_shared_or_not(params, items, scored_alone, seed, share_prompt):
    order = np.random.default_rng(seed).permutation(len(items))
    some, rows = packed(items, order, share_prompt)
    values = gather_scores([score(params, rows.rows)[0]], [rows], some)
    for i, got in zip(order, values):
        close(got, scored_alone[i], "packing")


def test_a_window_as_long_as_the_longest_item_changes_no_score(params, items, scored_alone):
    some, rows = packed(items, range(len(items)), True, row_tokens=192)
    window = window_for(some, 192)
    assert window < 192
    for got, want in zip(gather_scores([score(params, rows.rows, window=window)[0]], [rows], some), scored_alone):
        close(got, want, "packing")


def test_another_response_or_neighbour_never_reaches_a_score(params, items):
    rows = packed(items, range(len(items)), True)[1]
    before = score(params, rows.rows)[0]
    tokens = rows.rows.tokens.copy()
    other = (rows.rows.segment != 1) | (rows.rows.branch > 1)  # all but the first item's prompt and first response
    tokens[other] = (tokens[other] + 7) % CFG.vocab_size
    after = score(params, rows.rows.replace(tokens=tokens))[0]
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_chunks_of_the_vocabulary_projection_change_neither_value_nor_gradient(params, items, chunk):
    rows = packed(items, range(len(items)), True)[1].rows
    hidden = jax.random.normal(jax.random.key(1), (*rows.tokens.shape, CFG.hidden_size))
    head = head_matrix(CFG, params)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, rows.slot.shape).astype(np.float32)

    def total(hidden, head, chunk):
        return jnp.sum(token_logps(hidden, by(head), rows, chunk=chunk) * weights)

    def whole(hidden, head):
        logps = jax.nn.log_softmax(hidden @ head, axis=-1)  # [R, T, V]
        at_source = jnp.take_along_axis(logps, rows.source[:, :, None], axis=1)
        picked = jnp.take_along_axis(at_source, rows.target[:, :, None], axis=2)[:, :, 0]
        return jnp.sum(jnp.where(rows.slot < rows.num_slots, picked, 0.0) * weights)

    chunked = functools.partial(total, chunk=chunk)
    value, grads = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, head)
    value_whole, grads_whole = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(hidden, head)
    close(value, value_whole, "packing")
    for left, right in zip(grads, grads_whole):
        close(left, right, "packing")


def test_unused_places_score_zero_and_lengths_count_scored_tokens(params, items):
    some, rows = packed(items, range(len(items)), True)
    sums, logps = score(params, rows.rows)
    unused = rows.rows.slot == rows.rows.num_slots
    assert unused.any() and not np.asarray(logps)[unused].any()
    assert (np.asarray(logps)[~unused] < 0).all()
    lengths = gather_scores([slot_lengths(rows.rows)], [rows], some)
    for item, got in zip(some, lengths):
        np.testing.assert_array_equal(got, [len(r) for r in item.responses])
    assert not np.asarray(sums)[rows.item < 0].any()


def test_what_is_not_a_number_is_no_log_prob_of_0_however_many_there_are():
    """XLA's minimum makes 0 of NaN on a CPU, where there are some thousands."""
    count, width = 64, 96
    one, scored = (np.zeros((count, size), np.int32) for size in (1, width))
    rows = Rows(one, one, one, one, scored, scored, scored, 1)
    hidden = jnp.full((count, 1, 4), jnp.nan)
    for chunk in (width, width // 2):
        logps = jax.jit(functools.partial(token_logps, unembed=lambda h: h, rows=rows, chunk=chunk))(hidden)
        assert jnp.isnan(logps).all()


def test_values_are_summed_by_slot(items):
    rows = packed(items, range(len(items)), True)[1].rows
    values = np.random.default_rng(0).standard_normal(rows.slot.shape).astype(np.float32)
    sums = np.asarray(sum_by_slot(values, rows))
    for r, k in np.ndindex(sums.shape):
        close(sums[r, k], values[r][rows.slot[r] == k].astype(np.float64).sum(), "closed_form")


def test_slots_are_summed_over_any_leading_axes_and_unused_columns_are_not_read(items):
    rows = packed(items, range(len(items)), True)[1].rows
    values = np.random.default_rng(0).standard_normal(rows.slot.shape).astype(np.float32)
    sums = sum_by_slot(values, rows)
    junk = np.where(rows.slot < rows.num_slots, values, np.nan)
    for lead in ((), (1,), (2, 3)):
        wide = [np.broadcast_to(x, (*lead, *x.shape)) for x in (junk, rows.slot)]
        got = sum_slots(*wide, rows.num_slots)
        np.testing.assert_array_equal(got, np.broadcast_to(sums, (*lead, *sums.shape)))


@pytest.fixture(scope="module")
def projected(params, items):
    """Rows, hidden states, output projection, and weights f32[R, M] for a sum that has a gradient everywhere."""
    rows = packed(items, range(len(items)), True)[1].rows
    hidden = 2 * jax.random.normal(jax.random.key(1), (*rows.tokens.shape, CFG.hidden_size))
    weights = np.random.default_rng(0).uniform(0.5, 1.5, (2, *rows.slot.shape)).astype(np.float32)
    return rows, hidden, head_matrix(CFG, params), weights


def exact_logps(hidden, head, rows):
    """Log-probs of the whole vocabulary at every scored place, f64[R, M, V]."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    logits = np.take_along_axis(hidden, rows.source[:, :, None], axis=1) @ head
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_on_several_devices_a_chunk_moves_nothing(items, shape):
    """The head is gathered once and its gradient added up once, in however many chunks; value and gradients stay."""
    cfg = dataclasses.replace(CFG, vocab_size=32)
    each = [[i] for i in range(8)]
    rows = build_rows(items, each, spec_for(items, each, T), 8, True).rows
    mesh = make_mesh(*shape, devices=jax.devices()[:8])
    by_rows, split = rows_sharding(mesh), NamedSharding(mesh, P("fsdp", "tensor"))
    hidden = jax.random.normal(jax.random.key(1), (8, T, cfg.hidden_size))
    head = jax.random.normal(jax.random.key(2), (cfg.hidden_size, cfg.vocab_size))

    def total(hidden, head, rows, chunk, spread=0):
        return jnp.sum(token_logps(hidden, unembedding(cfg, {"head": head}, rows=spread), rows, chunk=chunk) ** 2)

    alone = jax.value_and_grad(functools.partial(total, chunk=1000), argnums=(0, 1))(hidden, head, rows)
    given = jax.device_put(hidden, by_rows), jax.device_put(head, split), jax.device_put(rows, by_rows)
    moved = []
    for chunk in (1000, 3, 1):
        of_chunks = jax.value_and_grad(functools.partial(total, chunk=chunk, spread=8), argnums=(0, 1))
        with jax.set_mesh(mesh):
            program = jax.jit(of_chunks, out_shardings=(None, (by_rows, split))).lower(*given).compile()
        jax.tree.map(functools.partial(close, kind="packing"), program(*given), alone)
        moved.append(sum(found.bytes for found in collectives(program.as_text()) if found.bytes > 1024))
    assert 0 < moved[1] == moved[2] < 1.25 * moved[0], moved


@pytest.mark.parametrize("chunk", [7, 1000])
def test_entropies_are_those_of_the_whole_distribution_and_chunks_change_neither_them_nor_their_gradient(
    projected, chunk
):
    rows, hidden, head, weights = projected

    def total(hidden, head):
        logps, entropies = token_logps_and_entropies(hidden, by(head), rows, chunk=chunk)
        return jnp.sum(logps * weights[0]) + jnp.sum(entropies * weights[1]), (logps, entropies)

    grads, (logps, entropies) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, head)
    assert logps.dtype == entropies.dtype == jnp.float32

    exact, used = exact_logps(hidden, head, rows), rows.slot < rows.num_slots
    p = np.exp(exact)
    entropy = -(p * exact).sum(-1)
    close(entropies, np.where(used, entropy, 0.0), "decoder_oracle")
    close(logps, np.where(used, np.take_along_axis(exact, rows.target[:, :, None], 2)[:, :, 0], 0.0), "decoder_oracle")

    # d logp / d logits = 1[target] - p, d entropy / d logits = -p (log p + entropy)
    of_logps = (np.arange(CFG.vocab_size) == rows.target[:, :, None]) - p
    of_logits = weights[0][:, :, None] * of_logps - weights[1][:, :, None] * p * (exact + entropy[:, :, None])
    of_logits *= used[:, :, None]
    of_hidden, of_head = np.zeros(hidden.shape), np.zeros(head.shape)
    for r, m in np.argwhere(used):
        of_hidden[r, rows.source[r, m]] += np.asarray(head, np.float64) @ of_logits[r, m]
        of_head += np.outer(np.asarray(hidden, np.float64)[r, rows.source[r, m]], of_logits[r, m])
    close(grads[0], of_hidden, "packing")
    close(grads[1], of_head, "packing")


def test_the_log_probs_beside_the_entropies_are_token_logps(projected):
    rows, hidden, head, _ = projected
    plain = token_logps(hidden, by(head), rows, chunk=1000)
    close(token_logps_and_entropies(hidden, by(head), rows, chunk=1000)[0], plain, "closed_form")


def test_the_entropy_of_equal_logits_is_the_log_of_the_vocabulary_and_of_a_certain_token_0(projected):
    rows, hidden, head, _ = projected
    used = rows.slot < rows.num_slots
    flat = token_logps_and_entropies(jnp.zeros_like(hidden), by(head), rows, chunk=16)[1]
    close(flat, np.where(used, np.log(CFG.vocab_size), 0.0), "closed_form")
    certain = token_logps_and_entropies(1e4 * hidden, by(head), rows, chunk=16)[1]
    assert not np.isnan(certain).any() and (np.asarray(certain) >= 0).all()
    assert np.asarray(certain)[used].min() == 0.0
