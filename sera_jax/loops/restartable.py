"""The one loop that may be stopped at any step and gone on with: SFT, alignment and PPO are its three uses.

A piece of `Work` says how its state starts, what a step does, and what it leaves behind; `run_to_end` owns everything
else: going on from the newest checkpoint, saving, stopping, and the order in which metrics and checkpoints reach the
disk (a step's metrics before its checkpoint, so that a restart never lacks a line; those of which no line is due yet
within the checkpoint, so that a stop adds none).

A checkpoint knows the lines before it by their digest, and the product holds a copy of all its lines, which its
manifest vouches for: `metrics.jsonl` lies open to everybody, and the summary is not made from it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from sera_jax import memory
from sera_jax.checkpoint import Checkpoints, CorruptCheckpoint, Product
from sera_jax.checkpoint.papers import write_jsonl
from sera_jax.loops.runtime import NonFinite, Preempted, Runtime
from sera_jax.writer import METRICS, SpanKey, digest_of_lines, key_of, read_records, without_clock

LOWER = (
    "take more devices; or, under a new --config.workdir, lower the model's size, config.data.row_tokens, "
    "config.sampling.slots (where it samples) or the batch_size of config.pretrain, config.sft, config.reward_model or "
    "config.train (whichever it trains by), raise gradient_accumulation_steps there, or set config.model.remat='full'"
)
State = TypeVar("State")


class Span(NamedTuple):
    """What the log counts the steps in: (phase, arm, round, before) of `MetricWriter.span`."""

    phase: str
    arm: str = ""
    round: int = 0
    before: int = 0

    @property
    def key(self) -> SpanKey:
        return SpanKey(self.phase, self.arm, self.round)


class Work(Protocol[State]):
    """What is repeated. A state is a tree of arrays; a step may donate the one it is given.

    Attributes:
        abstract: shapes, dtypes and shardings of the state.
        steps: the step at which the work is done; the first is step 1.
        save_steps: a checkpoint every so many steps; 0: only where the work is stopped.
        keep: checkpoints kept.
        span, unit: what the log counts, and how a message calls a step ("update").
    """

    abstract: State
    steps: int
    save_steps: int
    keep: int
    span: Span
    unit: str

    def fresh(self) -> State:
        """The state before step 1."""
        ...

    def done(self, state: State) -> int:
        """How many steps the state has behind it."""
        ...

    def step(self, state: State, number: int) -> State:
        """Step `number`; what it raises ends the loop, with the last whole state saved."""
        ...

    def flush(self, state: State, number: int) -> None:
        """Write the metrics of all steps up to `number` that are not written yet."""
        ...

    def notes(self, state: State, number: int) -> dict[str, Any]:
        """Those metrics as JSON can hold them, for a checkpoint; raises as `flush`."""
        ...

    def take(self, notes: dict[str, Any]) -> None:
        """Go on with the notes of the checkpoint that the work goes on from."""
        ...

    def leave(self, folder: pathlib.Path, state: State) -> dict[str, Any]:
        """What the phase leaves: trees to save by name; small files are written into the folder here."""
        ...

    def close(self) -> None:
        """Let go of what only this work holds in memory."""
        ...


class Ended(NamedTuple):
    """What a work came to: its product and, where it was made just now, one of the trees that it left, which need not
    be on disk yet."""

    product: Product
    tree: Any | None


def run_to_end(
    run: Runtime, name: str, inputs: dict[str, Any], begin: Callable[[], Work[State]], kept: str = ""
) -> Ended:
    """The phase `name`: found on disk, or worked out from its newest checkpoint, or from its start.

    Args:
        inputs: what the work depends on, JSON-able; the product's manifest and every checkpoint hold it.
        begin: makes the work; called only where there is something to do.
        kept: the name of the tree that is returned as well; all others are let go.

    Raises:
        StaleWorkdir: the product or the checkpoint there is of other inputs.
        Preempted: when asked to stop; everything is saved, or the message names the newest checkpoint.
        NonFinite, ValueError: as the work's steps; the last whole state is saved, but where memory ran out.
    """

    trees: dict[str, Any] = {}

    def produce(folder: pathlib.Path) -> dict[str, Any]:
        trees.update(_produce(run, name, inputs, begin(), folder))
        return trees

    product = run.workdir.phase(name, inputs, produce, LOWER)
    tree = trees.get(kept)
    if trees:
        trees.clear()
        memory.trim()
    own, _ = read_records(product.path / METRICS)
    if own and run.writer.digest(key := key_of(own[0])) != digest_of_lines(own):
        there = [without_clock(line) for line in run.writer.lines(key)]
        if there == own[: len(there)]:  # none, or those before a stop: another run made it, see `checkpoint.shared`
            run.writer.restore(own)
        else:
            run.writer.announce(
                f"warning: {run.workdir.root / METRICS} no longer has the lines of {name} as they were written; "
                f"{product.path / METRICS}, from which the summary is made, has"
            )
    return Ended(product, tree)


def _produce(
    run: Runtime, name: str, inputs: dict[str, Any], work: Work[State], folder: pathlib.Path
) -> dict[str, Any]:
    checkpoints = Checkpoints(run.workdir.checkpoints(name), work.keep, inputs)
    try:
        if checkpoints.latest_step() is not None:
            run.release()  # what the work would have begun with
        state = checkpoints.restore(work.abstract)
        if state is None:
            state = work.fresh()
        else:
            work.take(checkpoints.notes["work"])
        run.release()
        memory.trim(cycles=True)  # reading a state leaves as much again behind
        state = _repeat(run, name, work, state, checkpoints)
    finally:
        checkpoints.close()
        work.close()
    trees = work.leave(folder, state)
    write_jsonl(folder / METRICS, map(without_clock, run.writer.lines(work.span.key)))
    return trees


def _repeat(run: Runtime, name: str, work: Work[State], state: State, checkpoints: Checkpoints) -> State:
    def save(state: State, number: int) -> None:
        """Raises NonFinite, with the good state saved, where an update that waits for its line was refused."""
        if checkpoints.latest_step() != number:
            try:
                notes = {"work": work.notes(state, number), "span": list(key), "lines": run.writer.digest(key)}
            except NonFinite as error:
                if error.good is not None:
                    save(*error.good)
                raise
            run.writer.sync()
            run.workdir.settle()  # what the work began with is on disk before what came of it
            checkpoints.save(number, state, notes)

    def newest() -> str:
        last = checkpoints.latest_step()
        return "none" if last is None else f"{work.unit} {last}"

    def stopped(where: str, saved: bool) -> Preempted:
        whence = "there" if saved else f"its newest checkpoint ({newest()})"
        return Preempted(f"stopped in {name} {where}; the same command goes on from {whence}")

    def one(state: State, number: int) -> State:
        try:
            state = work.step(state, number)
        except (NonFinite, memory.OutOfMemory):  # the one says itself what is good; no room to save for the other
            raise
        except (Preempted, ValueError) as error:
            if saved := _is_whole(state):  # the step came to nothing before it took the state apart
                save(state, number - 1)
            if not isinstance(error, Preempted):
                raise
            raise stopped(
                f"after {work.unit} {number - 1}" if saved else f"within {work.unit} {number}", saved
            ) from None
        last = number == work.steps
        stop = run.stop_requested() and not last
        due = work.save_steps > 0 and number % work.save_steps == 0 and not last
        if last or due:
            work.flush(state, number)
        if stop or due:
            save(state, number)
        if stop:
            raise stopped(f"after {work.unit} {number}", True)
        return state

    done = work.done(state)
    phase, arm, round_, before = work.span
    key = work.span.key
    with run.writer.span(phase, arm=arm, round=round_, total_steps=work.steps, start_step=done, before=before):
        if checkpoints.notes and run.writer.digest(key) != checkpoints.notes["lines"]:
            raise CorruptCheckpoint(
                f"{run.workdir.root / METRICS} no longer has the lines of {name} as they were when its checkpoint of "
                f"{work.unit} {done} was written; delete {run.workdir.checkpoints(name)} and start the same command "
                "again, which does that phase anew"
            )
        for number in range(done + 1, work.steps + 1):
            try:
                state = one(state, number)
            except NonFinite as error:
                if error.good is not None:
                    save(*error.good)
                elif _is_whole(state):
                    save(state, number - 1)
                else:
                    raise NonFinite(f"{error}. Newest checkpoint of {name}: {newest()}") from None
                raise
        run.writer.sync()
    return state


def _is_whole(state: Any) -> bool:
    return not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
