"""The critic: a decoder with a scalar head, which says for every scored token what return the state before it promises.

Its parameters are those of the decoder and, beside them, `value_head` [D]. A critic of its own has no vocabulary
projection; a head on the policy shares the policy's parameters.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sera_jax.core import Rows
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params, hidden_states
from sera_jax.models.parts import merge, split

HEAD = "value_head"


def critic_config(cfg: ModelConfig) -> ModelConfig:
    """The shape of a critic that is a model of its own: without the output projection of untied embeddings."""
    return dataclasses.replace(cfg, tie_word_embeddings=True)


def with_value_head(params: Params) -> Params:
    """The parameters with a value head of zeros, so that a new critic says 0 everywhere; other leaves are shared."""
    scale = params["final_norm"]["scale"]
    return merge(params, {HEAD: jnp.zeros(scale.shape, scale.dtype)})


def without_value_head(params: Params) -> Params:
    """The decoder's own parameters."""
    return split(params, HEAD)[1]


def critic_params(params: Params) -> Params:
    """A critic started from a policy's parameters: its decoder without the output projection, and a head of zeros."""
    return with_value_head(split(params, "head")[1])


def read_values(hidden: jax.Array, value_head: jax.Array, rows: Rows) -> jax.Array:
    """Value of the state that each scored token is chosen in, f32[R, M]; 0 at unused places.

    Args:
        hidden: [R, T, D] final hidden states; value_head: [D].
    """
    values = jnp.einsum("rtd,d->rt", hidden, value_head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return jnp.where(rows.slot < rows.num_slots, jnp.take_along_axis(values, rows.source, axis=1), 0.0)


def row_values(cfg: ModelConfig, params: Params, rows: Rows, *, window: int) -> jax.Array:
    """`read_values` of the critic's own hidden states. Arguments as in `decoder.hidden_states`."""
    return read_values(hidden_states(cfg, params, rows, window=window), params[HEAD], rows)
