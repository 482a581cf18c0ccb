"""The end of a run: `summary.json`, the tables on the terminal, and what a method says of how its own are shown."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sera_jax import whole

Summary = dict[str, Any]
Cell = Callable[[Any], str]  # of the facts of an arm or a round; KeyError where the fact is absent
Column = tuple[str, Cell]  # with its heading
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


@dataclasses.dataclass(frozen=True)
class Report:
    """How the summary of a method is checked and shown.

    Attributes:
        arm_columns, round_columns: of the two tables.
        legend: (fact that a column shows, its heading, its meaning), of those that do not speak for themselves.
        outcomes: headings that say whether an arm is better; `{outcomes}` in a meaning names those that are shown.
        draw: the picture, from a summary into a PNG; may draw nothing where there is nothing to draw.
        keys: what the summary has besides `KEYS`.
        counts: what each of summary["rounds"] is numbered by; those numbers start at 1.
        lists: further lists of facts in the summary, each entry with its arm, and what they are numbered by.
    """

    arm_columns: Sequence[Column]
    round_columns: Sequence[Column]
    legend: Sequence[tuple[str, str, str]]
    draw: Callable[[Summary, pathlib.Path], None]
    outcomes: Sequence[str] = ("gold",)
    keys: Mapping[str, type] = dataclasses.field(default_factory=dict)
    counts: Sequence[str] = ("round",)
    lists: Mapping[str, str] = dataclasses.field(default_factory=dict)


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
    "bootstrap/repeated_ngrams",
    "mixture/clean_share",
)
_CORRELATIONS = (
    "coherent_reward_length_corr",
    "coherent_reward/length_corr",
    "bootstrap/reward_ref_corr",
    "bootstrap/reward_length_corr",
)
_ROUNDING = 1e-5  # by which a float32 correlation may exceed 1


def check_summary(summary: Summary, report: Report) -> None:
    """ValueError, naming the key, where a summary is not what readers of summary.json rely on.

    `arms` maps an arm to its facts; `rounds` lists the facts of each (`arm`, `round`), rounds counted from 1. A fact
    that does not apply is absent, never None or nan.
    """
    _check_keys(summary, KEYS)
    _check_keys(summary, report.keys)
    _check_counted(summary, "rounds", report.counts)
    places = [(f"arms[{arm!r}]", facts) for arm, facts in summary["arms"].items()]
    places += [(f"rounds[{i}]", facts) for i, facts in enumerate(summary["rounds"])]
    for key, count in report.lists.items():
        _check_counted(summary, key, (count,))
        places += [(f"{key}[{i}]", facts) for i, facts in enumerate(summary[key])]
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


def write_summary(path: str | os.PathLike[str], summary: Summary, report: Report) -> None:
    """Write the checked summary as JSON so that the file is whole or absent.

    Facts of arms and rounds, and in the method's own lists, that are None or not finite are left out; numpy numbers
    become plain ones.
    """
    path = pathlib.Path(path)
    summary = _applicable(_plain(summary), report)
    check_summary(summary, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write_text(path, json.dumps(summary, indent=1, allow_nan=False) + "\n")


def table(summary: Summary, report: Report) -> str:
    """Short tables: of the arms, of their gold by temperature and domain where that is known, of their rounds. A column
    without any value is left out."""
    summary = _applicable(summary, report)
    arms = [{"arm": arm, **facts} for arm, facts in summary["arms"].items()]
    parts = [aligned(arms, report.arm_columns)]
    if known := [facts for facts in arms if "gold_by_temperature" in facts or "gold_in_domain" in facts]:
        parts.append(aligned(known, [ARM, *_gold_columns(known)]))
    if summary["rounds"]:
        parts.append(aligned(summary["rounds"], report.round_columns))
    return "\n\n".join(parts)


def legend(summary: Summary, report: Report) -> str:
    """A line for each column of `table` that does not speak for itself, of those that it shows."""
    summary = _applicable(summary, report)
    facts = [*summary["arms"].values(), *summary["rounds"]]
    shown = [(head, text) for name, head, text in report.legend if any(name in fact for fact in facts)]
    heads = {head for head, _ in shown}
    outcomes = [head for head in report.outcomes if head in heads] or ["NLL"]
    width = max((len(head) for head in heads), default=0)
    return "\n".join(f"{head:>{width}}  {text.format(outcomes=_or(outcomes))}" for head, text in shown)


def _or(heads: Sequence[str]) -> str:
    if not heads:
        return "some other measure"
    return " or ".join(part for part in (", ".join(heads[:-1]), heads[-1]) if part)


def percent(name: str) -> Cell:
    """A share as "12.3 %"."""
    return lambda facts: f"{100 * facts[name]:.1f} %"


def number(name: str, digits: int) -> Cell:
    return lambda facts: f"{facts[name]:.{digits}f}"


def interval(name: str, digits: int) -> Cell:
    """Of `NAME_mean`, with `NAME_ci95` where that is known."""

    def say(facts: dict[str, Any]) -> str:
        mean = f"{facts[f'{name}_mean']:.{digits}f}"
        if f"{name}_ci95" not in facts:
            return mean
        low, high = facts[f"{name}_ci95"]
        return f"{mean} [{low:.{digits}f}, {high:.{digits}f}]"

    return say


def shares(name: str, parts: Sequence[str]) -> Cell:
    """Shares of a fact that is a dict, in per cent: "52 / 34 / 14"."""
    return lambda facts: " / ".join(f"{100 * facts[name][part]:.0f}" for part in parts)


def plain(name: str) -> Cell:
    """The fact as it is."""
    return lambda facts: str(facts[name])


KL_COLUMN: Column = ("KL", number("kl_to_sft", 2))
_IN_A_LINE: Sequence[Column] = (
    ("accuracy", percent("heldout_accuracy")),
    ("gold", number("gold_mean", 3)),
    ("wins vs sft", percent("win_rate_vs_sft")),
    ("right", percent("answer_accuracy")),
    ("coherent", number("coherent_reward_mean", 2)),
    KL_COLUMN,
    ("NLL", number("heldout_nll", 3)),
    ("tokens", number("response_tokens_mean", 1)),
)


def in_a_line(facts: Mapping[str, Any]) -> str:
    """The main facts of a policy, those that there are: "accuracy 77.7 %, gold 0.648, tokens 8.2"."""
    told = {name: value for name, value in facts.items() if _applies(value)}
    cells = [(heading, _cell(say, told)) for heading, say in _IN_A_LINE]
    return ", ".join(f"{heading} {cell}" for heading, cell in cells if cell)


# Columns and meanings that more than one method has, by what they show.
GOLD = (
    "gold_mean",
    "gold",
    "mean reward of answers to held-out prompts, by the world's rule or eval.gold; 95 % over prompts",
)
GOLD_AT = (
    "gold_by_temperature",
    "gold at",
    "of answers at this temperature; 0 is greedy, where mere sharpening is no gain",
)
OUT_OF_DOMAIN = (
    "gold_out_of_domain",
    "out of domain",
    "gold on the tasks of world.heldout_tasks; in domain: on others",
)
KL = ("kl_to_sft", "KL", "of the policy to the SFT model, on its own answers, nats per answer")
COST = (
    "cost/passes_tokens",
    "cost [M]",
    "millions of tokens times passes (forward 1, backward 2), after SFT and without evaluation; of sft: SFT's own",
)
ARM: Column = ("arm", plain("arm"))
COST_COLUMN: Column = ("cost [M]", lambda facts: f"{facts['cost/passes_tokens'] / 1e6:.2f}")


def _gold_columns(arms: Sequence[dict[str, Any]]) -> list[Column]:
    """Of the gold of arms: at each temperature, and the same in and out of domain."""

    def at(name: str, temperature: str) -> Cell:
        return lambda facts: f"{facts[name][temperature]:.3f}"

    columns: list[Column] = []
    for name, head in (("gold", "gold"), ("gold_in_domain", "in domain"), ("gold_out_of_domain", "out of domain")):
        columns += [(head, number(name, 3))] if name != "gold" else []
        by = f"{name}_by_temperature"
        columns += [(f"{head} at {t}", at(by, t)) for t in next((facts[by] for facts in arms if by in facts), {})]
    return columns


def aligned(rows: Sequence[Any], columns: Sequence[Column]) -> str:
    """A table for the terminal; a column that has no value at all is left out."""
    filled = [(heading, [_cell(say, facts) for facts in rows]) for heading, say in columns]
    filled = [(heading, cells) for heading, cells in filled if any(cells)]
    widths = [max(len(heading), *map(len, cells)) for heading, cells in filled]
    lines = ["  ".join(f"{heading:>{w}}" for (heading, _), w in zip(filled, widths))]
    lines.append("  ".join("-" * w for w in widths))
    lines += ["  ".join(f"{cells[i] or '-':>{w}}" for (_, cells), w in zip(filled, widths)) for i in range(len(rows))]
    return "\n".join(lines)


def _cell(say: Cell, facts: dict[str, Any]) -> str:
    try:
        return say(facts)
    except KeyError:
        return ""


def _applies(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _applicable(summary: Summary, report: Report) -> Summary:
    """The summary without what does not apply of its arms, its rounds and the method's own lists."""

    def known(facts: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in facts.items() if _applies(value)}

    lists = {key: [known(facts) for facts in summary[key]] for key in ("rounds", *report.lists) if key in summary}
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
