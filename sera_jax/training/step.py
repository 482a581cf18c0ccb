"""The one update step: accumulate gradients over microbatches, clip, apply, refuse what is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sera_jax.mesh import ROW_AXES, host_to_global, replicated, state_shardings
from sera_jax.models.activations import ACTIVATION_BYTES, activation_bytes
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params, abstract_params
from sera_jax.models.parts import merge
from sera_jax.training.optimizer import apply_gradients, init_optimizer

Metrics = dict[str, Any]
# (params, microbatch) -> (loss summed over examples, weight of those examples, metrics as Means)
Objective = Callable[[Params, Any], tuple[jax.Array, jax.Array, Metrics]]


@struct.dataclass
class TrainState:
    """What an optimisation must keep to go on.

    `step` counts the updates of this phase. `ok` turns False at the first loss or gradient that is not finite; from
    then on every step leaves the state as it is, so `step` is the index of the batch that failed and the parameters are
    the last good ones.
    """

    params: Params
    opt_state: Any
    step: jax.Array
    ok: jax.Array


def init_state(params: Params, opt_state: Any) -> TrainState:
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32), jnp.ones((), bool))


def abstract_state(
    cfg: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    of_params: Callable[[Params], Params] = lambda params: params,
    *,
    master_weights: bool = True,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated.

    Args:
        of_params: from a decoder's parameters to those that are trained, such as `models.critic.critic_params`.
        master_weights: as in `init_optimizer`.
    """

    def make(decoder: Params) -> TrainState:
        params = of_params(decoder)
        return init_state(params, init_optimizer(optimizer, params, master_weights=master_weights))

    shapes = jax.eval_shape(make, abstract_params(cfg))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    accept: Callable[[Metrics], jax.Array] | None = None,
    noise: Callable[[Params, jax.Array], Params] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted (state, batch, frozen={}) -> (state, metrics); the state's buffers are donated.

    `frozen` are parameters that the objective sees beside the state's and that get no gradient: the other part of
    `models.parts.split`, where not all are trained.

    Every leaf of `batch` is [A, R, ...]: A microbatches whose rows are spread over the data axes of the mesh. The
    gradient is that of (sum of losses) / (sum of weights) over the whole batch, so it does not depend on A.

    Args:
        state: what `abstract_state` returns; its shardings are those of the result.
        accept: from the metrics of the whole batch, taken before the update, to whether it is done; one that is refused
            leaves the state as it is. The metrics then say `accepted`, 1 or 0.
        noise: from all parameters, and u32[2], the update and the microbatch, to those that the loss is computed of.
    """

    def gradients(
        params: Params, frozen: Params, micro: Any, place: jax.Array
    ) -> tuple[Params, tuple[jax.Array, Metrics]]:
        def total(p: Params) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
            whole = merge(p, frozen)
            loss, weight, metrics = objective(whole if noise is None else noise(whole, place), micro)
            return loss, (weight, metrics)

        grads, aux = jax.grad(total, has_aux=True)(params)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), aux

    def accumulated(
        params: Params, frozen: Params, batch: Any, step: jax.Array
    ) -> tuple[Params, tuple[jax.Array, Metrics]]:
        count = jax.tree.leaves(batch)[0].shape[0]
        places = jnp.stack(jnp.broadcast_arrays(step.astype(jnp.uint32), jnp.arange(count, dtype=jnp.uint32)), axis=1)
        first = jax.tree.map(lambda x: x[0], (batch, places))
        if count == 1:
            return gradients(params, frozen, *first)
        # From zeros, so that the program holds one forward and backward pass: with the first one before the loop, the
        # compiler gives each of the two its own activations.
        shapes = jax.eval_shape(gradients, params, frozen, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(
            lambda total, given: (jax.tree.map(jnp.add, total, gradients(params, frozen, *given)), None),
            zeros,
            (batch, places),
        )[0]

    def step(state: TrainState, batch: Any, frozen: Params = {}) -> tuple[TrainState, Metrics]:  # noqa: B006
        grads, (weight, metrics) = accumulated(state.params, frozen, batch, state.step)
        grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1e-30), grads)
        norm = optax.tree.norm(grads)
        params, opt_state = apply_gradients(optimizer, grads, state.opt_state, state.params)
        ok = state.ok & jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)

        taken = ok if accept is None else ok & accept(metrics)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(taken, new, old)

        new = TrainState(
            jax.tree.map(keep, params, state.params),
            jax.tree.map(keep, opt_state, state.opt_state),
            state.step + taken.astype(jnp.int32),
            ok,
        )
        metrics = {**metrics, "grad_norm": norm}
        return new, metrics if accept is None else metrics | {"accepted": taken.astype(jnp.float32)}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def microbatches_for(cfg: ModelConfig, rows: int, row_tokens: int, shards: int, *, asked: int = 0) -> int:
    """Into how many equal parts the rows of an update are split, to be computed one after the other.

    As few as let the activations of a part take ACTIVATION_BYTES on each device; single rows where that is too little
    for one. It follows from shapes alone, so a restart splits alike.

    Args:
        rows: R of the batch, a multiple of `shards`, the devices that rows are spread over.
        asked: this many, whatever they take; 0: not asked.
    """
    each = rows // shards
    most = max(1, ACTIVATION_BYTES // activation_bytes(cfg, row_tokens))
    return asked or next(parts for parts in range(1, each + 1) if each % parts == 0 and each // parts <= most)


def place_batch(batch: Any, microbatches: int, mesh: Mesh) -> Any:
    """Host arrays [A * R, ...] as device arrays [A, R, ...]: microbatches one after the other, rows over devices."""
    sharding = NamedSharding(mesh, PartitionSpec(None, ROW_AXES))

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:])

    return host_to_global(jax.tree.map(split, batch), sharding)
