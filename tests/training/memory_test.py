"""Where memory goes: the logits of a large vocabulary never grow with the rows."""

import jax
import numpy as np

from sera_jax.core import PairBatch, Rows
from sera_jax.losses.preference import resolve
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params, hidden_states
from sera_jax.training.objectives import align_objective

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


def abstract_batch(rows):
    def of(*shape, dtype=np.int32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    laid = Rows(of(T), of(T), of(T), of(T), of(M), of(M), of(M), K)
    return PairBatch(laid, of(Q), of(Q), of(Q, dtype=np.float32), of(K, dtype=np.float32))


def peak_bytes(fn, rows):
    compiled = jax.jit(jax.grad(fn)).lower(abstract_params(CFG), abstract_batch(rows)).compile()
    memory = compiled.memory_analysis()
    # Not peak_memory_in_bytes: a CPU's leaves out what is alive only within the program.
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


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


def test_the_peak_of_the_gradient_at_a_large_vocabulary_does_not_grow_with_the_rows():
    """At a fixed number of chunk tokens (rows x columns), 1.2 x at most; without chunks the logits double it."""
    assert growth(4, lambda rows: CHUNK_TOKENS) < 1.2
    assert growth(4, lambda rows: rows * M) > 1.5
