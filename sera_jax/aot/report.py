"""What a look ahead says: a table, the same as JSON, and a picture of memory by phase."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from sera_jax.aot.chips import GIB
from sera_jax.aot.measure import Row
from sera_jax.aot.topology import Topology
from sera_jax.evaluation import look
from sera_jax.evaluation.report import aligned

ASSUMED_ROWS = 1000  # of a source that is not there


@dataclasses.dataclass(frozen=True)
class Shares:
    """What is assumed of speed: shares of the chip's peak and bandwidth that are reached, and the mean length of
    prompts and answers as a share of the longest that the config admits."""

    peak: float
    bandwidth: float
    length: float


def report(
    rows: Sequence[Row],
    topology: Topology,
    shares: Shares,
    *,
    config: str,
    assumed: Sequence[str] = (),
    left_out: int = 0,
) -> dict[str, Any]:
    """All that is known, JSON-able.

    Args:
        config: its name. assumed: of what the number of rows is not known. left_out: phases that were not looked at.
    """
    hours = _hours(rows, topology, shares)
    return {
        "config": config,
        "topology": topology.name,
        "devices": len(topology.devices),
        "chips": topology.chips,
        "limit_gib": topology.limit / GIB,
        "estimate": not topology.compiles,
        "left_out": left_out,
        "fits": all(row.fits for row in rows),
        "rows": [_row(row, topology, shares) for row in rows],
        "hours": hours,
        "chip_hours": None if hours is None else hours * topology.chips,
        "assumptions": _assumptions(topology, shares, assumed),
        "overrides": [],
        "laws": [],
    }


def _row(row: Row, topology: Topology, shares: Shares) -> dict[str, Any]:
    seconds = _expected(row, topology, shares)
    return {
        "phase": row.name,
        "mesh": row.mesh,
        "program_gib": row.peak / GIB,
        "beside_gib": {name: size / GIB for name, size in row.beside.items()},
        "total_gib": row.total / GIB,
        "fits": row.fits,
        "compile_seconds": row.compile_seconds,
        "flops": row.flops,
        "matmul_flops": row.done,
        "useful_share": row.flops / row.done if row.done else None,
        "floor_seconds": row.floor_seconds,
        "calls": row.calls,
        "expected_hours": None if seconds is None else seconds / 3600,
        "collectives": [one._asdict() for one in row.collectives],
        "note": row.note,
    }


def _expected(row: Row, topology: Topology, shares: Shares) -> float | None:
    seconds = row.expected_seconds(topology, shares.peak, shares.bandwidth)
    return seconds if seconds is None or not row.flops else seconds * shares.length


def _hours(rows: Sequence[Row], topology: Topology, shares: Shares) -> float | None:
    seconds = [_expected(row, topology, shares) for row in rows]
    return None if None in seconds else sum(second for second in seconds if second is not None) / 3600


def _assumptions(topology: Topology, shares: Shares, assumed: Sequence[str]) -> list[str]:
    out = [f"prompts and answers are {shares.length:.0%} as long as the config admits (--mean_length)"]
    if topology.chip is not None:
        out.append(
            f"{shares.peak:.0%} of {topology.chip.flops / 1e12:.0f} TFLOP/s a device (--share_of_peak) or "
            f"{shares.bandwidth:.0%} of {topology.chip.bandwidth / 1e9:.0f} GB/s (--share_of_bandwidth), whichever "
            "takes longer; nothing for reading, writing and compiling"
        )
    if assumed:
        out.append(f"{ASSUMED_ROWS} rows in each of {', '.join(assumed)}, which are not there: hours grow with them")
    if not topology.compiles:
        out.append("estimated from arrays alone: no compiler has seen it")
    return out


def table(facts: Mapping[str, Any]) -> str:
    """For the terminal: what each phase takes of a device, and how long."""
    known = facts["hours"] is not None

    def gib(name: str) -> Any:
        return lambda row: f"{row[name]:.2f}"

    columns = [
        ("phase", lambda row: row["phase"]),
        ("mesh", lambda row: row["mesh"]),
        ("program", gib("program_gib")),
        ("beside", lambda row: f"{sum(row['beside_gib'].values()):.2f}"),
        ("total", gib("total_gib")),
        ("of GiB", lambda row: f"{facts['limit_gib']:.2f}" + ("" if row["fits"] else " NO")),
        ("compile s", lambda row: _of(row["compile_seconds"], "{:.0f}")),
        ("TFLOP", lambda row: _of(row["flops"] / 1e12, "{:.3g}")),
        ("useful %", lambda row: _of(row["useful_share"], "{:.0f}", 100)),
        ("floor ms", lambda row: _of(row["floor_seconds"], "{:.3g}", 1e3)),
        ("calls", lambda row: f"{row['calls']:.0f}"),
        ("hours", lambda row: _of(row["expected_hours"], "{:.2f}") if known else ""),
    ]
    parts = [aligned(facts["rows"], columns)]
    if moved := [{"phase": row["phase"], **one} for row in facts["rows"] for one in row["collectives"]]:
        of = [
            ("phase", lambda row: row["phase"]),
            ("collective", lambda row: row["kind"]),
            ("times", lambda row: str(row["times"])),
            ("MiB of a device", lambda row: f"{row['bytes'] / 2**20:.1f}"),
            ("per", lambda row: "step" if row["each_step"] else "call"),
        ]
        parts.append(aligned(moved, of))
    return "\n\n".join(parts)


def verdict(facts: Mapping[str, Any]) -> list[str]:
    """Lines below the table: what does not fit and by how much, what the run takes, what was assumed."""
    out = []
    for row in facts["rows"]:
        if not row["fits"]:
            beside = ", ".join(f"{name} {size:.2f}" for name, size in row["beside_gib"].items())
            out.append(
                f"does not fit: {row['phase']} takes {row['total_gib'] - facts['limit_gib']:.2f} GiB more of a device "
                f"than the {facts['limit_gib']:.2f} it has ({row['program_gib']:.2f} itself"
                + (f", {row['note']}" if row["note"] else "")
                + (f"; beside it {beside})" if beside else ")")
            )
    if facts["fits"]:
        which = "each of these phases" if facts["left_out"] else "every phase"
        out.append(f"{which} fits {facts['topology']}")
    if facts["left_out"]:
        out.append(f"{facts['left_out']} other phases were not looked at")
    if facts["hours"] is not None:
        alone = " of these phases alone" if facts["left_out"] else ""
        out.append(f"expected{alone}: {facts['hours']:.2f} hours, {facts['chip_hours']:.1f} chip-hours, where")
        out += [f"  {line}" for line in facts["assumptions"]]
    return out


def _of(value: float | None, how: str, unit: float = 1.0) -> str:
    return "" if not value else how.format(value * unit)


def draw(facts: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Memory of a device by phase against what it has: the program, and each thing beside it."""
    rows = facts["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["beside_gib"]))
    colours = [look.ORANGE, look.GREEN, look.SKY, look.PURPLE, look.YELLOW, look.BROWN, look.GREY, look.VERMILION]
    fills = {name: colours[i % len(colours)] for i, name in enumerate(names)}
    with look.page(path, columns=2, lines=max(1, round(len(rows) / 11))) as figure:
        axis = figure.subplots()
        for place, row in enumerate(rows):
            axis.barh(place, row["program_gib"], 0.7, color=look.BLUE)
            left = row["program_gib"]
            for name, size in row["beside_gib"].items():
                axis.barh(place, size, 0.7, left=left, color=fills[name])
                left += size
            colour, weight = (look.INK, "normal") if row["fits"] else (look.VERMILION, "bold")
            axis.text(left, place, f" {row['total_gib']:.2f}", va="center", color=colour, weight=weight, fontsize=8.5)
        axis.axvline(facts["limit_gib"], color=look.INK, lw=1.2, ls=(0, (4, 3)))
        axis.text(facts["limit_gib"], -0.75, f"{facts['limit_gib']:.2f}", ha="center", va="bottom", fontsize=8.5)
        axis.set_yticks(range(len(rows)), [row["phase"] for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.9)
        most = max([facts["limit_gib"], *(row["total_gib"] for row in rows)])
        axis.set_xlim(0, 1.12 * most)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
        axis.set_xlabel("GiB of a device" + (", estimated" if facts["estimate"] else ""))
        parts = [("the program", look.BLUE), *fills.items()]
        handles = [look.patch(facecolor=colour, label=name) for name, colour in parts]
        figure.suptitle(f"{facts['config']} on {facts['topology']}", x=0.012, ha="left", fontsize=13, fontweight="bold")
        figure.legend(handles=handles, loc="outside lower left", ncols=min(5, len(handles)), fontsize=9)
