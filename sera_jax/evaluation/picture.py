"""`report.png` of a method that goes in rounds: how margins, pairs, accuracy, gold reward and length go from round to
round, an arm a colour. The picture by iterations is in `iterations`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from sera_jax.evaluation import look
from sera_jax.evaluation.look import GREY

_STEP = 0.07  # arms stand this far apart around a round, so that equal values stay visible

Round = dict[str, Any]
# What warns of a ranking without a gold reward: its title and its axis.
_WARNINGS = {
    "kl_to_sft": ("KL to the SFT model", "of the candidates (nats per answer)"),
    "reward_ref_corr": ("Ranking against the SFT model", "correlation with its log-prob, within a prompt"),
    "reward_length_corr": ("Ranking against length", "correlation with length, within a prompt"),
    "repeated_ngrams": ("Candidates that repeat themselves", "share of 3-grams said before"),
}


class _Report:
    """A summary's rounds by arm, with the SFT model as round 0 of each, and the panels that draw them."""

    def __init__(self, summary: dict[str, Any], looks: look.Looks):
        self.sft: Round = dict(summary["arms"].get("sft", {}))
        self.arms: dict[str, list[Round]] = {}
        for facts in summary["rounds"]:
            self.arms.setdefault(facts["arm"], []).append(facts)
        for facts in self.arms.values():
            facts.sort(key=lambda f: f["round"])
        self.final: dict[str, Round] = summary["arms"]
        self.last = max((f["round"] for facts in self.arms.values() for f in facts), default=1)
        self.looks = look.looks_of(list(self.arms), looks)

    def shift(self, arm: str) -> float:
        names = list(self.arms)
        return _STEP * (names.index(arm) - (len(names) - 1) / 2)

    def has(self, name: str) -> bool:
        return any(name in facts for rounds in self.arms.values() for facts in rounds)

    def first(self, name: str) -> int:
        """First round that has the fact."""
        return min(f["round"] for rounds in self.arms.values() for f in rounds if name in f)

    def lines(self, axis: Any, name: str, *, scale: float = 1.0, start: bool = True) -> None:
        """One line per arm over the rounds, from the SFT model as round 0 where `start` and it has the fact."""
        for arm, rounds in self.arms.items():
            colour, marker = self.looks[arm].colour, self.looks[arm].marker
            points = [(f["round"] + self.shift(arm), scale * f[name]) for f in rounds if name in f]
            if start and name in self.sft:
                points.insert(0, (0.0, scale * self.sft[name]))
            if points:
                axis.plot(*zip(*points), color=colour, marker=marker)
        if start and name in self.sft:
            axis.plot(0, scale * self.sft[name], marker="o", color=GREY, markersize=7, zorder=5)
        self.rounds_axis(axis, first=0 if start and name in self.sft else self.first(name))

    def rounds_axis(self, axis: Any, *, first: int) -> None:
        ticks = list(range(first, self.last + 1))
        axis.set_xticks(ticks, ["SFT" if t == 0 else str(t) for t in ticks])
        axis.set_xlim(first - 0.4, self.last + 0.4)
        axis.set_xlabel("round")

    def gold(self, axis: Any) -> None:
        self.lines(axis, "gold_mean")
        for arm in self.arms:
            facts = self.final.get(arm, {})
            if "gold_ci95" in facts:
                result = next((f for f in self.arms[arm] if "kept_as_result" in f), self.arms[arm][-1])
                x = result["round"] + self.shift(arm)
                axis.vlines(x, *facts["gold_ci95"], color=self.looks[arm].colour, lw=1.2)
        axis.set(title="Gold reward of answers", ylabel="mean gold reward (95 % interval at the end)")

    def accuracy(self, axis: Any) -> None:
        self.lines(axis, "heldout_accuracy", scale=100)
        baselines = [
            f["length_baseline_accuracy"] for r in self.arms.values() for f in r if "length_baseline_accuracy" in f
        ]
        if baselines:
            level = baselines[0]
            axis.axhline(100 * level, color=GREY, ls=(0, (4, 3)), lw=1.2, zorder=1)
            ends = [rounds[-1].get("heldout_accuracy", level) for rounds in self.arms.values()]
            nearest = min(ends, key=lambda end: abs(end - level))
            below = nearest >= level  # away from the nearest curve
            axis.annotate(
                "longer answer wins",
                (0.99, 100 * level),
                xycoords=axis.get_yaxis_transform(),  # x as a share of the axis, y as data
                xytext=(0, -3 if below else 2),
                textcoords="offset points",
                ha="right",
                va="top" if below else "bottom",
                color=GREY,
            )
        axis.set(title="Held-out pairs ranked as labelled", ylabel="reward accuracy (%)")

    def shorter(self, axis: Any) -> None:
        self.lines(axis, "heldout_accuracy_shorter", scale=100)
        axis.set(title="Pairs with the shorter answer preferred", ylabel="reward accuracy (%)")

    def length(self, axis: Any) -> None:
        self.lines(axis, "response_tokens_mean")
        axis.set(title="Length of answers", ylabel="mean length (tokens)")

    def heldout_margin(self, axis: Any) -> None:
        self.lines(axis, "heldout_margin")
        axis.axhline(0, color=GREY, lw=0.8, zorder=1)
        axis.set(title="Margin of held-out pairs", ylabel="mean implicit reward margin (nats)")

    def margins(self, axis: Any) -> None:
        self.lines(axis, "margin_mean", start=False)
        for arm, rounds in self.arms.items():
            for facts in rounds:
                if "margin_p10" in facts and "margin_p90" in facts:
                    x = facts["round"] + self.shift(arm)
                    axis.vlines(
                        x, facts["margin_p10"], facts["margin_p90"], color=self.looks[arm].colour, lw=4, alpha=0.3
                    )
        axis.axhline(0, color=GREY, lw=0.8, zorder=1)
        axis.set(title="Offline pairs before selection", ylabel="margin, mean and p10 to p90 (nats)")

    def warning(self, name: str, title: str, ylabel: str) -> Callable[[Any], None]:
        """The panel of a fact of the candidates that needs no gold reward."""

        def draw(axis: Any) -> None:
            self.lines(axis, name)
            axis.axhline(0, color=GREY, lw=0.8, zorder=1)
            axis.set(title=title, ylabel=ylabel)

        return draw

    def pairs(self, axis: Any) -> None:
        width = min(0.8 / len(self.arms), 0.35)
        for i, (arm, rounds) in enumerate(self.arms.items()):
            x = [f["round"] + (i + 0.5 - len(self.arms) / 2) * width for f in rounds]
            kept, added = ([f.get(name, 0) for f in rounds] for name in ("kept", "added"))
            flipped = [k * f.get("flipped_fraction_kept", 0) for k, f in zip(kept, rounds)]
            colour = self.looks[arm].colour
            inner = 0.88 * width
            axis.bar(x, kept, inner, color=colour)
            axis.bar(x, flipped, inner, color="none", edgecolor="white", hatch="////", lw=0)
            axis.bar(x, added, inner, bottom=kept, color="white", edgecolor=colour, lw=1.2)
        self.rounds_axis(axis, first=1)
        top = max(f.get("kept", 0) + f.get("added", 0) for rounds in self.arms.values() for f in rounds)
        axis.set_ylim(0, 1.2 * max(top, 1))
        axis.set(title="Pairs trained on", ylabel="pairs")
        handles = [
            look.patch(facecolor=GREY, label="kept"),
            look.patch(facecolor=GREY, edgecolor="white", hatch="////", label="of them flipped"),
            look.patch(facecolor="white", edgecolor=GREY, label="added"),
        ]
        flips = any(f.get("flipped_fraction_kept") for rounds in self.arms.values() for f in rounds)
        handles = handles if flips else [handles[0], handles[2]]
        axis.legend(handles=handles, loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.4)

    def agreement(self, axis: Any) -> None:
        """Stacked shares of the sampled pairs, one bar per round and arm that has such pairs."""
        sampling = {arm: rounds for arm, rounds in self.arms.items() if any("agreement" in f for f in rounds)}
        width = min(0.8 / len(sampling), 0.35)
        for i, (arm, rounds) in enumerate(sampling.items()):
            colour = self.looks[arm].colour
            for facts in rounds:
                shares, bottom = facts.get("agreement", {}), 0.0
                fills = (
                    ("agree", {"color": colour}),
                    ("tie", {"color": colour, "alpha": 0.3}),
                    ("disagree", {"color": "white"}),
                )
                for name, fill in fills:
                    height = 100 * shares.get(name, 0.0)
                    x = facts["round"] + (i + 0.5 - len(sampling) / 2) * width
                    axis.bar(x, height, 0.88 * width, bottom=bottom, edgecolor=colour, linewidth=0.8, **fill)
                    bottom += height
        self.rounds_axis(axis, first=self.first("agreement"))
        axis.set(title="Sampled pairs against the gold reward", ylabel="share of added pairs (%)", ylim=(0, 122))
        axis.set_yticks(range(0, 101, 25))
        handles = [
            look.patch(facecolor=GREY, edgecolor=GREY, label="agree"),
            look.patch(facecolor="#CFCFCF", edgecolor=GREY, label="tie"),
            look.patch(facecolor="white", edgecolor=GREY, label="disagree"),
        ]
        axis.legend(handles=handles, loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.4)


def _panels(report: _Report) -> list[Callable[[Any], None]]:
    """What there is something to draw of, in reading order: outcome first, then what the rounds did."""
    panels = [
        ("gold_mean", report.gold),
        ("heldout_accuracy", report.accuracy),
        ("heldout_accuracy_shorter", report.shorter if not report.has("gold_mean") else None),
        ("response_tokens_mean", report.length),
        ("margin_mean", report.margins),
        ("heldout_margin", report.heldout_margin if not report.has("margin_mean") else None),
        ("kept", report.pairs),
        ("agreement", report.agreement),
    ]
    for name, words in _WARNINGS.items():
        shown = name != "repeated_ngrams" or not report.has("gold_mean")
        panels.append((f"bootstrap/{name}", report.warning(f"bootstrap/{name}", *words) if shown else None))
    return [draw for name, draw in panels if draw is not None and report.has(name)]


def draw_rounds(summary: dict[str, Any], path: str | os.PathLike[str], looks: look.Looks) -> None:
    """Draw a summary into a PNG, whole or absent; panels without data are left out.

    Nothing is drawn, and no file written, for a summary without rounds.
    """
    if not summary["rounds"]:
        return
    report = _Report(summary, looks)
    panels = _panels(report)
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    lines = -(-len(panels) // columns)
    with look.page(path, columns=columns, lines=lines) as figure:
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for axis, draw in zip(axes, panels):
            draw(axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        handles = [look.line(of.colour, of.marker, of.label) for of in report.looks.values()]
        look.head(figure, _heading(summary), handles, wide=columns > 1)


def _heading(summary: dict[str, Any]) -> str:
    """Loss, label noise and seed, as far as the summary says them."""
    parts = [summary["config"].get("loss", {}).get("name"), f"seed {summary['seed']}"]
    noise = summary["config"].get("data", {}).get("label_noise")
    if noise is not None:
        parts.insert(1, f"{100 * noise:.0f} % of labels flipped" if noise else "labels as given")
    return "Round by round: " + ", ".join(str(part) for part in parts if part)
