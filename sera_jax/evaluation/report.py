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
# Facts that lie between 0 and 1 wherever they occur, in an arm or in a round.
_SHARES = (
    "win_rate_vs_sft",
    "heldout_accuracy",
    "heldout_accuracy_shorter",
    "heldout_accuracy_longer",
    "length_baseline_accuracy",
    "flipped_fraction_kept",
    "eos_fraction",
)


def check_summary(summary: Summary) -> None:
    """ValueError, naming the key, where a summary is not what readers of summary.json rely on.

    `arms` maps an arm to its facts; `rounds` lists the facts of each (`arm`, `round`), rounds counted from 1. A
    fact that does not apply is absent, never None or nan.
    """
    for key, kind in KEYS.items():
        if key not in summary:
            raise ValueError(f"the summary has no {key!r}; it needs {', '.join(KEYS)}")
        if not isinstance(summary[key], kind):
            raise ValueError(f"summary[{key!r}] is a {type(summary[key]).__name__}; it must be {kind}")
    places = [(f"arms[{arm!r}]", facts) for arm, facts in summary["arms"].items()]
    places += [(f"rounds[{i}]", facts) for i, facts in enumerate(summary["rounds"])]
    for i, facts in enumerate(summary["rounds"]):
        if not isinstance(facts.get("arm"), str) or not isinstance(facts.get("round"), int) or facts["round"] < 1:
            raise ValueError(f"rounds[{i}] needs `arm` (a name) and `round` (1 or more), not {facts.get('arm')!r}")
    for place, facts in places:
        for name, value in facts.items():
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{place}[{name!r}] is {value}; leave out what does not apply")
            if name in _SHARES and not 0 <= value <= 1:
                raise ValueError(f"{place}[{name!r}] is {value}; it is a share, 0 to 1")


def write_summary(path: str | os.PathLike[str], summary: Summary) -> None:
    """Write the checked summary as JSON so that the file is whole or absent.

    Facts of arms and rounds that are None or not finite are left out; numpy numbers become plain ones.
    """
    path = pathlib.Path(path)
    summary = _plain(summary)
    summary["arms"] = {arm: _applicable(facts) for arm, facts in summary["arms"].items()}
    summary["rounds"] = [_applicable(facts) for facts in summary["rounds"]]
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
    """
    arms = [{"arm": arm, **facts} for arm, facts in summary["arms"].items()]
    parts = [_aligned(arms, _ARM_COLUMNS)]
    if summary["rounds"]:
        parts.append(_aligned(summary["rounds"], _ROUND_COLUMNS))
    return "\n\n".join(parts)


def legend(summary: Summary) -> str:
    """A line for each column of `table` that does not speak for itself, of those that it shows."""
    facts = [*summary["arms"].values(), *summary["rounds"]]
    shown = [(head, text) for name, head, text in _LEGEND if any(name in fact for fact in facts)]
    width = max((len(head) for head, _ in shown), default=0)
    return "\n".join(f"{head:>{width}}  {text}" for head, text in shown)


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


def _percent(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda facts: f"{100 * facts[name]:.1f} %"


def _number(name: str, digits: int) -> Callable[[dict[str, Any]], str]:
    return lambda facts: f"{facts[name]:.{digits}f}"


def _gold(facts: dict[str, Any]) -> str:
    low, high = facts["gold_ci95"]
    return f"{facts['gold_mean']:.3f} [{low:.3f}, {high:.3f}]"


def _agreement(facts: dict[str, Any]) -> str:
    shares = facts["agreement"]
    return " / ".join(f"{100 * shares[k]:.0f}" for k in ("agree", "disagree", "tie"))


# (heading, what a cell says; KeyError where the fact is absent)
_ARM_COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("arm", lambda facts: facts["arm"]),
    ("gold [95 %]", _gold),
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


def _applicable(facts: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in facts.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


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
