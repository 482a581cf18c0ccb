"""The end of a run: `summary.json` and the table on the terminal. The picture is in `picture`."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax.evaluation.picture import report_png

__all__ = ["check_summary", "report_png", "table", "write_summary"]

Summary = dict[str, Any]
KEYS: dict[str, type | tuple[type, ...]] = {
    "arms": dict,
    "rounds": list,
    "wall_seconds": dict,
    "peak_memory_bytes": int,
    "params_sha256": (str, dict),
    "config": dict,
    "seed": int,
    "versions": dict,
}
# What the summary of a method has besides.
METHOD_KEYS: dict[str, dict[str, type]] = {"srppo": {"iterations": list, "prompts": dict}}
# Facts that lie between 0 and 1 wherever they occur: in an arm, in a round, in an iteration.
_SHARES = (
    "win_rate_vs_sft",
    "heldout_accuracy",
    "heldout_accuracy_shorter",
    "heldout_accuracy_longer",
    "length_baseline_accuracy",
    "flipped_fraction_kept",
    "eos_fraction",
    "wellformed_fraction",
    "answer_accuracy",
    "completions/clipped_ratio",
    "policy/clipfrac_avg",
)
_CORRELATIONS = ("coherent_reward_length_corr", "coherent_reward/length_corr")
_ROUNDING = 1e-5  # by which a float32 correlation may exceed 1


def check_summary(summary: Summary) -> None:
    """ValueError, naming the key, where a summary is not what readers of summary.json rely on.

    `arms` maps an arm to its facts; `rounds` lists the facts of each (`arm`, `round`), rounds counted from 1. With
    method="srppo" there are `prompts`, counts, and `iterations`, the facts of each (`arm`, `iteration`), and a round
    is an evaluation during training that names its `iteration`. A fact that does not apply is absent, never None or
    nan.
    """
    _check_keys(summary, KEYS)
    _check_keys(summary, METHOD_KEYS.get(method_of(summary), {}))
    by_iteration = method_of(summary) == "srppo"
    _check_counted(summary, "rounds", ("round", "iteration") if by_iteration else ("round",))
    places = [(f"arms[{arm!r}]", facts) for arm, facts in summary["arms"].items()]
    places += [(f"rounds[{i}]", facts) for i, facts in enumerate(summary["rounds"])]
    if by_iteration:
        _check_counted(summary, "iterations", ("iteration",))
        places += [(f"iterations[{i}]", facts) for i, facts in enumerate(summary["iterations"])]
    for place, facts in places:
        for name, value in facts.items():
            if not _applies(value):
                raise ValueError(f"{place}[{name!r}] is {value}; leave out what does not apply")
            if name in _SHARES and not 0 <= value <= 1:
                raise ValueError(f"{place}[{name!r}] is {value}; it is a share, 0 to 1")
            if name in _CORRELATIONS and abs(value) > 1 + _ROUNDING:
                raise ValueError(f"{place}[{name!r}] is {value}; it is a correlation, -1 to 1")


def _check_keys(summary: Summary, keys: dict[str, Any]) -> None:
    for key, kind in keys.items():
        if key not in summary:
            raise ValueError(f"the summary has no {key!r}; it needs {', '.join(keys)}")
        if not isinstance(summary[key], kind):
            raise ValueError(f"summary[{key!r}] is a {type(summary[key]).__name__}; it must be {kind}")


def _check_counted(summary: Summary, key: str, counts: Sequence[str]) -> None:
    """Each of summary[key] names its arm and its `counts`, which start at 1."""
    for i, facts in enumerate(summary[key]):
        if not isinstance(facts.get("arm"), str):
            raise ValueError(f"{key}[{i}] needs `arm` (a name), not {facts.get('arm')!r}")
        for name in counts:
            if not isinstance(facts.get(name), int) or facts[name] < 1:
                raise ValueError(f"{key}[{i}] needs `{name}` (1 or more), not {facts.get(name)!r}")


def write_summary(path: str | os.PathLike[str], summary: Summary) -> None:
    """Write the checked summary as JSON so that the file is whole or absent.

    Facts of arms, rounds and iterations that are None or not finite are left out; numpy numbers become plain ones.
    """
    path = pathlib.Path(path)
    summary = _applicable(_plain(summary))
    check_summary(summary)
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.with_name(path.name + ".tmp")
    with torn.open("w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    torn.replace(path)


def table(summary: Summary) -> str:
    """Two short tables, of the arms and of their rounds; a column that has no value at all is left out.

    Of the arms: gold reward, win rate, held-out reward accuracy, the accuracy of preferring the longer answer, the
    accuracy where the shorter was preferred, held-out margin (nats), answer length. Of the rounds: offline pairs kept,
    the flipped share of them, sampled pairs added, their agreement with the gold (%), the mean margin of the offline
    pairs (nats).

    With method="srppo", of the arms: gold reward, win rate, well-formed and right answers, coherent reward (nats per
    answer), its correlation with length, KL to the SFT model (nats per answer), negative log-likelihood of held-out
    demonstrations (nats per token), answer length, answers that ended. A round is then an evaluation during training.
    """
    summary = _applicable(summary)
    arm_columns, round_columns, _ = _METHODS.get(method_of(summary), _METHODS["sera"])
    arms = [{"arm": arm, **facts} for arm, facts in summary["arms"].items()]
    parts = [_aligned(arms, arm_columns)]
    if summary["rounds"]:
        parts.append(_aligned(summary["rounds"], round_columns))
    return "\n\n".join(parts)


def legend(summary: Summary) -> str:
    """A line for each column of `table` that does not speak for itself, of those that it shows."""
    summary = _applicable(summary)
    facts = [*summary["arms"].values(), *summary["rounds"]]
    *_, lines = _METHODS.get(method_of(summary), _METHODS["sera"])
    shown = [(head, text) for name, head, text in lines if any(name in fact for fact in facts)]
    heads = {head for head, _ in shown}
    outcomes = [head for head in _OUTCOMES if head in heads] or ["NLL"]
    width = max((len(head) for head in heads), default=0)
    return "\n".join(f"{head:>{width}}  {text.format(outcomes=_or(outcomes))}" for head, text in shown)


def method_of(summary: Summary) -> str:
    """`sera` or `srppo`; summaries written before there were two methods name none."""
    return summary["config"].get("method", "sera")


def _or(heads: Sequence[str]) -> str:
    if not heads:
        return "some other measure"
    return " or ".join(part for part in (", ".join(heads[:-1]), heads[-1]) if part)


# (fact that the column shows, heading, meaning)
_LEGEND: list[tuple[str, str, str]] = [
    ("gold_mean", "gold", "mean reward of answers to held-out prompts, by the world's rule; 95 % over prompts"),
    ("heldout_accuracy", "accuracy", "held-out pairs that the implicit reward ranks as labelled"),
    ("length_baseline_accuracy", "by length", "the same for a rule that prefers the longer answer"),
    ("heldout_accuracy_shorter", "on shorter", "accuracy on the pairs whose shorter answer was preferred"),
    ("flipped_fraction_kept", "flipped", "offline pairs kept whose label data.label_noise had exchanged"),
    ("agreement", "agree/not/tie", "does the gold agree with the added pairs, %"),
    ("margin_mean", "margin", "chosen minus rejected, nats: of held-out pairs above, of offline pairs below"),
]
# What says of an arm of Self-Rewarding PPO whether it is better, by heading.
_OUTCOMES = ("gold", "right")  # NLL only in place of them: a policy that sharpens loses likelihood even where it gains
_SRPPO_LEGEND: list[tuple[str, str, str]] = [
    _LEGEND[0],
    ("answer_accuracy", "right", "answers whose last match of eval.answer_pattern is the reference's"),
    ("wellformed_fraction", "well-formed", "answers in which eval.answer_pattern is found"),
    (
        "coherent_reward_mean",
        "coherent",
        "log pi_sft - log pi_base, nats per answer. PPO optimises it: a gain must show in {outcomes}",
    ),
    ("coherent_reward_length_corr", "corr.", "correlation of the coherent reward with the answer's length"),
    ("kl_to_sft", "KL", "of the policy to the SFT model, on its own answers, nats per answer"),
    ("heldout_nll", "NLL", "of held-out demonstrations, nats per token; it rises as a policy forgets them"),
    ("eos_fraction", "ended", "answers that ended within the token limit"),
]


def _percent(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda facts: f"{100 * facts[name]:.1f} %"


def _number(name: str, digits: int) -> Callable[[dict[str, Any]], str]:
    return lambda facts: f"{facts[name]:.{digits}f}"


def _interval(name: str, digits: int) -> Callable[[dict[str, Any]], str]:
    """Of `NAME_mean`, with `NAME_ci95` where that is known."""

    def say(facts: dict[str, Any]) -> str:
        mean = f"{facts[f'{name}_mean']:.{digits}f}"
        if f"{name}_ci95" not in facts:
            return mean
        low, high = facts[f"{name}_ci95"]
        return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"

    return say


def _agreement(facts: dict[str, Any]) -> str:
    shares = facts["agreement"]
    return " / ".join(f"{100 * shares[k]:.0f}" for k in ("agree", "disagree", "tie"))


# (heading, what a cell says; KeyError where the fact is absent)
_ARM_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("arm", lambda facts: facts["arm"]),
    ("gold [95 %]", _interval("gold", 3)),
    ("wins vs sft", _percent("win_rate_vs_sft")),
    ("accuracy", _percent("heldout_accuracy")),
    ("by length", _percent("length_baseline_accuracy")),
    ("on shorter", _percent("heldout_accuracy_shorter")),
    ("margin", _number("heldout_margin", 2)),
    ("tokens", _number("response_tokens_mean", 1)),
]
_ROUND_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("arm", lambda facts: facts["arm"]),
    ("round", lambda facts: str(facts["round"])),
    ("kept", lambda facts: str(facts["kept"])),
    ("flipped", _percent("flipped_fraction_kept")),
    ("added", lambda facts: str(facts["added"])),
    ("agree/not/tie", _agreement),
    ("margin", _number("margin_mean", 2)),
    ("gold", _number("gold_mean", 3)),
    ("accuracy", _percent("heldout_accuracy")),
    ("on shorter", _percent("heldout_accuracy_shorter")),
    ("tokens", _number("response_tokens_mean", 1)),
]


_SRPPO_ARM_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("arm", lambda facts: facts["arm"]),
    ("gold [95 %]", _interval("gold", 3)),
    ("wins vs sft", _percent("win_rate_vs_sft")),
    ("right", _percent("answer_accuracy")),
    ("well-formed", _percent("wellformed_fraction")),
    ("coherent [95 %]", _interval("coherent_reward", 2)),
    ("corr.", _number("coherent_reward_length_corr", 2)),
    ("KL", _number("kl_to_sft", 2)),
    ("NLL", _number("heldout_nll", 3)),
    ("tokens", _number("response_tokens_mean", 1)),
    ("ended", _percent("eos_fraction")),
]
_SRPPO_ROUND_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("arm", lambda facts: facts["arm"]),
    ("iteration", lambda facts: str(facts["iteration"])),
    ("gold", _number("gold_mean", 3)),
    ("right", _percent("answer_accuracy")),
    ("well-formed", _percent("wellformed_fraction")),
    ("coherent", _number("coherent_reward_mean", 2)),
    ("corr.", _number("coherent_reward_length_corr", 2)),
    ("KL", _number("kl_to_sft", 2)),
    ("NLL", _number("heldout_nll", 3)),
    ("tokens", _number("response_tokens_mean", 1)),
    ("ended", _percent("eos_fraction")),
]
_METHODS = {
    "sera": (_ARM_COLUMNS, _ROUND_COLUMNS, _LEGEND),
    "srppo": (_SRPPO_ARM_COLUMNS, _SRPPO_ROUND_COLUMNS, _SRPPO_LEGEND),
}


def _aligned(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, Callable]]) -> str:
    def cell(say: Callable[[dict[str, Any]], str], facts: dict[str, Any]) -> str:
        try:
            return say(facts)
        except KeyError:
            return ""

    filled = [(heading, [cell(say, facts) for facts in rows]) for heading, say in columns]
    filled = [(heading, cells) for heading, cells in filled if any(cells)]
    widths = [max(len(heading), *map(len, cells)) for heading, cells in filled]
    lines = ["  ".join(f"{heading:>{w}}" for (heading, _), w in zip(filled, widths))]
    lines.append("  ".join("-" * w for w in widths))
    lines += ["  ".join(f"{cells[i] or '-':>{w}}" for (_, cells), w in zip(filled, widths)) for i in range(len(rows))]
    return "\n".join(lines)


def _applies(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _applicable(summary: Summary) -> Summary:
    """The summary without what does not apply of its arms, rounds and iterations."""

    def known(facts: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in facts.items() if _applies(value)}

    lists = {key: [known(facts) for facts in summary[key]] for key in ("rounds", "iterations") if key in summary}
    return summary | lists | {"arms": {arm: known(facts) for arm, facts in summary["arms"].items()}}


def _plain(value: Any) -> Any:
    """Numpy scalars, tuples and paths as what JSON knows."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
