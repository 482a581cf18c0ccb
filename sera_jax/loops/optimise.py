"""The verb `optimise`: a policy, batches and an objective in, a trained policy out. Restartable at any update."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sera_jax.checkpoint import load_tree
from sera_jax.checkpoint.retention import check_kept, let_go
from sera_jax.config import TrainGroup
from sera_jax.core import Mean, Stream, key_for
from sera_jax.data.planning import Shapes
from sera_jax.loops import cost, shapes
from sera_jax.loops.policy import Policy, part_of, write_part
from sera_jax.loops.restartable import Span, run_to_end
from sera_jax.loops.runtime import NonFinite, Runtime
from sera_jax.mesh import host_to_global
from sera_jax.models.critic import critic_params
from sera_jax.models.lora import dropping
from sera_jax.models.parts import merge
from sera_jax.models.trained import ALL, Trained
from sera_jax.training.optimizer import init_optimizer, make_optimizer, schedule
from sera_jax.training.step import Objective, TrainState, abstract_state, init_state, make_step, place_batch
from sera_jax.writer import METRICS, read_records

# The batch of update 1, 2, ... of this training, given the state before it, with frozen parameters too. A pure function
# of both, so that a restart needs no iterator state; what reads the state (a policy that makes its own pairs) does so
# without donating it.
Batches = Callable[[TrainState, int], Any]


@dataclasses.dataclass(frozen=True)
class Updates:
    """How many updates, and where they lie in the learning-rate schedule.

    Attributes:
        count: batches to train on.
        planned: updates that the schedule spans; more than `count` when later rounds go on with it.
        before: updates that the optimiser state has seen already.
    """

    count: int
    planned: int
    before: int = 0


@dataclasses.dataclass(frozen=True)
class Target:
    """What is minimised.

    Attributes:
        computes: names it (hashable); phases that compute the same share a compiled step.
        window: no item of the batches is longer than this many tokens.
        make: the objective, made where it is not compiled yet.
        scalar: what is trained is a reward model: a decoder with a scalar head, from the start's own decoder.
    """

    computes: Any
    window: int
    make: Callable[[], Objective]
    scalar: bool = False


@dataclasses.dataclass(frozen=True)
class Training:
    """One optimisation.

    Attributes:
        name: the phase and the trained policy's name.
        start: where the parameters come from.
        batches: by update; depends: what they depend on, JSON-able, for the manifest.
        epoch_updates: how many make an epoch, for the log.
        target: what is minimised. group: optimiser settings. updates: how many. trained: what moves.
        span: what the log counts the updates in.
        continue_from: the policy whose optimiser state goes on; None starts afresh.
        last_of: the policy whose optimiser state nothing reads once this is done: it is let go.
        shapes: what the batches are planned for, left for later trainings (`loops.shapes`); None: nobody asks.
    """

    name: str
    start: Policy
    batches: Batches
    epoch_updates: int
    depends: dict[str, Any]
    target: Target
    group: TrainGroup
    updates: Updates
    span: Span
    continue_from: Policy | None = None
    last_of: Policy | None = None
    trained: Trained = ALL
    shapes: Callable[[], Shapes] | None = None


def optimise(run: Runtime, training: Training) -> Policy:
    """Train; a phase of the work directory.

    Raises:
        NonFinite: naming the update, the record ids and the checkpoint of the last good state.
        Preempted: when asked to stop; a checkpoint was saved.
    """
    updates = training.updates
    inputs = {
        "start": training.start.digest,
        "continue_from": training.continue_from.digest if training.continue_from else None,
        "group": dataclasses.asdict(training.group),
        "updates": [updates.count, updates.planned, updates.before],
        "computes": str(training.target.computes),
        **training.depends,
    }
    trained = training.trained
    if not trained.whole:
        inputs["trained"] = dataclasses.asdict(trained)
    over = run.over(training.start, trained)
    kept = part_of(training.target.scalar) if over is None else ""
    product, params = run_to_end(run, training.name, inputs, lambda: _Optimisation(run, training), kept)
    if training.last_of is not None:
        let_go(run.workdir, training.last_of.path, "optimizer")
    run.ledger.note(training.name, cost.of_lines(read_records(product.path / METRICS)[0]))
    policy = Policy(training.name, product.path, product.digest, training.target.scalar, trained, over)
    if params is not None:
        run.hold(policy, params)
    return policy


@dataclasses.dataclass(frozen=True)
class UpdatePrograms:
    """The compiled functions of a training.

    Attributes:
        of_params: from a decoder's parameters to those of what is trained, of which a part may be frozen.
        init: (params) -> optimiser state. join: (params, optimiser state) -> the first state, in their buffers.
        update: (state, batch, frozen) -> (state, metrics), see `make_step`; shared by all that compute the same.
        abstract: shapes, dtypes and shardings of the state.
    """

    of_params: Callable[[Any], Any]
    init: Callable[..., Any]
    join: Callable[..., TrainState]
    update: Callable[..., tuple[TrainState, dict[str, Any]]]
    abstract: TrainState


def update_programs(run: Runtime, training: Training) -> UpdatePrograms:
    """What `optimise` runs; nothing is compiled before it is called."""
    group, target, planned = training.group, training.target, training.updates.planned
    optimizer, master = make_optimizer(group, planned), dict(master_weights=group.master_weights)
    of_params = critic_params if target.scalar else lambda params: params
    trained = training.trained
    abstract = abstract_state(run.cfg, optimizer, run.mesh, lambda params: trained.part(of_params(params)), **master)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return UpdatePrograms(
        of_params=of_params,
        init=jax.jit(functools.partial(init_optimizer, optimizer, **master), out_shardings=shardings.opt_state),
        # through jit, so that the buffers are the device's own, as the step donates them; donated, so that there is one
        # copy of them
        join=jax.jit(init_state, donate_argnums=(0, 1), out_shardings=shardings),
        update=run.compiled(
            ("update", target.computes, target.window, group, planned, trained),
            lambda: make_step(target.make(), optimizer, abstract, run.mesh, noise=_noise(run, trained)),
        ),
        abstract=abstract,
    )


def _noise(run: Runtime, trained: Trained) -> Callable[[Any, jax.Array], Any] | None:
    """The dropout of adapters, drawn anew for every update and microbatch of a phase (`make_step`)."""
    lora = trained.lora
    if lora is None or not lora.dropout:
        return None
    key = key_for(run.seed, Stream.DROPOUT)
    return lambda params, place: dropping(lora, params, functools.reduce(jax.random.fold_in, place, key))


MOSTLY = 0.5  # of the tokens laid: with more filling than this, a run says so


class _Waiting(NamedTuple):
    """An update of which no line is written yet; its metrics may be on the device."""

    number: int
    ids: list[str]
    tokens: int
    real_tokens: int
    metrics: dict[str, Any]
    spent: Mapping[str, float]


class _Optimisation:
    """The `Work` of one training: an update a step. Host work of the next batch overlaps the device's, so metrics wait
    on the device until they are written."""

    unit = "update"

    def __init__(self, run: Runtime, training: Training) -> None:
        self.run, self.training = run, training
        self.programs, group = update_programs(run, training), training.group
        self.abstract = self.programs.abstract
        self.steps, self.span = training.updates.count, training.span
        self.save_steps, self.keep = group.save_steps, group.save_total_limit
        self.waiting: list[_Waiting] = []
        self.real, self.laid, self.told = 0, 0, False
        self._frozen: Any = None

    @property
    def frozen(self) -> Any:
        """The parameters that do not move, read when first asked for."""
        if self._frozen is None:
            training = self.training
            self._frozen = self.run.divided(training.start, training.trained, self.programs.of_params)[1]
        return self._frozen

    def fresh(self) -> TrainState:
        run, before, training = self.run, self.training.continue_from, self.training
        if training.trained.whole:
            params = self.programs.of_params(run.take(training.start))
        else:
            params, self._frozen = run.divided(training.start, training.trained, self.programs.of_params)
        if before is None:
            opt_state = self.programs.init(params)
        else:
            check_kept(run.workdir, before.path, "optimizer")
            opt_state = load_tree(before.path / "optimizer", self.abstract.opt_state)
        return self.programs.join(params, opt_state)

    def done(self, state: TrainState) -> int:
        return int(jax.device_get(state.step))

    def step(self, state: TrainState, number: int) -> TrainState:
        run, group = self.run, self.training.group
        frozen = () if self.training.trained.whole else (self.frozen,)
        whole = dataclasses.replace(state, params=merge(state.params, *frozen)) if frozen else state
        batch = self.training.batches(whole, number)
        parts = run.microbatches(group, batch.tokens)
        state, metrics = self.programs.update(state, place_batch(batch.arrays, parts, run.mesh), *frozen)
        metrics = {**metrics, **batch.metrics}
        self.waiting.append(_Waiting(number, batch.ids, batch.tokens, batch.real_tokens, metrics, dict(batch.spent)))
        run.writer.advance(number, tokens=batch.real_tokens)
        if number % run.logging_steps == 0:
            self.flush(state, number)
        return state

    def flush(self, state: TrainState, number: int) -> None:
        """Write the means of the metrics since the last write; stop the run where an update was refused."""
        if not self.waiting:
            return
        updates_made = self._fetched(state, number)
        self.waiting = []
        record: dict[str, Any] = {}
        for made in updates_made:
            for key, value in made.metrics.items():
                record[key] = record[key] + value if isinstance(value, Mean) and key in record else value
            for kind, passes in made.spent.items():
                record[f"cost/{kind}"] = record.get(f"cost/{kind}", 0.0) + passes
        real, laid = sum(made.real_tokens for made in updates_made), sum(made.tokens for made in updates_made)
        self._tell_of_filling(real, laid)
        training, updates = self.training, self.training.updates
        record |= {
            "learning_rate": float(schedule(training.group, updates.planned)(updates.before + number - 1)),
            "padding_fraction": 1 - real / laid,
            "num_tokens": real,
            "epoch": number / training.epoch_updates,
        }
        self.run.writer.write(step=number, metrics=record)

    def _tell_of_filling(self, real: int, laid: int) -> None:
        """Once, where most of what is computed is filling because rows come in a multiple of many."""
        self.real, self.laid = self.real + real, self.laid + laid  # the last update of an epoch is often a small one
        layout = self.run.layout.accumulated(self.training.group.gradient_accumulation_steps)
        multiple = math.lcm(layout.planned, layout.dealt)
        share = 1 - self.real / self.laid
        if share <= MOSTLY or multiple == 1 or self.told:
            return
        self.told = True
        self.run.writer.announce(
            f"{self.training.name}: {share:.0%} of the tokens laid are filling: rows of {layout.row_tokens} come in "
            f"multiples of {multiple} (config.data.row_multiple={layout.multiple}, {layout.shards} of the devices, "
            f"{layout.microbatches} of gradient_accumulation_steps); lower one of these, or config.data.row_tokens, or "
            "raise batch_size"
        )

    def notes(self, state: TrainState, number: int) -> dict[str, Any]:
        """The updates that wait, to the bit: their means go on as if nothing had come between."""
        waiting = [made for made in self._fetched(state, number) if made.number <= number]
        return {"waiting": [made._replace(metrics=_to_json(made.metrics))._asdict() for made in waiting]}

    def take(self, notes: dict[str, Any]) -> None:
        waiting = [_Waiting(**{"spent": {}, **fields}) for fields in notes["waiting"]]  # a version before had none
        self.waiting = [made._replace(metrics=_from_json(made.metrics)) for made in waiting]

    def _fetched(self, state: TrainState, number: int) -> list[_Waiting]:
        """What waits, with its metrics on the host; raises NonFinite where an update was refused."""
        if self.waiting and not bool(jax.device_get(state.ok)):
            raise self._non_finite(state, number)
        return [made._replace(metrics=jax.device_get(made.metrics)) for made in self.waiting]

    def leave(self, folder: pathlib.Path, state: TrainState) -> dict[str, Any]:
        trained = self.training.trained
        write_part(folder, trained, self.run.over(self.training.start, trained))
        if self.training.shapes is not None:
            shapes.write(folder, self.training.shapes())
        return {part_of(self.training.target.scalar): state.params, "optimizer": state.opt_state}

    def close(self) -> None:
        self.waiting = []

    def _non_finite(self, state: TrainState, number: int) -> NonFinite:
        training = self.training
        good = int(jax.device_get(state.step))
        failed = next(made for made in self.waiting if made.number == good + 1)
        state = dataclasses.replace(state, ok=host_to_global(np.ones((), bool), state.ok.sharding))
        ids = ", ".join(failed.ids[:20]) + (" ..." if len(failed.ids) > 20 else "")
        return NonFinite(
            f"{training.name}: the loss or gradient of update {good + 1} is not finite. Records of its batch: {ids}. "
            f"The last good state (update {good}) is saved in {self.run.workdir.checkpoints(training.name)}. "
            f"Lower the learning rate ({training.group.learning_rate}) or remove the records, "
            "and start with a new --config.workdir",
            good=(state, good),
        )


def _to_json(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics on the host as JSON holds them: a Mean as total and weight, a number of numpy's with its dtype."""

    def number(value: Any) -> Any:
        return [value.dtype.name, value.item()] if hasattr(value, "dtype") else value

    means = {
        name: {"total": number(m.total), "weight": number(m.weight)}
        for name, m in metrics.items()
        if isinstance(m, Mean)
    }
    return {name: means[name] if name in means else number(value) for name, value in metrics.items()}


def _from_json(metrics: dict[str, Any]) -> dict[str, Any]:
    """What `_to_json` was given."""

    def number(value: Any) -> Any:
        return np.dtype(value[0]).type(value[1]) if isinstance(value, list) else value

    return {
        name: Mean(number(value["total"]), number(value["weight"])) if isinstance(value, dict) else number(value)
        for name, value in metrics.items()
    }
