"""PPO from one evaluation to the next: a phase of the work directory, restartable at any iteration."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sera_jax.checkpoint import load_tree
from sera_jax.checkpoint.papers import write_json
from sera_jax.checkpoint.retention import check_kept, let_go
from sera_jax.data.items import items_digest
from sera_jax.loops import cost
from sera_jax.loops.policy import Policy, write_part
from sera_jax.loops.ppo import Learner
from sera_jax.loops.ppo_checks import Watch
from sera_jax.loops.restartable import Span, run_to_end
from sera_jax.loops.runtime import NonFinite
from sera_jax.models.critic import HEAD, without_value_head
from sera_jax.models.parts import merge, split
from sera_jax.training.ppo_steps import PpoState
from sera_jax.writer import METRICS, read_records

# A copy of the state before an iteration is kept where it takes at most this much on a device.
SPARE_BYTES = 2**30

Iterate = Callable[[Learner, PpoState, int], tuple[PpoState, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Iterations `first` to `last`; `round` numbers it among the segments of its arm, from 1."""

    first: int
    last: int
    round: int


def train_segment(
    learner: Learner, iterate: Iterate, segment: Segment, previous: Policy
) -> tuple[Policy, dict[str, float]]:
    """The iterations of a segment from where `previous` ended (or, from iteration 1, from the SFT model).

    Returns:
        The policy, and what all iterations so far cost: `passes_tokens`.

    Raises:
        Preempted: when asked to stop; a checkpoint was saved. Else as the verbs of `Learner`.
    """
    study, arm = learner.study, learner.arm.name
    layout = study.run.layout
    inputs = {
        "arm": arm,
        "iterations": [segment.first, segment.last],
        "policies": [policy.digest for policy in (previous, study.sft, study.base)],
        "groups": [dataclasses.asdict(group) for group in (study.ppo, study.reward, study.train, study.sampling)],
        "prompts": [items_digest(learner.schedule.sft), items_digest(learner.schedule.new)],
        "seed": study.run.seed,
        "stop_ids": study.run.stop_ids,
        "rows": [layout.row_tokens, layout.share_prompt, "of the length that lays the fewest tokens"],
    }
    if not learner.trained.whole:
        inputs["trained"] = dataclasses.asdict(learner.trained)
    if (paying := learner.arm.reward_model) is not None:
        inputs["reward_model"] = [paying.model.digest, paying.shift, paying.scale]
    name = f"{arm}/iteration{segment.last}"
    work, kept = (lambda: _Iterations(learner, iterate, segment, previous)), "params" if learner.over is None else ""
    product, params = run_to_end(study.run, name, inputs, work, kept)
    if segment.first > 1:
        let_go(study.run.workdir, previous.path, "state")
    study.run.ledger.note(name, cost.of_lines(read_records(product.path / METRICS)[0]))
    policy = Policy(name, product.path, product.digest, trained=learner.trained, over=learner.over)
    if params is not None:
        study.run.hold(policy, params)
    return policy, product.json("spent.json")


class _Iterations:
    """The `Work` of a segment: an iteration a step."""

    unit = "iteration"

    def __init__(self, learner: Learner, iterate: Iterate, segment: Segment, previous: Policy) -> None:
        self.learner, self.iterate, self.segment, self.previous = learner, iterate, segment, previous
        group = learner.study.train
        self.abstract = learner.programs.abstract
        self.steps, self.save_steps, self.keep = segment.last, group.save_steps, group.save_total_limit
        self.keeps_spare = _device_bytes(self.abstract) <= SPARE_BYTES
        self.span = Span("ppo", learner.arm.name, segment.round)

    @functools.cached_property
    def watch(self) -> Watch:
        """What looks at the iterations; when first asked for, it has seen all that are in the log."""
        study, arm = self.learner.study, self.learner.arm.name
        watch = Watch(study.ppo, study.reward, study.train.learning_rate)
        lines, _ = read_records(study.run.workdir.root / METRICS)
        ours = [line for line in lines if (line["phase"], line["arm"]) == ("ppo", arm)]
        for line in sorted(ours, key=lambda line: line["step"]):
            if line["round"] <= self.segment.round:
                watch.warnings(line, line["step"])
        return watch

    def fresh(self) -> PpoState:
        learner, previous = self.learner, self.previous
        if self.segment.first > 1:
            check_kept(learner.study.run.workdir, previous.path, "state")
            return _state_after(previous, self.abstract)
        run = learner.study.run
        return learner.programs.start(run.adapted(run.params(previous), learner.trained))

    def done(self, state: PpoState) -> int:
        return int(jax.device_get(state.control.iteration))

    def step(self, state: PpoState, number: int) -> PpoState:
        writer = self.learner.study.run.writer
        spare = jax.tree.map(jnp.copy, state) if self.keeps_spare else None  # the updates donate the state
        try:
            state, metrics = self.iterate(self.learner, state, number)
        except NonFinite as error:
            if spare is None:
                raise
            raise NonFinite(f"{error}. The state before the iteration is saved", (spare, number - 1)) from None
        for text in self.watch.warnings(metrics, number):
            writer.announce(text)
        tokens = int(metrics["rollout/tokens"])
        writer.write(step=number, metrics=metrics | self.learner.timings(), tokens=tokens)
        return state

    def flush(self, state: PpoState, number: int) -> None:
        """Every iteration is written when it is done."""

    def notes(self, state: PpoState, number: int) -> dict[str, Any]:
        """Nothing waits."""
        return {}

    def take(self, notes: dict[str, Any]) -> None:
        """There are none."""

    def leave(self, folder: pathlib.Path, state: PpoState) -> dict[str, Any]:
        for text in self.watch.at_evaluation(self.segment.last):
            self.learner.study.run.writer.announce(text)
        spent = float(jax.device_get(state.control.passes_tokens))
        write_json(folder / "spent.json", {"passes_tokens": spent})
        write_part(folder, self.learner.trained, self.learner.over)
        return {"params": without_value_head(state.policy.params), "state": _rest(state)}

    def close(self) -> None:
        self.learner.release()


def _device_bytes(state: PpoState) -> int:
    """What a state of this abstract one takes on a device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))


def _rest(state: PpoState) -> PpoState:
    """The state without the policy's own parameters, which are saved beside it; a value head on them stays."""
    head, _ = split(state.policy.params, HEAD)
    return dataclasses.replace(state, policy=dataclasses.replace(state.policy, params=head))


def _state_after(previous: Policy, abstract: PpoState) -> PpoState:
    """The state that the segment of `previous` ended with."""
    rest = load_tree(previous.path / "state", _rest(abstract))
    params = load_tree(previous.path / "params", without_value_head(abstract.policy.params))
    return dataclasses.replace(rest, policy=dataclasses.replace(rest.policy, params=merge(params, rest.policy.params)))
