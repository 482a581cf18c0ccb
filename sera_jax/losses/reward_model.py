"""The loss of a reward model on preference pairs: Bradley and Terry's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sera_jax.core import Array


def bradley_terry(*, chosen: Array, rejected: Array) -> jax.Array:
    """-log sigmoid(chosen - rejected) of each pair, f32[...] from scores f32[...].

    Source: Bradley and Terry 1952; as the loss of a reward model, Ouyang et al. 2022, eq. 1.
    """
    return jax.nn.softplus(jnp.float32(rejected) - jnp.float32(chosen))
