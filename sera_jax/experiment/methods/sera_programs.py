"""The programs of SeRA ahead of time. Policies lie on disk between its phases, so nothing is beside those of training,
and only the parameters are beside those of sampling."""

from __future__ import annotations

import dataclasses

from sera_jax.aot.programs import Program, scoring, training
from sera_jax.experiment.methods.sera_arms import settings_of
from sera_jax.experiment.planned import Planned, answer_scoring, answering, sampling_programs, starting_programs
from sera_jax.loops.review import SUPPORT_PROMPTS
from sera_jax.loops.sera_study import Round, SeraStudy, round_training, updates_of


def sera_programs(planned: Planned, study: SeraStudy) -> list[Program]:
    """In the order of the run. `study`: of `planned`."""
    given, sizes = planned.given, planned.sizes
    run, config = given.runtime, given.config
    of_round = round_training(study, config.sera, given.start, study.pool, Round("", 1))
    rounds = planned.count(r"round\d+")
    prompts = min(config.sera.bootstrap_prompts or sizes.prompts, sizes.prompts)
    supported = min(SUPPORT_PROMPTS, sizes.prompts)
    most = max(settings_of(config.sera, arm).num_samples for arm in config.sera.arms)
    drawn, support = planned.count(r"candidates\d*"), planned.count("support")
    candidates = planned.answered(most, config.sampling.max_new_tokens)
    scored = planned.count(r"candidates\d*_by_.*") * prompts * most + planned.count("support_by_.*") * supported
    out = [
        *starting_programs(planned),
        pair_scoring(planned, again=r"pool|reference\d+"),
        *training(
            run,
            dataclasses.replace(of_round, name="train"),
            config.train,
            "train",
            updates=rounds * updates_of(config.train, sizes.pairs),
            times=rounds,
        ),
        *sampling_programs(
            planned,
            [
                ("candidates", config.sampling, prompts, prompts * most, drawn),
                ("candidates", config.sampling, supported, supported, support),
                answering(planned),
            ],
        ),
    ]
    if scored:
        out.append(scoring(run, "score candidates", candidates, count=scored / len(candidates.responses)))
    return [*out, *answer_scoring(planned)]


def pair_scoring(planned: Planned, *, again: str) -> Program:
    """Scoring the offline pairs, in each phase whose name's last part is `again`, and the held-out ones."""
    sizes, pair = planned.sizes, planned.given.corpus.train[0].item
    count = planned.count(again) * sizes.pairs + planned.count("heldout") * sizes.heldout
    return scoring(planned.given.runtime, "score pairs", pair, count=count)
