"""Means over seeds with intervals, and differences to a baseline paired by seed: what several runs say together.

The interval is Student's: mean +- t(0.975, n - 1) * s / sqrt(n), with s the standard deviation of the n values
(denominator n - 1). It takes the seeds for draws of one normal distribution; of one value there is none.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

Key = tuple[str, str]  # setting, arm
Facts = Mapping[int, Mapping[str, float]]  # of an entry: seed -> metric -> value
LEVEL = 0.95
_NO_NAME = re.compile(r"[^-+.\w]")  # what neither a folder's name nor a part of a setting's holds


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
    """Entries by panel, best first; `varied`: setting -> the fields that tell it apart; `notes`: sentences; `curve`:
    the field over whose values the entries are drawn, "" where over none."""

    metrics: tuple[str, ...]
    baseline: str
    entries: list[Entry]
    varied: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()
    curve: str = ""

    def headings(self, metric: str) -> tuple[str, str]:
        """What a metric's means are of, and what is taken from them in its differences."""
        mine, _, other = metric.partition(":")
        return mine, f"minus {self.baseline}{other and f': {other}'}"

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
        return asked | {"settings": self.varied, "entries": entries, "notes": list(self.notes)}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and half the width of its 95 % t-interval, of at least one value."""
    n = len(values)
    if n == 1:
        return Estimate(float(values[0]), math.nan, 1)
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(float(np.mean(values)), float(stdtrit(n - 1, (1 + LEVEL) / 2)) * spread, n)


def text_of(value: Any) -> str:
    """A value of a config's field as the command line takes it."""
    return (",".join(map(text_of, value)) or "()") if isinstance(value, tuple | list) else str(value)


def parts_of(field: str, value: Any) -> tuple[str, str]:
    """What says a field in a setting's name: by its last part, or in full where that is another field's too."""
    text = _NO_NAME.sub("+", text_of(value))
    return f"{field.rpartition('.')[2]}={text}", f"{field}={text}"


def compare(
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    *,
    arms: Sequence[str] = (),
    baseline: str = "",
    panels: str = "",
    curve: str = "",
    smaller_is_better: bool = False,
) -> Comparison:
    """What the rows (`studies.rows`) say of each arm of each setting.

    Args:
        metrics: the first one ranks. `MINE:OTHER` compares an entry's MINE with the baseline's OTHER. `FACT/*` is that
            part of a fact which has the best mean over the seeds, of each entry for itself.
        arms: those shown; empty: all. The baseline may be another.
        baseline: as `studies.plan.Study` says. panels: a field of `varied`. curve: such a field, or one of the metrics.

    Raises:
        ValueError: a metric, an arm, the baseline or the field of panels or of a curve that no row has; a curve that is
            none.
    """
    values: dict[Key, dict[int, Mapping[str, float]]] = {}
    varied: dict[str, dict[str, Any]] = {}
    for row in rows:
        values.setdefault((row["setting"], row["arm"]), {})[row["seed"]] = row["metrics"]
        varied[row["setting"]] = row["varied"]
    against = check(values, varied, metrics, arms=arms, baseline=baseline, panels=panels, curve=curve)
    _check_metrics(values, metrics)
    chosen: dict[str, dict[str, str]] = {}  # FACT/* -> entry -> its part

    def series(key: Key, metric: str, *, smallest: bool) -> dict[int, float]:
        part = _best_part(values[key], metric, smallest=smallest)
        if part != metric:
            chosen.setdefault(metric, {})["/".join(filter(None, key))] = part.rpartition("/")[2]
        return {seed: facts[part] for seed, facts in values[key].items() if part in facts}

    entries = []
    for key, other in against.items():
        means, differences = {}, {}
        for metric in metrics:
            smallest = smaller_is_better and metric == metrics[0]
            name, _, of_other = metric.partition(":")
            if mine := series(key, name, smallest=smallest):
                means[metric] = estimate(list(mine.values()))
            if other and (both := _paired(mine, series(other, of_other or name, smallest=smallest))):
                differences[metric] = estimate(both)
        panel = f"{panels}={text_of(varied[key[0]][panels])}" if panels else ""
        entries.append(Entry(*key, panel, means, other, differences))
    order = list(dict.fromkeys(entry.panel for entry in entries))
    sign = 1 if smaller_is_better else -1
    notes = [
        f"{fact}: chosen by the mean over the seeds, which makes it a little too good: "
        + ", ".join(f"{entry} {part}" for entry, part in parts.items())
        for fact, parts in chosen.items()
    ]

    def rank(entry: Entry) -> tuple[int, float]:
        mean = entry.means.get(metrics[0])
        return order.index(entry.panel), math.inf if mean is None else sign * mean.mean

    return Comparison(tuple(metrics), baseline, sorted(entries, key=rank), varied, tuple(notes), curve)


def check(
    keys: Collection[Key],
    varied: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[str],
    *,
    arms: Sequence[str],
    baseline: str,
    panels: str,
    curve: str,
) -> dict[Key, Key | None]:
    """Those of the entries that are shown, each with what it is compared with.

    Args:
        varied: of every setting. The others: as of `compare`.

    Raises:
        ValueError: no metric; an arm, the baseline or the field of panels or of a curve that the entries have not; a
            curve of what are no numbers, of settings that share one, or of panels.
    """
    if not metrics:
        raise ValueError("metrics=(); name one at least, such as gold_mean: the first one ranks")
    there = list(dict.fromkeys(arm for _, arm in keys))
    if absent := [arm for arm in arms if arm not in there]:
        raise ValueError(f"no run has the arm {absent[0]!r}; they have {_listed(there)}")
    if curve and panels:
        raise ValueError(f"panels={panels!r} and curve={curve!r}; a picture has one or the other: leave one out")
    if over_metric(curve, metrics):
        curve = ""
    for name, field in (("panels", panels), ("curve", curve)):
        if lacking := [setting for setting, fields in varied.items() if field and field not in fields]:
            every = set.intersection(*(set(fields) for fields in varied.values()))
            metric = " (or a metric after the first)" if name == "curve" else ""
            raise ValueError(
                f"{name}={field!r} is no field of the setting {lacking[0]!r}; choose of those that differ and that "
                f"every setting has: {_listed(sorted(every))}{metric}"
            )
    if curve:
        _check_curve(curve, {setting: fields[curve] for setting, fields in varied.items()})
    if both := [metric for metric in metrics if ":" in metric and not baseline]:
        raise ValueError(f"metric {both[0]!r} is a difference to a baseline; name one, or leave out what follows the :")
    against = {key: _baseline_of(key, baseline, keys) for key in keys if not arms or key[1] in arms}
    if baseline and not any(against.values()):
        raise ValueError(f"baseline={baseline!r} is nothing here; choose of {_listed(_names(keys))}")
    return against


def over_metric(curve: str, metrics: Sequence[str]) -> bool:
    """Whether a curve is over a metric and not over a field of the settings."""
    return curve in metrics[1:]


def _check_curve(curve: str, values: Mapping[str, Any]) -> None:
    for setting, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"curve={curve!r} is {value!r} in the setting {setting!r}; it must be a number")
        if shared := [other for other in values if other != setting and values[other] == value]:
            raise ValueError(
                f"curve={curve!r} is {value!r} in the settings {setting!r} and {shared[0]!r}; it must tell them apart"
            )


def _check_metrics(values: Mapping[Key, Facts], metrics: Sequence[str]) -> None:
    known = {name for by_seed in values.values() for facts in by_seed.values() for name in facts}
    known |= {f"{fact}/*" for name in known if (fact := name.rpartition("/")[0])}
    for name in (name for metric in metrics for name in metric.split(":", 1)):
        if name not in known:
            raise ValueError(f"no run has the metric {name!r}; they have {_listed(sorted(known))}")


def _best_part(by_seed: Facts, metric: str, *, smallest: bool) -> str:
    """Of `FACT/*` the part whose mean over the seeds is largest, or smallest; a metric without `*` as it is."""
    fact, _, star = metric.rpartition("/")
    if star != "*":
        return metric
    parts: dict[str, list[float]] = {}
    for facts in by_seed.values():
        for name in facts:
            if name.rpartition("/")[0] == fact:
                parts.setdefault(name, []).append(facts[name])
    return (min if smallest else max)(parts, key=lambda name: float(np.mean(parts[name])), default=metric)


def _paired(mine: Mapping[int, float], others: Mapping[int, float]) -> list[float]:
    """Mine minus the other's, of the seeds that both have."""
    return [value - others[seed] for seed, value in mine.items() if seed in others]


def _baseline_of(key: Key, baseline: str, known: Collection[Key]) -> Key | None:
    """What `key` is compared with; None where that is not there, or is `key` itself."""
    setting, arm = key
    parts = setting.split(",")

    def with_part(part: str) -> list[str]:
        return [",".join([*parts[:i], part, *parts[i + 1 :]]) for i in range(len(parts))]

    of, _, other_arm = baseline.rpartition("/")
    found = [
        (setting, baseline),
        *((other, arm) for other in with_part(baseline)),
        *((other, other_arm) for other in (of, *with_part(of))),
    ]
    there = list(dict.fromkeys(other for other in found if other in known))
    if of and (of, other_arm) in there:  # one entry, named in full
        there = [(of, other_arm)]
    if len(there) > 1:
        raise ValueError(f"baseline={baseline!r} may be {' or '.join(map('/'.join, there))}; give SETTING/ARM")
    return there[0] if there and there[0] != key else None


def _names(keys: Collection[Key]) -> list[str]:
    arms = [arm for _, arm in keys]
    parts = [part for setting, _ in keys for part in setting.split(",") if part]
    return list(dict.fromkeys([*arms, *parts]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
