"""What a method is to the rest of the house: one frozen row. The rows stand in `experiment.methods`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sera_jax.aot.programs import Program
from sera_jax.config import Config, DataGroup
from sera_jax.data.items import Item, PairItem
from sera_jax.evaluation.look import ArmLook
from sera_jax.evaluation.report import Report
from sera_jax.experiment.corpus import Corpus, Reader
from sera_jax.experiment.evaluator import Evaluator
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.losses.preference import ResolvedLoss

Outcome = tuple[dict[str, Policy], dict[str, Any]]  # the last policy of each arm, `sft` first; a part of the summary


@dataclasses.dataclass(frozen=True)
class Trains:
    """Trainings of one kind that a run makes.

    Attributes:
        what: in a word. group: the config group of its optimiser and batch.
        entries: what each goes over; empty where it is made on the way.
        updates: of each. times: how many there are.
    """

    what: str
    group: str
    entries: Sequence[Item | PairItem]
    updates: int
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a method is given to run with.

    Attributes:
        start: the SFT model, from which all arms start.
        base: what SFT started from; None where nothing made it and the method does not ask for it.
    """

    config: Config
    runtime: Runtime
    corpus: Corpus
    start: Policy
    base: Policy | None

    def evaluator(self, *, loss: ResolvedLoss | None = None, base: Policy | None = None) -> Evaluator:
        """What looks at policies: by `loss` on held-out pairs, by `base` at the coherent reward of answers."""
        config, corpus = self.config, self.corpus
        return Evaluator(
            run=self.runtime,
            loss=loss,
            pairs=corpus.heldout,
            prompts=corpus.eval_prompts,
            tokenizer=corpus.tokenizer,
            gold=corpus.gold,
            reference=self.start,
            settings=config.eval,
            sampling=config.sampling,
            base=base,
            demonstrations=corpus.heldout_demonstrations,
            tasks=corpus.eval_tasks,
            heldout_tasks=config.world.heldout_tasks,
        )


@dataclasses.dataclass(frozen=True)
class Arm:
    """One thing that a method runs from the SFT model: itself, an ablation, a control.

    Attributes:
        says: what it is, in a line.
        look: how it appears in pictures.
        how: what the method's own code needs to run it.
    """

    says: str
    look: ArmLook
    how: Any = None


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to align a model.

    Attributes:
        name: what `config.method` calls it. says: what it is, in a line.
        group: the config group whose `arms` name what is run. reads: all groups that only some methods read.
        arms: by name.
        check: raises ValueError, with the way out, where its fields contradict each other.
        announce: what a run says first.
        sources: fields of `data` -> files of the embedded world; the other sources are then empty.
        texts: the kind of rows, and the fields of `data`, that a tokenizer is trained on.
        read: its corpus.
        needs_base: it scores with the base beside the SFT model: both are kept, and must not be the same.
        phases: names of all phases of `run`. trains: its trainings, after SFT.
        run: all arms of the config.
        report: how its summary is checked and shown.
        programs: all that it compiles, of a run as planned (`experiment.planned.Planned`), for a look ahead of time.
        samples_pairs: whether it trains on pairs of its own answers, which may be longer than those of the data.
    """

    name: str
    says: str
    group: str
    reads: Sequence[str]
    arms: Mapping[str, Arm]
    check: Callable[[Config], None]
    announce: Callable[[Config], str]
    sources: Mapping[str, str]
    texts: tuple[str, Sequence[str]]
    read: Callable[[Config, DataGroup, str, Reader], Corpus]
    needs_base: bool
    phases: Callable[[Config, Corpus], list[str]]
    trains: Callable[[Config, Corpus], list[Trains]]
    run: Callable[[Experiment], Outcome]
    report: Report
    programs: Callable[[Any], list[Program]]
    samples_pairs: Callable[[Config], bool] = lambda config: False

    def check_arms(self, config: Config) -> None:
        """Raises ValueError for an arm that is unknown or named twice, and for none."""
        given = getattr(config, self.group).arms
        if [arm for arm in given if arm not in self.arms] or not given or len(set(given)) != len(given):
            raise ValueError(
                f"config.{self.group}.arms={given!r}; give each of {', '.join(self.arms)} at most once, "
                "and one at least"
            )


def looks(arms: Mapping[str, Arm]) -> dict[str, ArmLook]:
    """How the arms look, by name."""
    return {name: arm.look for name, arm in arms.items()}
