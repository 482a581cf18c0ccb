"""SeRA as a row of the table: its rules, what it reads, what it runs, how it is shown."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from sera_jax.config import Config, SeraGroup
from sera_jax.evaluation import picture
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
    shares,
)
from sera_jax.experiment.corpus import Corpus, of_pairs
from sera_jax.experiment.evaluator import phases as evaluated
from sera_jax.experiment.method import Experiment, Method, Outcome, Trains, looks
from sera_jax.experiment.methods.sera_arms import (
    ANCHORED,
    ARMS,
    DEFAULTS,
    NOISE_AWARE,
    OF_THE_REWARD,
    SMOOTHING,
    settings_of,
)
from sera_jax.experiment.methods.sera_programs import sera_programs
from sera_jax.guards import REASONS
from sera_jax.loops import cost
from sera_jax.loops.rewards import Reward, implicit
from sera_jax.loops.sera import phases as sera_phases
from sera_jax.loops.sera import sera
from sera_jax.loops.sera_study import SeraStudy, updates_of
from sera_jax.losses.preference import ResolvedLoss, resolve
from sera_jax.sampling.engine import check_answers


def run(given: Experiment) -> Outcome:
    """Every arm from the SFT model; the summary gets `arms`, `rounds` and `loss`."""
    config = given.config
    loss = loss_of(config)
    evaluator = given.evaluator(loss=loss)
    evaluator.look_at(given.start, 0)
    study = study_of(given, loss, evaluator.look_at)
    ledger = given.runtime.ledger
    sft = evaluator.of_arm(given.start) | cost.facts(ledger.of(given.start.name))
    arms: dict[str, dict[str, Any]] = {"sft": sft}
    rounds: list[dict[str, Any]] = []
    final = {"sft": given.start}
    for arm in config.sera.arms:
        settings, own = settings_of(config.sera, arm), loss_of_arm(config, arm)
        of_arm = dataclasses.replace(study, loss=own, own_loss=own != loss, ranking=ranking_of(own, settings))
        with ledger.account() as spent:
            final[arm], facts = sera(of_arm, arm, settings)
        rounds += facts
        arms[arm] = evaluator.of_arm(final[arm]) | {"updates": _updates(facts)} | cost.facts(spent.values())
        if arm in NOISE_AWARE:
            arms[arm]["label_smoothing"] = smoothing_of(config)
        if arm in ANCHORED:
            arms[arm]["nll_coef"] = dict(own.hyper)["nll_coef"]
    return final, {"arms": arms, "rounds": rounds, "loss": loss.as_dict()}


def _updates(facts: list[dict[str, Any]]) -> int:
    """Of the policy that an arm's rounds ended with: the last, or the one that `brake` went back to."""
    last = next((fact["round"] for fact in facts if "kept_as_result" in fact), len(facts))
    return sum(fact["updates"] for fact in facts[:last])


def phases(config: Config, corpus: Corpus) -> list[str]:
    """Of every arm, and of the evaluation of its policies and of the SFT model; fewer are made where a brake ends the
    rounds of an arm early."""
    names, policies, last = [], ["sft"], ["sft"]
    for arm in config.sera.arms:
        settings = settings_of(config.sera, arm)
        bootstraps = round(settings.bootstrap_fraction * len(corpus.train)) > 0 and bool(corpus.prompts)
        loss, own_loss = loss_of(config), loss_of_arm(config, arm) != loss_of(config)
        of_arm, trained = sera_phases(
            arm, settings, bootstraps=bootstraps, uses_reference=loss.uses_reference, own_loss=own_loss
        )
        names += of_arm
        policies += trained
        last += trained[-1:]
    for policy in policies:
        names += evaluated(policy, corpus, config.eval, pairs=True, last=policy in last)
    return names


def trains(config: Config, corpus: Corpus) -> list[Trains]:
    """The rounds of all arms; a brake may end them early."""
    rounds = {name for name in phases(config, corpus) if re.fullmatch(r"round\d+", name.rpartition("/")[2])}
    updates = updates_of(config.train, sum(len(pair.pairs) for pair in corpus.train))
    return [Trains("round", "train", corpus.train, updates, len(rounds))]


def study_of(given: Experiment, loss: ResolvedLoss, evaluate: Any) -> SeraStudy:
    """What the rounds of every arm share."""
    config, corpus = given.config, given.corpus
    return SeraStudy(
        run=given.runtime,
        sft=given.start,
        loss=loss,
        settings=config.sera,
        train=config.train,
        sampling=config.sampling,
        pool=corpus.train,
        prompts=corpus.prompts,
        ranking=ranking_of(loss, config.sera),
        text=corpus.tokenizer.decode_response,
        evaluate=evaluate,
        gold=corpus.gold,
    )


def ranking_of(loss: ResolvedLoss, settings: SeraGroup) -> Reward:
    """What orders a prompt's candidates by the settings of an arm."""
    return implicit(loss, likelihood_weight=settings.likelihood_weight, reduction=settings.ranking_reduction)


def loss_of(config: Config) -> ResolvedLoss:
    """The config's loss with all its hyper-parameters."""
    return resolve(**dataclasses.asdict(config.loss))


def loss_of_arm(config: Config, arm: str) -> ResolvedLoss:
    """The config's loss; that of a noise-aware arm, with the config's other hyper-parameters; or with an anchor."""
    loss = loss_of(config)
    own: dict[str, Any] = {}
    if arm in NOISE_AWARE:
        own = {"name": NOISE_AWARE[arm], "label_smoothing": smoothing_of(config)}
    elif arm in ANCHORED and config.loss.nll_coef is None and not dict(loss.hyper)["nll_coef"]:
        own = {"nll_coef": ANCHORED[arm]}
    return resolve(**dataclasses.asdict(config.loss) | own)


def smoothing_of(config: Config) -> float:
    """The share of flipped labels that the noise-aware arms are told."""
    given = config.sera.label_smoothing
    return given if given is not None else config.data.label_noise or SMOOTHING


def announce(config: Config) -> str:
    """The loss, and those of arms that have another."""
    loss = loss_of(config)
    others = [f"{arm}: {own}" for arm in config.sera.arms if (own := loss_of_arm(config, arm)) != loss]
    return "; ".join([f"loss {loss}", *others])


def check(config: Config) -> None:
    """Raises ValueError, with the way out, where fields contradict each other."""
    sera = config.sera
    check_pairs(config)
    _check_noise_aware(config)
    check_band("band", sera.band)
    check_band("bootstrap_band", sera.bootstrap_band)
    if sera.selection == "threshold" and sera.threshold is None:
        raise ValueError("config.sera.selection='threshold' needs config.sera.threshold (nats)")
    for field, rule in (("threshold", "threshold"), ("band", "middle")):
        value = getattr(sera, field)
        if value is not None and sera.selection != rule:
            raise ValueError(
                f"config.sera.{field}={value} is read by selection={rule!r} only, "
                f"but selection={sera.selection!r}; change one of them"
            )
    if sera.selection in ("threshold", "none") or sera.band is not None:
        refuse_unread(sera, ("keep_rule",), f"selection={sera.selection!r}, band={sera.band}")
    if sera.selection == "none":
        refuse_unread(sera, ("replay_fraction",), "selection='none'")
    if sera.bootstrap_fraction == 0:
        unread = (*OF_THE_REWARD, "bootstrap_band", "support_quantile", "stop_kl", "stop_unsupported")
        refuse_unread(sera, unread, "bootstrap_fraction=0")
    if sera.bootstrap_from == "sft":
        refuse_unread(sera, ("stop_kl",), "bootstrap_from='sft'")
    if sera.support_quantile == 0:
        refuse_unread(sera, ("stop_unsupported",), "support_quantile=0")
    if sera.judge != "policy":
        refuse_unread(sera, (*OF_THE_REWARD, "likelihood_weight", "ranking_reduction"), f"judge={sera.judge!r}")
    arms = [settings_of(sera, arm) for arm in sera.arms]
    if bootstrapping := [arm for arm in arms if arm.rounds > 1 and arm.bootstrap_fraction > 0]:
        check_sampled_pairs(config)
        _check_judges(config, bootstrapping)


def refuse_unread(sera: SeraGroup, fields: Sequence[str], where: str) -> None:
    """Raises ValueError for a field that is set although nothing reads it `where`."""
    for field in fields:
        value, default = getattr(sera, field), getattr(DEFAULTS, field)
        if value != default:
            raise ValueError(
                f"config.sera.{field}={value!r} is not read with {where}; leave it at {default!r}, or change the other"
            )


def _check_noise_aware(config: Config) -> None:
    """Raises ValueError where arms that are told the share of flipped labels cannot be, or nobody is told it."""
    arms = [arm for arm in config.sera.arms if arm in NOISE_AWARE]
    if not arms:
        refuse_unread(config.sera, ("label_smoothing",), f"arms={config.sera.arms!r}")
        return
    if config.loss.name != "dpo":
        raise ValueError(
            f"config.loss.name={config.loss.name!r}, config.sera.arms={config.sera.arms!r}: {' and '.join(arms)} are "
            "of DPO; set config.loss.name='dpo', or leave them out"
        )
    if smoothing_of(config) >= 0.5:
        raise ValueError(
            f"config.sera.label_smoothing={config.sera.label_smoothing}, config.data.label_noise="
            f"{config.data.label_noise}: {' and '.join(arms)} need a share of flipped labels below 0.5, at which "
            "labels say nothing; give one in config.sera.label_smoothing, or leave them out"
        )


def _check_judges(config: Config, arms: Sequence[SeraGroup]) -> None:
    """Raises ValueError where the judge of an arm that samples is not there, or finds all candidates alike."""
    sera = config.sera
    if any(arm.judge == "gold" for arm in arms):
        asked = (
            f"config.sera.judge={sera.judge!r}, config.sera.arms={sera.arms!r}: judge='gold' and oracle_pairing read"
        )
        if not config.world.name and not config.eval.gold:
            raise ValueError(
                f"{asked} a gold reward, which the embedded world has, and real rows by config.eval.gold='chrf' or "
                "'sentiment'; set config.world.name or config.eval.gold, or leave them out"
            )
        if config.eval.gold == "chrf" and config.data.prompts:
            raise ValueError(
                f"{asked} a gold reward of every prompt, and those of config.data.prompts={config.data.prompts!r} may "
                f"have no preferred answer, which config.eval.gold={config.eval.gold!r} compares with; empty "
                "data.prompts, so that the prompts are those of data.train"
            )
    by_ratio = [arm for arm in arms if arm.judge == "policy" and arm.likelihood_weight == 0]
    if loss_of(config).uses_reference and any(arm.bootstrap_from == "sft" for arm in by_ratio):
        raise ValueError(
            "config.sera.bootstrap_from='sft', config.sera.likelihood_weight=0.0: against itself as the reference the "
            "SFT model's reward is 0 for every answer, so there is nothing to rank by; raise likelihood_weight"
        )


def check_band(name: str, band: tuple[float, float] | None) -> None:
    """Raises ValueError for a band that is no two quantiles."""
    if band is not None and not 0 <= band[0] < band[1] <= 1:
        raise ValueError(f"config.sera.{name}={band!r}; it must be two quantiles 0 <= low < high <= 1")


def check_pairs(config: Config) -> None:
    """Of every method that learns from preference pairs: there are some, and the loss is one."""
    data = config.data
    loss_of(config)
    if not config.world.name and not data.train:
        raise ValueError("config.data.train is empty; name preference rows: --config.data.train=pairs.jsonl")
    if config.world.name and data.train:
        raise ValueError(
            f"config.data.train={data.train!r} and config.world.name={config.world.name!r} are both set; "
            "the embedded world writes its own rows: empty one of them"
        )


def check_sampled_pairs(config: Config) -> None:
    """Of every method that pairs its own samples: the host holds the samples of a prompt, and a pair fits a row."""
    data, sampling = config.data, config.sampling
    check_answers(config.sera.num_samples, f"config.sera.num_samples={config.sera.num_samples}")
    prompts = 1 if data.share_prompt else 2
    longest = prompts * data.max_prompt_length + 2 * sampling.max_new_tokens
    if longest > data.row_tokens:
        raise ValueError(
            f"config.sampling.max_new_tokens={sampling.max_new_tokens}: a sampled pair may have {longest} tokens "
            f"(config.data.max_prompt_length={data.max_prompt_length}), but config.data.row_tokens="
            f"{data.row_tokens}; raise row_tokens, or lower one of the others"
        )


PAIR_ARM_COLUMNS = [
    ARM,
    ("gold [95 %]", interval("gold", 3)),
    ("wins vs sft", percent("win_rate_vs_sft")),
    ("accuracy", percent("heldout_accuracy")),
    ("by length", percent("length_baseline_accuracy")),
    ("on shorter", percent("heldout_accuracy_shorter")),
    ("margin", number("heldout_margin", 2)),
    KL_COLUMN,
    ("tokens", number("response_tokens_mean", 1)),
    COST_COLUMN,
]
AGREEMENT = ("agree/not/tie", shares("agreement", ("agree", "disagree", "tie")))
PAIR_LEGEND = [
    GOLD,
    GOLD_AT,
    OUT_OF_DOMAIN,
    ("heldout_accuracy", "accuracy", "held-out pairs that the implicit reward ranks as labelled"),
    ("length_baseline_accuracy", "by length", "the same for a rule that prefers the longer answer"),
    ("heldout_accuracy_shorter", "on shorter", "accuracy on the pairs whose shorter answer was preferred"),
    ("replayed", "replayed", "of those kept, the pairs that sera.replay_fraction took back"),
    ("flipped_fraction_kept", "flipped", "offline pairs kept whose label data.label_noise had exchanged"),
    ("bootstrap/refused_unsupported", "unsupported", "answers below sera.support_quantile, which make no pair"),
    ("bootstrap/refused_disagreement", "disagreement", "pairs refused, since the judges of sera.agreement differ"),
    ("bootstrap/refused_below_min_margin", "below_min_margin", "pairs refused for their margin"),
    ("bootstrap/refused_outside_band", "outside_band", "pairs refused, the margin being outside sera.bootstrap_band"),
    ("agreement", "agree/not/tie", "does the gold agree with the added pairs, %"),
    (
        "margin_mean",
        "margin",
        "chosen minus rejected, nats (a token if the loss averages): held-out above, offline below",
    ),
    KL,
    COST,
]
REPORT = Report(
    arm_columns=PAIR_ARM_COLUMNS,
    round_columns=[
        ARM,
        ("round", plain("round")),
        ("kept", plain("kept")),
        ("replayed", plain("replayed")),
        ("flipped", percent("flipped_fraction_kept")),
        ("added", plain("added")),
        *((reason, number(f"bootstrap/refused_{reason}", 0)) for reason in REASONS),
        AGREEMENT,
        ("margin", number("margin_mean", 2)),
        ("gold", number("gold_mean", 3)),
        ("accuracy", percent("heldout_accuracy")),
        ("on shorter", percent("heldout_accuracy_shorter")),
        ("tokens", number("response_tokens_mean", 1)),
    ],
    legend=PAIR_LEGEND,
    draw=lambda summary, path: picture.draw_rounds(summary, path, looks(ARMS)),
)
# The rows that preference methods read, of the embedded world's files.
PAIR_SOURCES = {
    "train": "preferences.jsonl",
    "eval": "heldout_preferences.jsonl",
    "demonstrations": "demonstrations.jsonl",
    "pretrain": "pretrain.jsonl",
    "prompts": "prompts.jsonl",
}
SERA = Method(
    name="sera",
    says="a direct alignment loss in rounds that review and bootstrap their own pairs",
    group="sera",
    reads=("loss", "sera"),
    arms=ARMS,
    check=check,
    announce=announce,
    sources=PAIR_SOURCES,
    texts=("preference", ("train",)),
    read=of_pairs,
    needs_base=False,
    phases=phases,
    trains=trains,
    run=run,
    report=REPORT,
    programs=lambda planned: sera_programs(planned, study_of(planned.given, loss_of(planned.given.config), None)),
    samples_pairs=lambda config: config.sera.rounds > 1 and config.sera.bootstrap_fraction > 0,
)
