"""Optimisers and schedules from optax, by the names users know."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sera_jax.config import TrainGroup

MAX_STEPS = 2**31 - 1


def schedule(group: TrainGroup, total_steps: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up over `warmup_ratio` of all updates, then constant, linear or cosine."""
    warmup = round(group.warmup_ratio * total_steps)
    rest = max(1, total_steps - warmup)
    decay = {
        "constant": optax.constant_schedule(group.learning_rate),
        "linear": optax.linear_schedule(group.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(group.learning_rate, rest),
    }[group.lr_scheduler_type]
    if warmup == 0:
        return decay
    # the first update already moves: 1 / warmup of the peak, not 0
    ramp = optax.linear_schedule(group.learning_rate / warmup, group.learning_rate, max(1, warmup - 1))
    return optax.join_schedules([ramp, decay], [warmup])


class MasterWeights(NamedTuple):
    """Optimiser state of parameters that are stored in less than float32.

    Attributes:
        master: the parameters in float32, before they are rounded to what is stored.
        rule: state of the optimiser, for `master`.
    """

    master: Any
    rule: Any


def init_optimizer(optimizer: optax.GradientTransformation, params: Any, *, master_weights: bool = True) -> Any:
    """Optimiser state for `params`: float32 whatever they are, as gradients are, so that no update changes a dtype.

    Args:
        master_weights: hold `params` in float32 in the state, unless they are in float32 themselves.
    """
    master = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    rule = optimizer.init(master)
    rounded = any(p.dtype != jnp.float32 for p in jax.tree.leaves(params))
    return MasterWeights(master, rule) if master_weights and rounded else rule


def apply_gradients(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """Parameters and optimiser state after an update; with a master copy it moves that, and the parameters are it
    rounded. A parameter by itself takes no step of less than half its last place: 1/512 of it in bfloat16."""
    if not isinstance(opt_state, MasterWeights):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state
    updates, rule = optimizer.update(grads, opt_state.rule, opt_state.master)
    master = optax.apply_updates(opt_state.master, updates)
    return jax.tree.map(lambda m, p: m.astype(p.dtype), master, params), MasterWeights(master, rule)


def make_optimizer(group: TrainGroup, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimiser of a TrainGroup, over a schedule of `total_steps` updates.

    Raises:
        ValueError: there are more updates than a 32-bit integer counts.
    """
    if total_steps > MAX_STEPS:
        raise ValueError(
            f"{total_steps} updates are more than are counted ({MAX_STEPS}); lower num_train_epochs="
            f"{group.num_train_epochs} or max_steps={group.max_steps}, or what multiplies them (rounds, iterations)"
        )
    rate = schedule(group, total_steps)
    if group.optim == "adamw":
        rule = optax.adamw(
            rate, b1=group.adam_beta1, b2=group.adam_beta2, eps=group.adam_epsilon, weight_decay=group.weight_decay
        )
    elif group.optim == "lion":
        rule = optax.lion(rate, b1=group.adam_beta1, b2=group.adam_beta2, weight_decay=group.weight_decay)
    else:
        # optax's own weight_decay_rate takes that share off in every update, whatever the learning rate is
        decay = optax.add_decayed_weights(-group.weight_decay)
        rule = optax.chain(optax.adafactor(None), decay, optax.scale_by_schedule(rate))
    return optax.chain(optax.clip_by_global_norm(group.max_grad_norm), rule)
