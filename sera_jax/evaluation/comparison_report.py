"""A comparison as people read it: on the terminal, in Markdown, as a picture."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

from sera_jax.evaluation import look
from sera_jax.evaluation.comparison import Comparison, Entry, Estimate, over_metric, parts_of
from sera_jax.evaluation.report import Column, aligned

_ENTRIES_A_PANEL = 9  # that a panel of the usual height has room for


def table(comparison: Comparison) -> str:
    """A table for each panel, and what its figures are."""
    parts = []
    for panel, entries in _panels(comparison):
        rows = aligned(entries, _columns(comparison))
        parts.append(f"{panel}\n{rows}" if panel else rows)
    return "\n\n".join([*parts, "\n".join(_notes(comparison))])


def markdown(comparison: Comparison) -> str:
    """The same for a page; a difference whose interval leaves out 0 is bold."""
    parts = []
    for panel, entries in _panels(comparison):
        cells = [
            (heading, [_cell(say, entry) for entry in entries]) for heading, say in _columns(comparison, mark="**")
        ]
        cells = [(heading, column) for heading, column in cells if any(column)]
        lines = [[heading for heading, _ in cells], ["---"] * len(cells), *zip(*(column for _, column in cells))]
        parts.append("\n".join([f"{panel}\n"] * bool(panel) + [f"| {' | '.join(line)} |" for line in lines]))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in _notes(comparison))]) + "\n"


def draw(comparison: Comparison, path: str | os.PathLike[str], looks: look.Looks) -> None:
    """The first metric of every entry, and its difference to the baseline, with intervals: as lines over the field or
    the metric of a curve, else at a place for each entry with its number of runs."""
    (_draw_curve if comparison.curve else _draw_places)(comparison, path, looks)


def _draw_places(comparison: Comparison, path: str | os.PathLike[str], looks: look.Looks) -> None:
    metric, panels = comparison.metrics[0], _panels(comparison)
    by_arm = look.looks_of(list(dict.fromkeys(entry.arm for entry in comparison.entries)), looks)
    columns = 2 if comparison.baseline else 1
    counts = [len(entries) for _, entries in panels]
    lines = sum(math.ceil(count / _ENTRIES_A_PANEL) for count in counts)
    with look.page(path, columns=2 * columns, lines=lines) as figure:
        figure.suptitle(_title(comparison), x=0.012, ha="left", fontsize=13, fontweight="bold")
        axes = figure.subplots(len(panels), columns, squeeze=False, sharex="col", gridspec_kw={"height_ratios": counts})
        for (panel, entries), row in zip(panels, axes):
            _draw_panel(row[0], entries, [entry.means.get(metric) for entry in entries], by_arm)
            mine, minus = comparison.headings(metric)
            row[0].set(title=panel, xlabel=mine)
            if comparison.baseline:
                _draw_panel(row[1], entries, [entry.differences.get(metric) for entry in entries], by_arm)
                row[1].axvline(0, color=look.GREY, lw=0.8, zorder=1)
                row[1].set(title="paired by seed", xlabel=f"{mine} {minus}")


def _title(comparison: Comparison) -> str:
    return f"{comparison.headings(comparison.metrics[0])[0]}: mean and 95 % interval over seeds"


def _draw_curve(comparison: Comparison, path: str | os.PathLike[str], looks: look.Looks) -> None:
    metric = comparison.metrics[0]
    mine, minus = comparison.headings(metric)
    kinds = [("means", mine), *([("differences", f"{mine}\n{minus}")] if comparison.baseline else [])]
    by_arm = look.looks_of(list(dict.fromkeys(entry.arm for entry in comparison.entries)), looks)
    of_metric = over_metric(comparison.curve, comparison.metrics)
    values = [] if of_metric else sorted(fields[comparison.curve] for fields in comparison.varied.values())
    drawn = set()
    with look.page(path, columns=len(kinds), lines=1) as figure:
        axes = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axis, (kind, words) in zip(axes, kinds, strict=True):
            for arm, its in by_arm.items():
                points = sorted(
                    (*at, found.mean, _half(found))
                    for entry in comparison.entries
                    if entry.arm == arm
                    and (found := getattr(entry, kind).get(metric))
                    and (at := _at(comparison, entry))
                )
                if points:
                    x, across, y, half = zip(*points, strict=True)
                    error = {"yerr": half} | ({"xerr": across} if of_metric else {})
                    axis.errorbar(x, y, **error, color=its.colour, marker=its.marker, elinewidth=1.2, capsize=2)
                    drawn.add(arm)
            if values:
                if values[0] > 0 and values[-1] >= 10 * values[0]:
                    axis.set_xscale("log")
                axis.set_xticks(values, [str(value) for value in values])
                axis.minorticks_off()
            axis.set(title="paired by seed" if kind == "differences" else "", xlabel=comparison.curve, ylabel=words)
        if comparison.baseline:
            axes[-1].axhline(0, color=look.GREY, lw=0.8, zorder=1)
        handles = [look.line(its.colour, its.marker, arm) for arm, its in by_arm.items() if arm in drawn]
        look.head(figure, _title(comparison), handles, wide=False)


def _at(comparison: Comparison, entry: Entry) -> tuple[float, float] | None:
    """Where an entry stands in the picture of a curve, with half an interval; None where that is not known."""
    if not over_metric(comparison.curve, comparison.metrics):
        return comparison.varied[entry.setting][comparison.curve], 0.0
    found = entry.means.get(comparison.curve)
    return None if found is None else (found.mean, _half(found))


def _half(found: Estimate) -> float:
    return 0.0 if math.isnan(found.half) else found.half


def _draw_panel(axis: Any, entries: list[Entry], found: list[Estimate | None], looks: dict[str, look.ArmLook]) -> None:
    names = []
    for place, (entry, value) in enumerate(zip(entries, found, strict=True)):
        name = ", ".join([*_own_parts(entry), entry.arm])
        names.append(f"{name} ({value.count})" if value else name)
        if value:
            its = looks[entry.arm]
            axis.errorbar(value.mean, place, xerr=_half(value), color=its.colour, marker=its.marker, lw=1.6)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)


def _panels(comparison: Comparison) -> list[tuple[str, list[Entry]]]:
    grouped = itertools.groupby(comparison.entries, key=lambda entry: entry.panel)
    return [(panel, list(entries)) for panel, entries in grouped]


def _own_parts(entry: Entry) -> list[str]:
    """The parts of the setting's name that its panel does not say."""
    field, _, value = entry.panel.partition("=")
    return [part for part in entry.setting.split(",") if part not in ("", *parts_of(field, value))]


def _columns(comparison: Comparison, *, mark: str = "") -> list[Column]:
    columns: list[Column] = [("setting", lambda entry: ",".join(_own_parts(entry))), ("arm", lambda entry: entry.arm)]
    for metric in comparison.metrics:
        mine, minus = comparison.headings(metric)
        columns.append((mine, lambda entry, m=metric: str(entry.means[m])))
        if comparison.baseline:
            columns.append((minus, lambda entry, m=metric: _marked(entry.differences[m], mark)))
    return columns


def _cell(say: Any, entry: Entry) -> str:
    try:
        return say(entry)
    except KeyError:
        return ""


def _marked(found: Estimate, mark: str) -> str:
    return f"{mark}{found}{mark}" if found.leaves_out_zero else str(found)


def _notes(comparison: Comparison) -> list[str]:
    """What the figures are, and what differs between the settings."""
    notes = ["mean ± half a 95 % t-interval over seeds (number of seeds); the best first"]
    estimates = [
        found for entry in comparison.entries for found in (*entry.means.values(), *entry.differences.values())
    ]
    if any(found.count == 1 for found in estimates):
        notes.append("(1): one seed, so there is no interval")
    if comparison.baseline:
        others = {"/".join(filter(None, entry.against)) for entry in comparison.entries if entry.against}
        of = f" ({next(iter(others))})" if len(others) == 1 else ""
        notes.append(f"minus {comparison.baseline}{of}: paired by seed, over the seeds that both have")
    notes += comparison.notes
    notes += [
        f"{setting}: {words}" for setting, fields in comparison.varied.items() if (words := _unsaid(setting, fields))
    ]
    return notes


def _unsaid(setting: str, fields: dict[str, Any]) -> str:
    """The fields of a setting that its name does not say."""
    said = setting.split(",")
    return ", ".join(f"{k}={v}" for k, v in fields.items() if not {*parts_of(k, v)} & {*said})
