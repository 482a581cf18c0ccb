"""The picture of Self-Rewarding PPO: what its arms reach on held-out prompts, and how the iterations went.

Nothing is smoothed. An arm that PPO trains has a colour and a marker in every panel; the others, which have no
iterations, are horizontal lines named at their end.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax.evaluation import look
from sera_jax.evaluation.look import GREY, INK

Facts = dict[str, Any]

_SMALL = 8.5  # type size of what stands within a panel
_LOWEST_EXPLAINED = -1.0  # an untrained critic explains far less than nothing; below this nobody needs to tell apart


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A fact of a policy that is measured on held-out prompts or texts."""

    name: str
    title: str
    says: str  # the axis
    scale: float = 1.0
    interval: str = ""  # the fact that is its 95 % interval


# The first of which a summary has something is its outcome: the large panel.
_HELD_OUT = [
    HeldOut("gold_mean", "Gold reward of answers to held-out prompts", "mean gold reward", interval="gold_ci95"),
    HeldOut("answer_accuracy", "Right answers to held-out prompts", "share of answers (%)", 100),
    HeldOut("wellformed_fraction", "Well-formed answers", "share of answers (%)", 100),
    HeldOut("heldout_nll", "NLL of held-out demonstrations", "nats per token"),
]


def draw(summary: dict[str, Any], path: str | os.PathLike[str], looks: look.Looks) -> None:
    """Draw a summary by iterations into a PNG, whole or absent; panels without data are left out.

    Nothing is drawn, and no file written, where there are neither evaluations during training nor iterations.
    """
    report = _Report(summary, looks)
    panels = _panels(report)
    if not panels:
        return
    columns = 3
    wide = 1 + (-len(panels)) % columns  # so that the panels fill the grid
    lines = (len(panels) - 1 + wide) // columns
    with look.page(path, columns=columns, lines=lines) as figure:
        grid = figure.add_gridspec(lines, columns)
        places = [(0, slice(0, wide)), *(divmod(i, columns) for i in range(wide, lines * columns))]
        for place, (panel, span) in zip(places, zip(panels, [wide] + [1] * (len(panels) - 1))):
            panel(figure.add_subplot(grid[place]), span)
        trained = [(report.looks[arm], report.label(arm)) for arm in report.trained]
        handles = [look.line(of.colour, of.marker, label) for of, label in trained]
        look.head(figure, _heading(summary), handles, wide=True)


def _panels(report: _Report) -> list[Callable[[Any, int], None]]:
    """What there is something to draw of, called with (axis, columns it spans): the outcome first."""

    def held_out(fact: HeldOut) -> Callable[[Any, int], None]:
        return lambda axis, span: report.held_out(axis, fact, span=span)

    def by_iteration(panel: Callable[[Any], None]) -> Callable[[Any, int], None]:
        return lambda axis, span: panel(axis)

    facts = [held_out(fact) for fact in _HELD_OUT if report.evaluated(fact.name)]
    course = [
        ("coherent_reward/mean", report.coherent_reward),
        ("objective/kl", report.kl),
        ("completions/mean_length", report.length),
        ("rollout/gold_mean", report.rollout_gold),
        ("completions/clipped_ratio", report.cut),
        ("critic/vf_explained_var", report.critic),
    ]
    measured = [by_iteration(panel) for name, panel in course if report.measured(name)]
    return [*facts[:1], *measured[:4], *facts[1:], *measured[4:]]


class _Report:
    """A summary by arm, and the panels that draw it."""

    def __init__(self, summary: dict[str, Any], looks: look.Looks):
        self.final: dict[str, Facts] = summary["arms"]
        self.best_of = summary["config"].get("ppo", {}).get("best_of")
        self.evaluations = _by_arm(summary["rounds"])
        self.iterations = _by_arm(summary.get("iterations", []))
        names = {**self.iterations, **self.evaluations}
        order = [*looks, *(arm for arm in names if arm not in looks)]
        self.trained = sorted(names, key=order.index)
        self.flat = [arm for arm in self.final if arm not in names]
        self.looks = look.looks_of([*self.trained, *self.flat], looks)
        self.last = max((self.last_of(arm) for arm in self.trained), default=1)

    def label(self, arm: str) -> str:
        return self.looks[arm].label.format(best_of=self.best_of or "n")

    def last_of(self, arm: str) -> int:
        return max(facts["iteration"] for facts in [*self.iterations.get(arm, []), *self.evaluations.get(arm, [])])

    def evaluated(self, name: str) -> bool:
        ends = [self.final.get(arm, {}) for arm in self.trained]
        return any(_value(facts, name) is not None for rows in (ends, *self.evaluations.values()) for facts in rows)

    def measured(self, name: str) -> bool:
        return any(_value(facts, name) is not None for rows in self.iterations.values() for facts in rows)

    def course(self, arm: str, name: str) -> list[tuple[int, float]]:
        """(iteration, value) of a held-out fact: the SFT model as iteration 0, the evaluations, the end."""
        rows = [(0, self.final.get("sft", {}))]
        rows += [(facts["iteration"], facts) for facts in self.evaluations.get(arm, [])]
        rows.append((self.last_of(arm), self.final.get(arm, {})))
        known = {i: value for i, facts in rows if (value := _value(facts, name)) is not None}
        return sorted(known.items())

    def held_out(self, axis: Any, fact: HeldOut, *, span: int) -> None:
        """A line with points per trained arm, a horizontal one per other arm, intervals and names at their ends."""
        ends = []
        for k, arm in enumerate([*self.flat, *self.trained]):
            of = self.looks[arm]
            interval = self.final.get(arm, {}).get(fact.interval)
            interval = None if interval is None else [fact.scale * bound for bound in interval]
            if arm in self.trained:
                course = [(i, fact.scale * value) for i, value in self.course(arm, fact.name)]
                if course:
                    axis.plot(*zip(*course), color=of.colour, marker=of.marker, zorder=4 - 0.05 * k)
                    ends.append(End(self.label(arm), of.colour, *course[-1], interval, of.marker))
            elif (value := _value(self.final[arm], fact.name)) is not None:
                value *= fact.scale
                axis.plot([0, self.last], [value, value], color=of.colour, ls=of.dashes, lw=1.4, zorder=3)
                ends.append(End(self.label(arm), of.colour, self.last, value, interval, None))
                if arm == "sft":
                    axis.plot(0, value, marker="o", color=GREY, markersize=7, zorder=5)
        says = fact.says + (" (95 % intervals right)" if any(end.interval for end in ends) else "")
        axis.set(title=fact.title, ylabel=says)
        first = 0 if "sft" in self.final and _value(self.final["sft"], fact.name) is not None else 1
        name_ends(axis, ends, first=first, last=self.last, span=span)
        self.iterations_axis(axis, first=first)

    def iterations_axis(self, axis: Any, *, first: int) -> None:
        from matplotlib.ticker import MaxNLocator

        ticks = MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]).tick_values(first, self.last)
        ticks = sorted({first, *(int(t) for t in ticks if first + 0.05 * self.last < t <= self.last)})
        axis.set_xticks(ticks, ["SFT" if t == 0 else str(t) for t in ticks])
        axis.set_xlabel("iteration")

    def lines(self, axis: Any, name: str, *, scale: float = 1.0, spread: str = "") -> None:
        """A thin line per trained arm, a marker here and there to tell them apart; a band of +- `spread`, if given."""
        for k, arm in enumerate(self.trained):
            rows = self.iterations.get(arm, [])
            values = scale * _values(rows, name)
            if not np.isfinite(values).any():
                continue
            colour, marker = self.looks[arm].colour, self.looks[arm].marker
            x = np.array([facts["iteration"] for facts in rows])
            step = max(1, len(rows) // 6)
            sparse = slice(min(k * step // len(self.trained), len(rows) - 1), None, step)
            on_top = len(self.trained) - k  # the method itself lies over its controls
            axis.plot(x, values, color=colour, lw=1.1 if len(rows) <= 150 else 0.7, zorder=3 + 0.1 * on_top)
            axis.plot(x[sparse], values[sparse], color=colour, ls="", marker=marker, markersize=5, zorder=4)
            if spread:
                deviation = scale * _values(rows, spread)
                axis.fill_between(x, values - deviation, values + deviation, color=colour, alpha=0.08, lw=0, zorder=2)
        axis.set_xlim(1 - 0.03 * self.last, 1.03 * self.last)
        self.iterations_axis(axis, first=1)

    def coherent_reward(self, axis: Any) -> None:
        self.lines(axis, "coherent_reward/mean", spread="coherent_reward/std")
        axis.set(title="Coherent reward, what PPO optimises", ylabel="of rollouts, mean and band of ± std (nats)")

    def kl(self, axis: Any) -> None:
        self.lines(axis, "objective/kl")
        axis.axhline(0, color=GREY, lw=0.8, zorder=1)
        axis.set(title="KL to the SFT model", ylabel="of rollouts (nats per answer)")

    def length(self, axis: Any) -> None:
        self.lines(axis, "completions/mean_length")
        axis.set(title="Length of answers", ylabel="of rollouts, mean (tokens)")
        sft = _value(self.final.get("sft", {}), "response_tokens_mean")
        if sft is not None:
            axis.axhline(sft, color=GREY, ls=self.looks["sft"].dashes, lw=1.4, zorder=3, label="SFT, held-out prompts")
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + 0.14 * (high - low))  # room for the legend
            axis.legend(loc="upper left", handlelength=3)

    def rollout_gold(self, axis: Any) -> None:
        self.lines(axis, "rollout/gold_mean")
        axis.set(title="Gold reward of rollouts", ylabel="mean gold reward")

    def cut(self, axis: Any) -> None:
        self.lines(axis, "completions/clipped_ratio", scale=100)
        axis.set_ylim(0, max(5.0, axis.get_ylim()[1]))
        axis.set(title="Answers cut at the length limit", ylabel="share of rollouts (%)")

    def critic(self, axis: Any) -> None:
        self.lines(axis, "critic/vf_explained_var")
        axis.axhline(0, color=GREY, lw=0.8, zorder=1)
        low = axis.get_ylim()[0]
        axis.set_ylim(max(low, _LOWEST_EXPLAINED), 1)
        below = f", not shown below {_LOWEST_EXPLAINED:.0f}" if low < _LOWEST_EXPLAINED else ""
        axis.set(title="Variance the critic explains", ylabel=f"1 is all of it{below}")


@dataclasses.dataclass(frozen=True)
class End:
    """Where an arm's line ends; interval: of the value there; marker: None for a line without points."""

    label: str
    colour: str
    x: float
    y: float
    interval: Sequence[float] | None
    marker: str | None


def name_ends(axis: Any, ends: Sequence[End], *, first: int, last: int, span: int) -> None:
    """Make room at the right of an axis, draw there the ends' intervals side by side, and name every line once."""
    from matplotlib.textpath import TextPath

    points = 72 * look.PANEL_INCHES[0] * span - 60  # about the axis' width; its labels take the rest
    widest = max((TextPath((0, 0), end.label, size=_SMALL).get_extents().width for end in ends), default=0)
    slots = sum(end.interval is not None for end in ends)
    gap, step, lead, text = 8.0, 9.0, 14.0, 1.05 * widest  # points
    room = min(0.6, (gap + step * slots + lead + text) / points)
    left = first - 0.02 * last
    per_point = (last - left) / (1 - room) / points
    axis.set_xlim(left, last + room * points * per_point)

    bounds = [bound for end in ends for bound in end.interval or ()]
    if bounds:
        axis.update_datalim([(first, bound) for bound in bounds])
        axis.autoscale_view(scalex=False)
    low, high = axis.get_ylim()
    height = 72 * look.PANEL_INCHES[1] - 75
    share = [(end.y - low) / (high - low) for end in ends]
    placed = spaced(share, gap=1.4 * _SMALL / height)
    x_slots = last + gap * per_point
    x_lead = x_slots + step * slots * per_point
    x_text = x_lead + lead * per_point
    slot = 0
    for end, y in zip(ends, placed):
        y_text = low + y * (high - low)
        axis.plot([end.x, x_lead, x_text - 3 * per_point], [end.y, end.y, y_text], color=end.colour, lw=0.8, alpha=0.7)
        axis.text(x_text, y_text, end.label, fontsize=_SMALL, va="center", color=INK)
        if end.interval is not None:
            x = x_slots + (slot + 0.5) * step * per_point
            axis.vlines(x, *end.interval, color=end.colour, lw=1.6, zorder=4)
            axis.plot(x, end.y, color=end.colour, marker=end.marker or "o", markersize=5, zorder=5)
            slot += 1
    axis.set_ylim(low, high)


def spaced(wanted: Sequence[float], *, gap: float) -> list[float]:
    """Heights at least `gap` apart, in the order of the wanted ones and, in squares, as near to them as that allows.

    They stay within 0 and 1 where there is room for that. With gap * rank taken off, the order is all that is asked:
    neighbours in the wrong order are pooled at their mean (isotonic regression).
    """
    order = np.argsort(wanted, kind="stable")
    pools: list[tuple[float, int]] = []
    for rank, i in enumerate(order):
        mean, count = wanted[i] - gap * rank, 1
        while pools and pools[-1][0] > mean:
            before, n = pools.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        pools.append((mean, count))
    level = np.repeat([mean for mean, _ in pools], [count for _, count in pools])
    level = np.clip(level, 0, max(0.0, 1 - gap * (len(order) - 1)))
    out = np.empty(len(order))
    out[order] = level + gap * np.arange(len(order))
    return out.tolist()


def _by_arm(rows: Sequence[Facts]) -> dict[str, list[Facts]]:
    arms: dict[str, list[Facts]] = {}
    for facts in sorted(rows, key=lambda facts: facts["iteration"]):
        arms.setdefault(facts["arm"], []).append(facts)
    return arms


def _value(facts: Facts, name: str) -> float | None:
    value = facts.get(name)
    return value if value is not None and math.isfinite(value) else None


def _values(rows: Sequence[Facts], name: str) -> np.ndarray:
    """nan, a gap in the line, where a row lacks the fact."""
    found = [_value(facts, name) for facts in rows]
    return np.array([math.nan if value is None else value for value in found], np.float64)


def _heading(summary: Facts) -> str:
    """How the reward is paid, the KL coefficient and the seed, as far as the summary says them."""
    config = summary["config"]
    placement = {"eos": "reward at the last token", "token": "reward per token"}.get(
        config.get("reward", {}).get("placement")
    )
    coefficient = config.get("ppo", {}).get("kl_coef")
    parts = [placement, None if coefficient is None else f"KL coefficient {coefficient:g}", f"seed {summary['seed']}"]
    return "Self-Rewarding PPO: " + ", ".join(part for part in parts if part)
