"""Online DPO as a row of the table: an update at a time on pairs that the policy has just sampled and ranked itself."""

from __future__ import annotations

from typing import Any

from sera_jax.aot.programs import Program
from sera_jax.config import Config
from sera_jax.evaluation import look, picture
from sera_jax.evaluation.look import ArmLook
from sera_jax.evaluation.report import ARM, Report, number, percent, plain
from sera_jax.experiment.corpus import Corpus, of_pairs
from sera_jax.experiment.evaluator import phases as evaluated
from sera_jax.experiment.method import Arm, Experiment, Method, Outcome, Trains, looks
from sera_jax.experiment.methods.online_programs import online_programs
from sera_jax.experiment.methods.sera import (
    PAIR_ARM_COLUMNS,
    PAIR_LEGEND,
    PAIR_SOURCES,
    check_pairs,
    check_sampled_pairs,
    loss_of,
    refuse_unread,
    study_of,
)
from sera_jax.experiment.planned import Planned
from sera_jax.loops import cost
from sera_jax.loops.brake import LIMITS
from sera_jax.loops.online import offline, online, segments, self_made, with_reference
from sera_jax.loops.sera_study import updates_of

# Fields of `sera` on how pairs are made that are of its rounds alone.
_OF_ROUNDS = (
    "judge",
    "bootstrap_from",
    "bootstrap_band",
    "support_quantile",
    "agreement",
    "ensemble_gamma",
    "reference",
    "replay_fraction",
    "label_smoothing",
    *LIMITS,
)
# An arm is where the pairs of its updates come from.
ARMS = {
    "online_dpo": Arm("the method", ArmLook("online DPO", look.VERMILION, "o"), self_made),
    "daa": Arm("as many updates on the offline pairs again", ArmLook("DAA alone", look.BLUE, "s"), offline),
}


def run(given: Experiment) -> Outcome:
    """Every arm from the SFT model; the summary gets `arms`, `rounds` (the evaluations, by update) and `loss`."""
    config, loss = given.config, loss_of(given.config)
    evaluator = given.evaluator(loss=loss)
    evaluator.look_at(given.start, 0)
    ledger = given.runtime.ledger
    with ledger.account() as of_all:
        study = with_reference(study_of(given, loss, evaluator.look_at))
    sft = evaluator.of_arm(given.start) | cost.facts(ledger.of(given.start.name))
    arms: dict[str, dict[str, Any]] = {"sft": sft}
    rounds: list[dict[str, Any]] = []
    final = {"sft": given.start}
    for arm in config.online.arms:
        with ledger.account() as spent:
            final[arm], facts = online(study, config.online, arm, ARMS[arm].how(study))
        rounds += facts
        arms[arm] = evaluator.of_arm(final[arm]) | cost.facts([*of_all.values(), *spent.values()])
    return final, {"arms": arms, "rounds": rounds, "loss": loss.as_dict()}


def phases(config: Config, corpus: Corpus) -> list[str]:
    """Of every arm, and of the evaluation of its policies and of the SFT model."""
    ends = [last for _, last in segments(config.online)]
    arms = [f"{arm}/update{last}" for arm in config.online.arms for last in ends]
    final = {"sft", *(f"{arm}/update{ends[-1]}" for arm in config.online.arms)}
    looks_at = []
    for policy in ("sft", "round1", *arms):
        looks_at += evaluated(policy, corpus, config.eval, pairs=True, last=policy in final)
    return ["sft/pool", "round1", *arms, *looks_at]


def trains(config: Config, corpus: Corpus) -> list[Trains]:
    """Round 1, and what every arm makes after it."""
    first = updates_of(config.train, sum(len(pair.pairs) for pair in corpus.train))
    return [
        Trains("round", "train", corpus.train, first),
        Trains("arm", "train", [], config.online.updates, len(config.online.arms)),
    ]


def check(config: Config) -> None:
    """Raises ValueError, with the way out, where fields contradict each other."""
    check_pairs(config)
    refuse_unread(config.sera, _OF_ROUNDS, f"method={config.method!r}")
    if "online_dpo" in config.online.arms:
        check_sampled_pairs(config)


def _samples(config: Config) -> bool:
    return any(ARMS[arm].how is self_made for arm in config.online.arms)


def programs(planned: Planned) -> list[Program]:
    """All that it compiles."""
    config = planned.given.config
    study = study_of(planned.given, loss_of(config), None)
    return online_programs(planned, study, samples=_samples(config), trainings=len(config.online.arms))


ONLINE_DPO = Method(
    name="online_dpo",
    says="a direct alignment loss, an update at a time, on pairs that the policy has just sampled and ranked itself",
    group="online",
    reads=("loss", "sera", "online"),
    arms=ARMS,
    check=check,
    announce=lambda config: f"loss {loss_of(config)}, online",
    sources=PAIR_SOURCES,
    texts=("preference", ("train",)),
    read=of_pairs,
    needs_base=False,
    phases=phases,
    trains=trains,
    run=run,
    report=Report(
        arm_columns=PAIR_ARM_COLUMNS,
        round_columns=[
            ARM,
            ("update", plain("update")),
            ("gold", number("gold_mean", 3)),
            ("accuracy", percent("heldout_accuracy")),
            ("on shorter", percent("heldout_accuracy_shorter")),
            ("tokens", number("response_tokens_mean", 1)),
        ],
        legend=PAIR_LEGEND,
        draw=lambda summary, path: picture.draw_rounds(summary, path, looks(ARMS)),
    ),
    programs=programs,
    samples_pairs=_samples,
)
