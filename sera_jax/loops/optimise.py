"""The verb `optimise`: a policy, batches and an objective in, a trained policy out. Restartable at any update."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
import optax

from sera_jax import memory
from sera_jax.checkpoint import Checkpoints, load_tree, save_tree
from sera_jax.config import TrainGroup
from sera_jax.core import Mean
from sera_jax.loops.runtime import NonFinite, Policy, Preempted, Runtime
from sera_jax.training.optimizer import init_optimizer, make_optimizer, schedule
from sera_jax.training.step import Objective, TrainState, abstract_state, init_state, make_step, place_batch


class Loader(Protocol):
    """Batches by number; a pure function of it, so a restart needs no iterator state."""

    @property
    def steps_per_epoch(self) -> int: ...

    def batch(self, step: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """One optimisation.

    Attributes:
        name: the phase and the trained policy's name.
        start: where the parameters come from.
        loader: the batches; window: no item of theirs is longer than this.
        objective: from the attention window to the objective; `computes` names what it computes (hashable).
        group: optimiser settings.
        updates: how many batches to train on.
        schedule_updates: updates that the learning-rate schedule spans; more than `updates` when later rounds
            continue it.
        continue_from: the policy whose optimiser state goes on; None starts afresh.
        updates_before: updates that state has done.
        log: (phase, arm, round) of the metrics.
        depends: what the batches depend on, JSON-able, for the manifest.
    """

    name: str
    start: Policy
    loader: Loader
    window: int
    objective: Callable[[int], Objective]
    computes: Any
    group: TrainGroup
    updates: int
    schedule_updates: int
    depends: dict[str, Any]
    continue_from: Policy | None = None
    updates_before: int = 0
    log: tuple[str, str, int] = ("train", "", 0)
    logging_steps: int = 10


def optimise(run: Runtime, task: Task) -> Policy:
    """Train; a phase of the work directory.

    Raises:
        NonFinite: naming the update, the record ids and the checkpoint of the last good state.
        Preempted: when asked to stop; a checkpoint was saved.
    """
    inputs = {
        "start": task.start.digest,
        "continue_from": task.continue_from.digest if task.continue_from else None,
        "group": dataclasses.asdict(task.group),
        "updates": [task.updates, task.schedule_updates, task.updates_before],
        "computes": str(task.computes),
        **task.depends,
    }
    product = run.workdir.phase(task.name, inputs, lambda folder: _optimise(run, task, folder))
    return Policy(task.name, product.path, product.digest)


def _optimise(run: Runtime, task: Task, folder: pathlib.Path) -> None:
    optimizer = make_optimizer(task.group, task.schedule_updates)
    abstract = abstract_state(run.cfg, optimizer, run.mesh)
    key = (task.computes, task.window, task.group, task.schedule_updates)
    if key not in run.steps:  # phases that compute the same thing share the jitted step
        run.steps[key] = make_step(task.objective(task.window), optimizer, abstract, run.mesh)
    step_fn = run.steps[key]
    checkpoints = Checkpoints(run.workdir.checkpoints(task.name), task.group.save_total_limit)
    try:
        state = checkpoints.restore(abstract)
        if state is None:
            state = _fresh_state(run, task, optimizer, abstract)
        run.release()
        memory.trim(cycles=True)  # reading parameters and moments left as much again
        state = _train(run, task, state, step_fn, checkpoints)
    finally:
        checkpoints.close()
    save_tree(folder / "params", state.params)
    save_tree(folder / "optimizer", state.opt_state)


def _fresh_state(run: Runtime, task: Task, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params = run.take(task.start)
    if task.continue_from is None:
        init = functools.partial(init_optimizer, optimizer)
        opt_state = jax.jit(init, out_shardings=shardings.opt_state)(params)
    else:
        opt_state = load_tree(task.continue_from.path / "optimizer", abstract.opt_state)
    # through jit, so that the state's buffers are the device's own, as the step donates them; donated, so that there is
    # one copy of them
    return jax.jit(init_state, donate_argnums=(0, 1), out_shardings=shardings)(params, opt_state)


def _train(run: Runtime, task: Task, state: TrainState, step_fn: Any, checkpoints: Checkpoints) -> TrainState:
    """The update loop. Host work of the next batch overlaps the device's; metrics are fetched when they are written."""
    group, (phase, arm, round_) = task.group, task.log
    done = int(jax.device_get(state.step))
    waiting: list[tuple[Any, Any]] = []
    with run.writer.phase(phase, arm=arm, round=round_, total_steps=task.updates, start_step=done):
        for step in range(done + 1, task.updates + 1):
            batch = task.loader.batch(step - 1)
            state, metrics = step_fn(state, place_batch(batch.arrays, run.microbatches(group, batch.tokens), run.mesh))
            waiting.append((batch, metrics))
            last = step == task.updates
            save = group.save_steps > 0 and step % group.save_steps == 0 and not last
            stop = run.stop_requested() and not last
            if last or save or stop or step % task.logging_steps == 0:
                _write(run, task, state, waiting, step, checkpoints)
                waiting = []
            else:
                run.writer.advance(step, tokens=batch.real_tokens)
            if save or stop:
                run.writer.sync()  # the metrics of a step are on disk before its checkpoint is
                checkpoints.save(step, state)
            if stop:
                raise Preempted(f"stopped in {task.name} after update {step}; the same command goes on from there")
        run.writer.sync()
    return state


def _write(
    run: Runtime,
    task: Task,
    state: TrainState,
    waiting: list[tuple[Any, Any]],
    step: int,
    checkpoints: Checkpoints,
) -> None:
    """Write the means of the metrics since the last write; stop the run where an update was refused."""
    host = jax.device_get([metrics for _, metrics in waiting])
    if not bool(jax.device_get(state.ok)):
        _stop_at_non_finite(run, task, state, waiting, step, checkpoints)
    batches = [batch for batch, _ in waiting]
    record: dict[str, Any] = dict(host[0])
    for metrics in host[1:]:
        for key, value in metrics.items():
            record[key] = record[key] + value if isinstance(value, Mean) else value
    real = sum(batch.real_tokens for batch in batches)
    record |= {
        "learning_rate": float(schedule(task.group, task.schedule_updates)(task.updates_before + step - 1)),
        "padding_fraction": 1 - real / sum(batch.tokens for batch in batches),
        "num_tokens": real,
        "epoch": step / task.loader.steps_per_epoch,
    }
    run.writer.write(step=step, metrics=record, tokens=batches[-1].real_tokens)


def _stop_at_non_finite(
    run: Runtime,
    task: Task,
    state: TrainState,
    waiting: list[tuple[Any, Any]],
    step: int,
    checkpoints: Checkpoints,
) -> None:
    good = int(jax.device_get(state.step))
    failed = waiting[good - step + len(waiting)][0]
    state = dataclasses.replace(state, ok=jax.device_put(np.ones((), bool), state.ok.sharding))
    if checkpoints.latest_step() != good:
        checkpoints.save(good, state)
    ids = ", ".join(failed.ids[:20]) + (" ..." if len(failed.ids) > 20 else "")
    raise NonFinite(
        f"{task.name}: the loss or gradient of update {good + 1} is not finite. Records of its batch: {ids}. "
        f"The last good state (update {good}) is saved in {run.workdir.checkpoints(task.name)}. "
        f"Lower the learning rate ({task.group.learning_rate}) or remove the records, "
        "and start with a new --config.workdir"
    )
