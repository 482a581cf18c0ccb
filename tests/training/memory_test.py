"""Where memory goes: the logits of a large vocabulary never grow with the rows, nor does an update with its batch."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from sera_jax.config import Config, TrainGroup
from sera_jax.core import PairBatch, Rows
from sera_jax.losses.preference import resolve
from sera_jax.mesh import make_mesh
from sera_jax.models.activations import ACTIVATION_BYTES, activation_bytes, chosen_remat
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params, hidden_states
from sera_jax.ops.logprob import LOGITS_BYTES, MOST_TOKENS, chunk_columns, default_tokens
from sera_jax.training.objectives import align_objective
from sera_jax.training.optimizer import make_optimizer
from sera_jax.training.score import make_score
from sera_jax.training.step import abstract_state, make_step, microbatches_for

# Everything but the vocabulary is tiny, so that logits dominate: 64 tokens of them are 32 MB, the head is 8 MB.
CFG = ModelConfig(
    vocab_size=131072,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=16,
)
T, M, K, Q = 128, 64, 4, 2
CHUNK_TOKENS = 64
# Layers are scanned, so many cost nothing to compile; a row of these keeps 1 GB, as does one of a real model.
DEEP = dataclasses.replace(
    CFG, vocab_size=32768, hidden_size=128, intermediate_size=512, head_dim=128, num_hidden_layers=1024, remat="auto"
)


def abstract_batch(*lead):
    def of(*shape, dtype=np.int32):
        return jax.ShapeDtypeStruct((*lead, *shape), dtype)

    laid = Rows(of(T), of(T), of(T), of(T), of(M), of(M), of(M), K)
    return PairBatch(laid, of(Q), of(Q), of(Q, dtype=np.float32), of(K, dtype=np.float32))


def held_bytes(compiled):
    memory = compiled.memory_analysis()
    # Not peak_memory_in_bytes: a CPU's leaves out what is alive only within the program.
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def peak_bytes(fn, rows):
    return held_bytes(jax.jit(jax.grad(fn)).lower(abstract_params(CFG), abstract_batch(rows)).compile())


def align_peak(rows, chunk_tokens):
    objective = align_objective(CFG, resolve("dpo"), window=T, chunk_tokens=chunk_tokens, shards=1)
    return peak_bytes(lambda params, batch: objective(params, batch)[0], rows)


def activations_peak(rows):
    """The same decoder without its vocabulary projection."""
    return peak_bytes(lambda params, batch: (hidden_states(CFG, params, batch.rows, window=T) ** 2).sum(), rows)


def growth(rows, chunk_tokens):
    """Peak of the gradient program at twice the rows over that at `rows`, less what the activations grow by."""
    own = activations_peak(2 * rows) - activations_peak(rows)
    return (align_peak(2 * rows, chunk_tokens(2 * rows)) - own) / align_peak(rows, chunk_tokens(rows))


def test_what_the_scorer_holds_besides_its_arguments_does_not_grow_with_the_vocabulary():
    """Where the positions of a take are chosen by themselves: a vocabulary twice as large, half as many at a time."""
    rows, mesh = 16, make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def held(vocab_size):
        cfg = dataclasses.replace(CFG, vocab_size=vocab_size)
        score = make_score(cfg, mesh, window=T, chunk_tokens=0)
        compiled = score.lower(abstract_params(cfg), abstract_batch(rows).rows).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    once, twice = held(65536), held(131072)
    assert 4 * rows * M * 65536 > 1.5 * once, "all logits at once would be more"
    assert abs(twice - once) < LOGITS_BYTES // 16


def test_the_peak_of_the_gradient_at_a_large_vocabulary_does_not_grow_with_the_rows():
    """At a fixed number of chunk tokens (rows x columns), 1.2 x at most; without chunks the logits double it."""
    assert growth(4, lambda rows: CHUNK_TOKENS) < 1.2
    assert growth(4, lambda rows: rows * M) > 1.5


def update_bytes(rows):
    """What the shipped update holds with the defaults of a config, state and all."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    group = TrainGroup()
    optimizer = make_optimizer(group, 10)
    state = abstract_state(DEEP, optimizer, mesh)
    objective = align_objective(DEEP, resolve("dpo"), window=T, chunk_tokens=group.logits_chunk_tokens, shards=1)
    parts = microbatches_for(DEEP, rows, T, 1, asked=group.gradient_accumulation_steps)
    step: Any = make_step(objective, optimizer, state, mesh)
    return held_bytes(step.lower(state, abstract_batch(parts, rows // parts)).compile())


def test_an_update_of_a_large_batch_holds_its_state_two_gradients_and_bounded_activations_and_logits():
    parameters = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(DEEP)))
    assert update_bytes(64) < 5 * parameters + ACTIVATION_BYTES + 4 * LOGITS_BYTES


def test_a_batch_is_split_into_as_few_equal_parts_as_keep_the_bound():
    a_row = activation_bytes(DEEP, T)
    most = ACTIVATION_BYTES // a_row
    assert most >= 1
    assert a_row > ACTIVATION_BYTES / 8  # or the bound would not bite here
    for rows in (1, 2, most, 2 * most, 12, 13):
        parts = microbatches_for(DEEP, rows, T, 1)
        assert rows % parts == 0 and rows // parts <= most
        assert all(rows % fewer or rows // fewer > most for fewer in range(1, parts))
    assert microbatches_for(DEEP, 8 * 12, T, 8) == microbatches_for(DEEP, 12, T, 1)
    assert microbatches_for(DEEP, 12, T, 1, asked=3) == 3


def test_a_row_that_is_too_large_by_itself_is_a_part_of_its_own():
    assert activation_bytes(DEEP, 100 * T) > ACTIVATION_BYTES
    assert microbatches_for(DEEP, 6, 100 * T, 2) == 3


def test_the_embedded_worlds_models_multiply_nothing_again_and_are_never_split():
    model = Config().model
    small = ModelConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=3, remat=model.remat)
    assert chosen_remat(small, 128) == "dots"
    assert microbatches_for(small, 64, 128, 1) == 1
    assert chunk_columns(64, 512, 0, 1) > 128, "all logits of a step at once"


@pytest.mark.parametrize(
    ("vocabulary", "devices", "tokens"),
    [(512, "cpu", 2**16), (2**17, "cpu", 2**8), (512, "tpu", MOST_TOKENS), (2**17, "cuda", 2**10)],
)
def test_so_many_tokens_are_projected_at_a_time_where_no_number_is_asked_for(vocabulary, devices, tokens):
    assert default_tokens(vocabulary, devices) == tokens


@pytest.mark.parametrize("attention", ["xla", "xla_tiles"])
@pytest.mark.parametrize(("remat", "within"), [("none", 0.34), ("dots", 0.05), ("full", 0.2), ("groups", 0.2)])
def test_the_activations_of_a_row_are_what_jax_keeps_of_it(remat, within, attention):
    """Of what jax would keep with `none`, the compiler recomputes what costs it nothing."""
    cfg = dataclasses.replace(DEEP, remat=remat, attn_implementation=attention)

    def kept(rows):
        def backward(params, batch):
            return jax.vjp(lambda p: hidden_states(cfg, p, batch.rows, window=T), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(backward, abstract_params(cfg), abstract_batch(rows)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    assert activation_bytes(cfg, T) == pytest.approx(kept(2) - kept(1), rel=within)
