"""Means over seeds with intervals, and differences to a baseline paired by seed: what several runs say together.

The interval is Student's: mean +- t(0.975, n - 1) * s / sqrt(n), with s the standard deviation of the n values
(denominator n - 1). It takes the seeds for draws of one normal distribution; of one value there is none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

Key = tuple[str, str]  # setting, arm
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of `count` values: their mean, and half the width of its interval (nan for one value)."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        half = "" if math.isnan(self.half) else f" ± {self.half:.3f}"
        return f"{self.mean:.3f}{half} ({self.count})"

    @property
    def leaves_out_zero(self) -> bool:
        return abs(self.mean) > self.half


@dataclasses.dataclass(frozen=True)
class Entry:
    """An arm of a setting.

    Attributes:
        panel: the value of the field whose values are compared apart; "" where none is.
        means: by metric. against: what the differences are to, None where it is nothing. differences: by metric.
    """

    setting: str
    arm: str
    panel: str
    means: dict[str, Estimate]
    against: Key | None
    differences: dict[str, Estimate]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Entries by panel, best first; `varied`: setting -> the fields that tell it from the others."""

    metrics: tuple[str, ...]
    baseline: str
    entries: list[Entry]
    varied: dict[str, dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an interval that there is not is null."""

        def plain(found: dict[str, Estimate]) -> dict[str, Any]:
            return {
                m: {"mean": e.mean, "half": None if math.isnan(e.half) else e.half, "n": e.count}
                for m, e in found.items()
            }

        entries = [
            {
                "setting": e.setting,
                "arm": e.arm,
                "panel": e.panel,
                "metrics": plain(e.means),
                "against": e.against and "/".join(filter(None, e.against)),
                "differences": plain(e.differences),
            }
            for e in self.entries
        ]
        asked = {"metrics": list(self.metrics), "baseline": self.baseline, "interval": LEVEL}
        return asked | {"settings": self.varied, "entries": entries}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half the width of its 95 % t-interval, of at least one value."""
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), math.nan, 1)
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(float(np.mean(values)), float(stdtrit(n - 1, (1 + LEVEL) / 2)) * spread, n)


def compare(
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    *,
    arms: Sequence[str] = (),
    baseline: str = "",
    panels: str = "",
    smaller_is_better: bool = False,
) -> Comparison:
    """What the rows (`studies.rows`) say of each arm of each setting.

    Args:
        metrics: the first one ranks.
        arms: those shown; empty: all. The baseline may be another.
        baseline: as `studies.plan.Study` says. panels: a field of `varied`.

    Raises:
        ValueError: a metric, an arm, the baseline or the field of the panels that no row has.
    """
    values: dict[Key, dict[int, Mapping[str, float]]] = {}
    varied: dict[str, dict[str, Any]] = {}
    for row in rows:
        values.setdefault((row["setting"], row["arm"]), {})[row["seed"]] = row["metrics"]
        varied[row["setting"]] = row["varied"]
    _check(values, metrics, arms, varied, panels)
    shown = [key for key in values if not arms or key[1] in arms]
    against = {key: _baseline_of(key, baseline, values) for key in shown} if baseline else {}
    if baseline and not any(against.values()):
        raise ValueError(f"baseline={baseline!r} is nothing here; choose of {_listed(_names(values))}")
    entries = []
    for key in shown:
        other = against.get(key)
        entries.append(
            Entry(
                *key,
                panel=f"{panels}={varied[key[0]][panels]}" if panels else "",
                means={m: estimate(found) for m in metrics if (found := _values(values[key], m))},
                against=other,
                differences={
                    m: estimate(found)
                    for m in metrics
                    if other and (found := _differences(values[key], values[other], m))
                },
            )
        )
    order = list(dict.fromkeys(entry.panel for entry in entries))
    sign = 1 if smaller_is_better else -1

    def rank(entry: Entry) -> tuple[int, float]:
        mean = entry.means.get(metrics[0])
        return order.index(entry.panel), math.inf if mean is None else sign * mean.mean

    return Comparison(tuple(metrics), baseline, sorted(entries, key=rank), varied)


def _values(by_seed: Mapping[int, Mapping[str, float]], metric: str) -> list[float]:
    return [facts[metric] for facts in by_seed.values() if metric in facts]


def _differences(
    mine: Mapping[int, Mapping[str, float]], others: Mapping[int, Mapping[str, float]], metric: str
) -> list[float]:
    """Mine minus the other's, of the seeds that both have."""
    both = [seed for seed in mine if metric in mine[seed] and metric in others.get(seed, {})]
    return [mine[seed][metric] - others[seed][metric] for seed in both]


def _baseline_of(key: Key, baseline: str, known: Mapping[Key, Any]) -> Key | None:
    """What `key` is compared with; None where that is not there, or is `key` itself."""
    setting, arm = key
    parts = setting.split(",")
    found = [
        (setting, baseline),
        *((",".join([*parts[:i], baseline, *parts[i + 1 :]]), arm) for i in range(len(parts))),
    ]
    found.append(tuple(baseline.rpartition("/")[::2]))
    there = list(dict.fromkeys(other for other in found if other in known))
    if len(there) > 1:
        raise ValueError(f"baseline={baseline!r} may be {' or '.join(map('/'.join, there))}; give SETTING/ARM")
    return there[0] if there and there[0] != key else None


def _check(
    values: Mapping[Key, Mapping[int, Mapping[str, float]]],
    metrics: Sequence[str],
    arms: Sequence[str],
    varied: Mapping[str, Mapping[str, Any]],
    panels: str,
) -> None:
    known = {name for by_seed in values.values() for facts in by_seed.values() for name in facts}
    if absent := [metric for metric in metrics if metric not in known]:
        raise ValueError(f"no run has the metric {absent[0]!r}; they have {_listed(sorted(known))}")
    there = list(dict.fromkeys(arm for _, arm in values))
    if absent := [arm for arm in arms if arm not in there]:
        raise ValueError(f"no run has the arm {absent[0]!r}; they have {_listed(there)}")
    if panels and any(panels not in fields for fields in varied.values()):
        raise ValueError(f"panels={panels!r} is not among the fields that differ: {_listed(sorted(_fields(varied)))}")


def _fields(varied: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {name for fields in varied.values() for name in fields}


def _names(values: Mapping[Key, Any]) -> list[str]:
    arms = [arm for _, arm in values]
    parts = [part for setting, _ in values for part in setting.split(",") if part]
    return list(dict.fromkeys([*arms, *parts]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
