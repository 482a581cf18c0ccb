"""Supervised fine-tuning, and pretraining of a small base model from scratch: the same loop on other items."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from sera_jax.config import TrainGroup
from sera_jax.data.batches import ItemLoader
from sera_jax.data.items import Item
from sera_jax.data.packing import window_for
from sera_jax.loops.optimise import Task, optimise
from sera_jax.loops.runtime import Policy, Runtime, items_digest, row_multiple, stable_id
from sera_jax.mesh import row_shards
from sera_jax.training.objectives import sft_objective


def sft(
    run: Runtime,
    name: str,
    start: Policy,
    items: Sequence[Item],
    group: TrainGroup,
    *,
    max_row_shapes: int,
    logging_steps: int,
) -> Policy:
    """Train `start` on the responses of `items` by maximum likelihood (every response token counts the same)."""
    loader = ItemLoader(
        items,
        batch_size=group.batch_size,
        row_tokens=run.row_tokens,
        seed=run.seed,
        stream_indices=(stable_id(name),),
        row_multiple=row_multiple(group, run.mesh),
        max_row_shapes=max_row_shapes,
    )
    updates = group.max_steps or group.num_train_epochs * loader.steps_per_epoch
    objective = functools.partial(_objective, run)
    task = Task(
        name=name,
        start=start,
        loader=loader,
        window=window_for(items, run.row_tokens),
        objective=objective,
        computes=("nll", run.chunk_tokens),
        group=group,
        updates=updates,
        schedule_updates=updates,
        depends={"items": items_digest(items), "seed": run.seed, "row_tokens": run.row_tokens},
        log=(name, "", 0),
        logging_steps=logging_steps,
    )
    return optimise(run, task)


def _objective(run: Runtime, window: int):
    return sft_objective(run.cfg, window=window, chunk_tokens=run.chunk_tokens, shards=row_shards(run.mesh))
