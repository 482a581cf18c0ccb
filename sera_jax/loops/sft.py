"""Supervised fine-tuning, and pretraining of a small base model from scratch: the same loop on other items."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from sera_jax.config import TrainGroup
from sera_jax.data.batches import ItemLoader
from sera_jax.data.items import Item, items_digest
from sera_jax.data.packing import window_for
from sera_jax.loops.optimise import Target, Training, Updates, optimise
from sera_jax.loops.restartable import Span
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.mesh import row_shards
from sera_jax.models.trained import Trained
from sera_jax.training.objectives import sft_objective


def sft(
    run: Runtime, name: str, start: Policy, items: Sequence[Item], group: TrainGroup, *, adapted: bool = True
) -> Policy:
    """Train `start` on the responses of `items` by maximum likelihood (every response token counts the same).

    Args:
        adapted: train the run's adapters, where it has some; a base model has none.
    """
    return optimise(run, sft_training(run, name, start, items, group, adapted=adapted))


def sft_training(
    run: Runtime, name: str, start: Policy, items: Sequence[Item], group: TrainGroup, *, adapted: bool = True
) -> Training:
    """What `sft` does, not yet done."""
    loader = ItemLoader(
        items,
        run.layout.accumulated(group.gradient_accumulation_steps),
        batch_size=group.batch_size,
        seed=run.seed,
        stream_indices=(zlib.crc32(name.encode()) & 0x7FFFFFFF,),  # of the few names there are
    )
    shards, chunk = row_shards(run.mesh), run.chunk_tokens
    window = window_for(items, run.layout.row_tokens)
    updates = group.max_steps or group.num_train_epochs * loader.steps_per_epoch
    return Training(
        name=name,
        start=start,
        batches=lambda state, update: loader.batch(update - 1),
        epoch_updates=loader.steps_per_epoch,
        depends={"items": items_digest(items), "seed": run.seed, "row_tokens": run.layout.row_tokens},
        target=Target(
            computes=("nll", chunk),
            window=window,
            make=lambda: sft_objective(run.cfg, window=window, chunk_tokens=chunk, shards=shards),
        ),
        group=group,
        trained=Trained(group.trainable, run.lora if adapted else None),
        updates=Updates(updates, planned=updates),
        span=Span(name),
    )
