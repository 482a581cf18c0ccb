"""Self-Rewarding PPO as a row of the table: its arms, what it reads, what it runs, how it is shown."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from sera_jax.aot.programs import Program
from sera_jax.config import Config, DataGroup
from sera_jax.data.items import unique_prompts
from sera_jax.evaluation import iterations, look
from sera_jax.evaluation.look import ArmLook
from sera_jax.evaluation.report import (
    ARM,
    COST,
    COST_COLUMN,
    GOLD,
    GOLD_AT,
    KL,
    KL_COLUMN,
    OUT_OF_DOMAIN,
    Report,
    interval,
    number,
    percent,
    plain,
)
from sera_jax.experiment.corpus import Corpus, Reader, of_demonstrations
from sera_jax.experiment.evaluator import Evaluator
from sera_jax.experiment.evaluator import phases as evaluated
from sera_jax.experiment.method import Arm, Experiment, Method, Outcome, Trains, looks
from sera_jax.experiment.methods.srppo_programs import srppo_programs
from sera_jax.experiment.methods.srppo_rules import REWARD_MODEL, check
from sera_jax.experiment.planned import Planned
from sera_jax.loops import cost
from sera_jax.loops.controls import best_of_n, sft_equal_compute, sft_longer
from sera_jax.loops.reward_model import pair_accuracy, reward_model, reward_model_phases
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sera_study import updates_of
from sera_jax.loops.srppo import RANDOM_REWARD, REINFORCE, REWARD_MODEL_ARM, SRPPO_ARM, segments, srppo
from sera_jax.loops.srppo_study import PpoArm, SrppoStudy
from sera_jax.sampling import Sample
from sera_jax.training.ppo_steps import TRAIN_PASSES
from sera_jax.writer import METRICS, RESERVED, read_records


@dataclasses.dataclass
class Arms:
    """The arms of one run, and what they leave: policies, facts, rounds, and what PPO cost."""

    given: Experiment
    study: SrppoStudy
    evaluator: Evaluator
    final: dict[str, Policy]
    facts: dict[str, dict[str, Any]]
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    passes_tokens: float = 0.0  # of the method itself

    def trained(self, arm: str, policy: Policy) -> None:
        self.final[arm] = policy
        self.facts[arm] = self.evaluator.of_arm(policy)

    def answered(self, arm: str, answers: list[Sample]) -> None:
        self.evaluator.show_answers(arm, answers)
        self.facts[arm] = self.evaluator.facts_of_answers(arm, answers)
        self.evaluator.say(arm, self.facts[arm])


def ppo(how: PpoArm) -> Callable[[Arms], None]:
    """An arm that PPO trains."""

    def run_arm(arms: Arms) -> None:
        policy, facts = srppo(arms.study, how)
        arms.rounds += facts
        if how is SRPPO_ARM:
            arms.passes_tokens = facts[-1]["passes_tokens"]
        arms.trained(how.name, policy)

    return run_arm


def by_reward_model(arms: Arms) -> None:
    """PPO with a reward model, which is trained first."""
    paying = reward_model(arms.study)
    found = pair_accuracy(arms.study, paying.model)
    held_out = "held-out" if arms.study.heldout_pairs else "training"
    (right,) = found.values()
    arms.study.run.writer.announce(
        f"reward model: scores the chosen side higher in {right:.1%} of the {held_out} pairs"
    )
    ppo(dataclasses.replace(REWARD_MODEL_ARM, reward_model=paying))(arms)
    arms.facts[REWARD_MODEL] |= found


def more_sft(arms: Arms) -> None:
    policy = sft_longer(arms.study, arms.given.config.sft)
    arms.evaluator.look_at(policy, 1)
    arms.trained("sft_longer", policy)


def as_much_sft(arms: Arms) -> None:
    policy = sft_equal_compute(arms.study, arms.given.config.sft, arms.passes_tokens)
    arms.evaluator.look_at(policy, 1)
    arms.trained("sft_equal_compute", policy)


def re_ranked(arms: Arms) -> None:
    """Not trained: the best of several answers of the SFT model, drawn as rollouts are."""
    config, evaluator = arms.given.config, arms.evaluator
    settings = dataclasses.replace(evaluator.answer_settings(), temperature=config.sampling.temperature)
    arms.answered("best_of_n", best_of_n(arms.study, arms.given.corpus.eval_prompts, settings))


ARMS: dict[str, Arm] = {
    "srppo": Arm("the method", ArmLook("SRPPO", look.VERMILION, "o"), ppo(SRPPO_ARM)),
    "random_reward": Arm(
        "PPO on normal noise of the coherent reward's mean and variance",
        ArmLook("random reward", look.GREEN, "^"),
        ppo(RANDOM_REWARD),
    ),
    "reinforce": Arm(
        "the batch mean of the returns in place of the critic",
        ArmLook("REINFORCE", look.PURPLE, "D"),
        ppo(REINFORCE),
    ),
    REWARD_MODEL: Arm(
        "PPO with a Bradley-Terry reward model, trained on preference pairs",
        ArmLook("PPO, reward model", look.BROWN, "s"),
        by_reward_model,
    ),
    "sft_longer": Arm(
        "SFT of the base with `ppo.sft_longer_factor` times the updates",
        ArmLook("SFT longer", look.BLUE, dashes=(0, (8, 2))),
        more_sft,
    ),
    "best_of_n": Arm(
        "no training: the SFT model's answer of the largest coherent reward among `ppo.best_of`",
        ArmLook("best of {best_of}", look.ORANGE, dashes=(0, (7, 2, 1.5, 2))),
        re_ranked,
    ),
    "sft_equal_compute": Arm(
        "SFT with as many updates as SFT and PPO together cost",
        ArmLook("SFT, equal compute", look.SKY, dashes=(0, (1, 1.2))),
        as_much_sft,
    ),
}
# Those that PPO trains.
PPO_ARMS = {
    "srppo": SRPPO_ARM,
    "random_reward": RANDOM_REWARD,
    "reinforce": REINFORCE,
    REWARD_MODEL: REWARD_MODEL_ARM,
}
_SFT_LOOK = ArmLook("SFT", look.GREY, dashes=(0, (4, 3)))


def run(given: Experiment) -> Outcome:
    """Every arm from the SFT model. The summary gets `arms`, `rounds` (the evaluations of the PPO arms), `prompts` (how
    many of which kind) and `iterations` (their metrics)."""
    config, corpus = given.config, given.corpus
    if "best_of_n" in config.ppo.arms and not corpus.eval_prompts:
        raise ValueError(
            "config.ppo.arms has best_of_n, which answers held-out prompts, and there are none; name held-out "
            f"demonstrations in config.data.eval, raise config.data.eval_fraction={config.data.eval_fraction}, or take "
            "best_of_n out"
        )
    evaluator = given.evaluator(base=given.base)
    evaluator.look_at(given.start, 0)
    study = study_of(given, evaluator)
    ledger = given.runtime.ledger
    sft = evaluator.of_arm(given.start) | cost.facts(ledger.of(given.start.name))
    arms = Arms(given, study, evaluator, {"sft": given.start}, {"sft": sft})
    for name in sorted(config.ppo.arms, key=lambda name: ARMS[name].how is as_much_sft):  # given what the method cost
        with ledger.account() as spent:
            ARMS[name].how(arms)
        arms.facts[name] |= cost.facts(spent.values())
    ordered = ("sft", *config.ppo.arms)
    return {arm: arms.final[arm] for arm in ordered if arm in arms.final}, {
        "arms": {arm: arms.facts[arm] for arm in ordered},
        "rounds": arms.rounds,
        "prompts": prompt_counts(config, corpus),
        "iterations": iteration_metrics(product.path for product in given.runtime.workdir.done.values()),
    }


def phases(config: Config, corpus: Corpus) -> list[str]:
    """Of every arm, and of the evaluation of its policies and of the SFT model."""

    def evaluation(name: str, trained: bool = True, last: bool = False) -> list[str]:
        return evaluated(name, corpus, config.eval, base=True, trained=trained, last=last)

    names = evaluation("sft", last=True)
    for arm in config.ppo.arms:
        if ARMS[arm].how is re_ranked:
            candidates = [f"{arm}/candidates{by}" for by in ("", "_by_sft", "_by_base")]
            names += [*candidates, *evaluation(arm, trained=False)]
            continue
        if ARMS[arm].how is by_reward_model:
            names += reward_model_phases(held_out=bool(corpus.heldout_reward_pairs))
        by_sft = ARMS[arm].how in (more_sft, as_much_sft)
        policies = [arm] if by_sft else [f"{arm}/iteration{segment.last}" for segment in segments(config.ppo)]
        for policy in policies:
            names += [policy, *evaluation(policy, last=policy == policies[-1])]
    return names


def trains(config: Config, corpus: Corpus) -> list[Trains]:
    """The iterations of PPO, the reward model, and longer SFT; as much SFT as PPO cost is known when PPO is done."""
    ppo, arms = config.ppo, config.ppo.arms
    updates = ppo.num_ppo_epochs * ppo.num_mini_batches
    found = [Trains("iteration", "train", [], updates, ppo.iterations * sum(arm in PPO_ARMS for arm in arms))]
    if corpus.reward_pairs:
        pairs = sum(len(pair.pairs) for pair in corpus.reward_pairs)
        found.append(
            Trains("reward model", "reward_model", corpus.reward_pairs, updates_of(config.reward_model, pairs))
        )
    if "sft_longer" in arms:
        longer = ppo.sft_longer_factor * updates_of(config.sft, len(corpus.demonstrations))
        found.append(Trains("longer SFT", "sft", corpus.demonstrations, longer))
    return [one for one in found if one.times]


def study_of(given: Experiment, evaluator: Evaluator) -> SrppoStudy:
    """What PPO and its controls are given."""
    config, corpus = given.config, given.corpus
    assert given.base is not None, "Self-Rewarding PPO scores with the base"
    return SrppoStudy(
        run=given.runtime,
        base=given.base,
        sft=given.start,
        reward=config.reward,
        ppo=config.ppo,
        train=config.train,
        sampling=config.sampling,
        demonstrations=corpus.demonstrations,
        prompts=corpus.prompts,
        evaluate=evaluator.look_at,
        gold=corpus.gold,
        texts=evaluator.texts,
        rollout_iterations=config.log.rollout_iterations,
        reward_model=config.reward_model,
        pairs=corpus.reward_pairs,
        heldout_pairs=corpus.heldout_reward_pairs,
    )


def read_corpus(config: Config, data: DataGroup, heldout_prompts: str, read: Reader) -> Corpus:
    """Demonstrations and prompts, and the pairs of a reward model where an arm trains one."""
    return of_demonstrations(config, data, heldout_prompts, read, with_pairs=REWARD_MODEL in config.ppo.arms)


def prompt_counts(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Which prompts there are: of the demonstrations, new ones (and those left out, by reason), held out."""
    return {
        "sft": len(unique_prompts(corpus.demonstrations)),
        "new": len(corpus.prompts),
        "overlap": config.ppo.prompt_overlap,
        **{f"left_out_{reason}": count for reason, count in corpus.prompts_left_out.items()},
        "heldout": len(corpus.eval_prompts),
    }


def iteration_metrics(phases: Iterable[pathlib.Path]) -> list[dict[str, Any]]:
    """Of the PPO lines that phases hold (they know no clock): `arm`, `iteration` and every finite metric."""
    out = []
    for record in (record for folder in phases for record in read_records(folder / METRICS)[0]):
        if record["phase"] == "ppo":
            numbers = {
                name: value
                for name, value in record.items()
                if name not in RESERVED and isinstance(value, int | float) and math.isfinite(value)
            }
            out.append({"arm": record["arm"], "iteration": record["step"], **numbers})
    return out


def programs(planned: Planned) -> list[Program]:
    """All that it compiles."""
    config, sizes = planned.given.config, planned.sizes
    study = study_of(planned.given, planned.given.evaluator(base=planned.given.base))
    own = updates_of(config.sft, sizes.demonstrations)
    # a sampling, four scorings and two trainings in each epoch, against the one training of SFT
    passes = 5 + 2 * TRAIN_PASSES * config.ppo.num_ppo_epochs
    more = config.ppo.iterations * config.train.batch_size * passes / (TRAIN_PASSES * config.sft.batch_size)
    costs = {"sft_longer": config.ppo.sft_longer_factor * own, "sft_equal_compute": own + more}
    return srppo_programs(
        planned,
        study,
        {name: PPO_ARMS[name] for name in config.ppo.arms if name in PPO_ARMS},
        more_sft={name: costs[name] for name in config.ppo.arms if name in costs},
        pays=REWARD_MODEL,
    )


REPORT = Report(
    arm_columns=[
        ARM,
        ("gold [95 %]", interval("gold", 3)),
        ("wins vs sft", percent("win_rate_vs_sft")),
        ("right", percent("answer_accuracy")),
        ("well-formed", percent("wellformed_fraction")),
        ("pairs", percent("reward_model_accuracy")),
        ("coherent [95 %]", interval("coherent_reward", 2)),
        ("corr.", number("coherent_reward_length_corr", 2)),
        KL_COLUMN,
        ("NLL", number("heldout_nll", 3)),
        ("tokens", number("response_tokens_mean", 1)),
        ("ended", percent("eos_fraction")),
        COST_COLUMN,
    ],
    round_columns=[
        ARM,
        ("iteration", plain("iteration")),
        ("gold", number("gold_mean", 3)),
        ("right", percent("answer_accuracy")),
        ("well-formed", percent("wellformed_fraction")),
        ("coherent", number("coherent_reward_mean", 2)),
        ("corr.", number("coherent_reward_length_corr", 2)),
        KL_COLUMN,
        ("NLL", number("heldout_nll", 3)),
        ("tokens", number("response_tokens_mean", 1)),
        ("ended", percent("eos_fraction")),
    ],
    legend=[
        GOLD,
        GOLD_AT,
        OUT_OF_DOMAIN,
        ("answer_accuracy", "right", "answers whose last match of eval.answer_pattern is the reference's"),
        ("wellformed_fraction", "well-formed", "answers in which eval.answer_pattern is found"),
        ("reward_model_accuracy", "pairs", "held-out pairs whose chosen side the reward model scores higher"),
        (
            "coherent_reward_mean",
            "coherent",
            "log pi_sft - log pi_base, nats per answer. PPO optimises it: a gain must show in {outcomes}",
        ),
        ("coherent_reward_length_corr", "corr.", "correlation of the coherent reward with the answer's length"),
        KL,
        ("heldout_nll", "NLL", "of held-out demonstrations, nats per token; it rises as a policy forgets them"),
        ("eos_fraction", "ended", "answers that ended within the token limit"),
        COST,
    ],
    draw=lambda summary, path: iterations.draw(summary, path, {**looks(ARMS), "sft": _SFT_LOOK}),
    # NLL only where neither is there: a policy that sharpens loses likelihood even where it gains
    outcomes=("gold", "right"),
    keys={"iterations": list, "prompts": dict},
    counts=("round", "iteration"),
    lists={"iterations": "iteration"},
)
SRPPO = Method(
    name="srppo",
    says="Self-Rewarding PPO: PPO whose reward is log pi_sft - log pi_base, from demonstrations alone",
    group="ppo",
    reads=("reward", "ppo", "reward_model"),
    arms=ARMS,
    check=check,
    announce=lambda config: f"coherent reward: {config.reward}",
    sources={
        "train": "preferences.jsonl",
        "eval": "heldout_demonstrations.jsonl",
        "demonstrations": "demonstrations.jsonl",
        "pretrain": "pretrain.jsonl",
        "prompts": "prompts.jsonl",
    },
    texts=("demonstration", ("demonstrations", "pretrain")),
    read=read_corpus,
    needs_base=True,
    phases=phases,
    trains=trains,
    run=run,
    report=REPORT,
    programs=programs,
)
