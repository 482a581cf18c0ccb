"""A run as it will be, with nothing done, and the programs that every method has. `experiment.ahead` makes it."""

from __future__ import annotations

import dataclasses
import functools
import re

from sera_jax.aot.programs import Program, first_parameters, full_items, params_on, scoring, shapes_of, training
from sera_jax.aot.sampler import Use, sampler
from sera_jax.config import SamplingGroup
from sera_jax.data.items import Item
from sera_jax.experiment.method import Experiment
from sera_jax.loops.sera_study import updates_of
from sera_jax.loops.sft import sft_training
from sera_jax.models.decoder import Params


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many there are of each; `assumed`: of which sources nobody knows."""

    pairs: float
    demonstrations: float
    pretrain: float
    prompts: float
    heldout: float
    eval_prompts: float
    assumed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run with nothing done. The corpus has as many rows as one update takes; `sizes` has the run's.

    Attributes:
        names: of all its phases.
    """

    given: Experiment
    sizes: Sizes
    names: frozenset[str]

    @functools.cached_property
    def models(self) -> tuple[Params, Params]:
        """Shapes of the base and of the SFT model as they lie on the mesh; what they share in memory is shared here."""
        run, given = self.given.runtime, self.given
        assert given.base is not None
        base = shapes_of(run, given.base, {})
        return base, shapes_of(run, given.start, base)

    def count(self, last: str) -> int:
        """Of phases whose name's last part is this pattern."""
        return sum(re.fullmatch(last, name.split("/")[-1]) is not None for name in self.names)

    @property
    def prompt(self) -> Item:
        """The longest."""
        return self.given.corpus.prompts[0]

    def answered(self, count: int, longest: int) -> Item:
        """The longest prompt with so many answers of so many tokens, or as many as a row holds."""
        room = self.given.runtime.layout.row_tokens - len(self.prompt.prompt)
        fitting = max(1, min(count, room // longest))
        return full_items(1, len(self.prompt.prompt), *[min(longest, room)] * fitting)[0]


def starting_programs(planned: Planned, *, more_sft: float = 0.0) -> list[Program]:
    """Of the base and the SFT model; `more_sft`: updates of SFT that arms make."""
    given, sizes = planned.given, planned.sizes
    run, config, corpus = given.runtime, given.config, given.corpus
    assert given.base is not None
    out: list[Program] = []
    if "init" in planned.names:
        out += first_parameters(run, "init: largest parameter")
    if "pretrain" in planned.names:
        texts = sft_training(run, "pretrain", given.base, corpus.pretrain, config.pretrain, adapted=False)
        updates = updates_of(config.pretrain, sizes.pretrain)
        out += training(run, texts, config.pretrain, "pretrain", updates=updates)
    if not config.model.sft_model_path or more_sft:
        tuned = sft_training(run, "sft", given.base, corpus.demonstrations, config.sft)
        own = 0 if config.model.sft_model_path else updates_of(config.sft, sizes.demonstrations)
        out += training(run, tuned, config.sft, "sft", updates=own + more_sft)
    return out


def sampling_programs(planned: Planned, uses: list[tuple[str, SamplingGroup, float, float, int]]) -> list[Program]:
    """Of phases that sample with nothing beside the parameters.

    Args:
        uses: (name, settings, prompts, answers, phases) of each; those without phases are left out.
    """
    run = planned.given.runtime
    by_length: dict[tuple[int, int], list[Use]] = {}
    for name, settings, prompts, answers, phases in uses:
        if phases:
            use = Use(name, run.sampling_params(settings), prompts, answers, phases)
            by_length.setdefault((settings.slots, settings.max_new_tokens), []).append(use)
    longest, params = len(planned.prompt.prompt), params_on(run)
    return [
        program
        for (slots, _), those in by_length.items()
        for program in sampler(run, those, slots=slots, longest=longest, params=params)
    ]


def answering(planned: Planned) -> tuple[str, SamplingGroup, float, float, int]:
    """The use of the sampler that answers the held-out prompts, at whatever temperatures."""
    count, settings = planned.sizes.eval_prompts, planned.given.evaluator().answer_settings()
    return "answers", settings, count, count, planned.count(r"generations(_at_.*)?")


def scored_answers(planned: Planned) -> float:
    """How many answers to held-out prompts are scored, a policy that scores them counted by itself."""
    return planned.count(r"(generations|draws)_by_.*") * planned.sizes.eval_prompts


def answer_scoring(planned: Planned) -> list[Program]:
    """Scoring those answers, where that is all that scores answers."""
    if not (count := scored_answers(planned)):
        return []
    answer = planned.answered(1, answering(planned)[1].max_new_tokens)
    return [scoring(planned.given.runtime, "score answers", answer, count=count)]
