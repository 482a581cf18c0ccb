"""Cost against size: DPO steps over the width of the model, the length of rows and the number of cores.

    python -m tests.benchmarks.scaling [--repeats 2] [--cores 1 2] [--json scaling.json] [--picture docs/scaling.png]
    python -m tests.benchmarks.scaling --drawn-from scaling.json --picture docs/scaling.png

The steps are `training_speed`'s with stored reference log-probs, of models of as many layers whose heads and
feed-forward grow with their width; one of width and row length varies, the other is that of the bench. A number of
cores is a process of its own that may run on those alone. `of_peak` are the FLOPs of the matmuls that the real tokens
need over what a square float32 matmul reaches on the same cores between the rounds.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

HIDDEN, ROWS = (128, 256, 512, 768), (512, 1024, 2048)
USUAL_HIDDEN, USUAL_ROW = 256, 1024
MARKERS = "os^D"  # of numbers of cores
STEPS = 2  # of a round


def _measured(repeats: int) -> None:
    """Print a line for each width and row, on the cores of this process."""
    import numpy as np

    from sera_jax.config import TrainGroup
    from tests.benchmarks import training_speed as bench

    peak = bench.matmul_peak()
    for hidden, row in dict.fromkeys([*((h, USUAL_ROW) for h in HIDDEN), *((USUAL_HIDDEN, r) for r in ROWS)]):
        cfg = dataclasses.replace(
            bench.BENCH,
            hidden_size=hidden,
            intermediate_size=hidden * bench.BENCH.intermediate_size // bench.BENCH.hidden_size,
            num_attention_heads=hidden // bench.BENCH.head_dim,
            num_key_value_heads=hidden // bench.BENCH.head_dim // 2,
        )
        given = argparse.Namespace(steps=STEPS, chunk_tokens=TrainGroup().logits_chunk_tokens)
        work = bench.Training(row, given, in_step=False, cfg=cfg)
        work.warm()
        peaks, seconds, counts = [], [], []
        for _ in range(repeats):
            peaks.append(peak())
            start = time.perf_counter()
            counts.append(work.round())
            seconds.append(time.perf_counter() - start)
        done = list(zip(counts, seconds, peaks, strict=True))
        line = {
            "hidden": hidden,
            "row": row,
            "cores": len(os.sched_getaffinity(0)),
            "tokens_per_s": float(np.median([count.real / s for count, s, _ in done])),
            "of_peak": float(np.median([count.flops / s / 1e9 / p for count, s, p in done])),
            "padding": 1 - sum(c.used for c in counts) / sum(c.laid for c in counts),
            "peak_gflops": float(np.median(peaks)),
        }
        print(json.dumps(line), flush=True)


def _draw(found: list[dict[str, Any]], path: str) -> None:
    from sera_jax.evaluation import look

    cores = sorted({one["cores"] for one in found})
    colours = (look.BLUE, look.VERMILION, look.GREEN, look.PURPLE)
    panels = {
        "hidden": (f"hidden size, rows of {USUAL_ROW}", HIDDEN),
        "row": (f"tokens of a row, hidden size {USUAL_HIDDEN}", ROWS),
    }
    other = {"hidden": ("row", USUAL_ROW), "row": ("hidden", USUAL_HIDDEN)}
    with look.page(path, columns=2, lines=1) as figure:
        for axes, (over, (words, ticks)) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
            fixed, value = other[over]
            for count, colour, marker in zip(cores, colours, MARKERS, strict=False):
                of = sorted(
                    (one[over], one["of_peak"], one["tokens_per_s"])
                    for one in found
                    if one["cores"] == count and one[fixed] == value
                )
                axes.plot([x for x, *_ in of], [y for _, y, _ in of], color=colour, marker=marker)
                for x, y, rate in of:
                    away = (0, 7 if count == cores[0] else -15)
                    axes.annotate(f"{rate:,.0f}", (x, y), away, textcoords="offset points", ha="center", fontsize=8)
            axes.set(xlabel=words, xscale="log", xticks=ticks, xticklabels=[str(tick) for tick in ticks], ylim=(0, 1))
            axes.minorticks_off()
        figure.axes[0].set_ylabel("useful multiplications\nas a share of the matmul peak")
        handles = [
            look.line(colour, marker, f"{count} core{'s' if count > 1 else ''}")
            for count, colour, marker in zip(cores, colours, MARKERS, strict=False)
        ]
        look.head(figure, "DPO steps of 8 pairs: share of the peak, and tokens a second", handles, wide=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", default="", help="where the figures are written")
    parser.add_argument("--picture", default="", help="where they are drawn")
    parser.add_argument("--drawn-from", default="", help="figures of before, in place of measuring")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        _measured(args.repeats)
        return
    if args.drawn_from:
        found = json.loads(pathlib.Path(args.drawn_from).read_text(encoding="utf-8"))
    else:
        found = []
        here = [sys.executable, "-m", "tests.benchmarks.scaling", "--here", f"--repeats={args.repeats}"]
        all_cores = sorted(os.sched_getaffinity(0))
        if max(args.cores) > len(all_cores) or len(args.cores) > len(MARKERS):
            parser.error(f"--cores: at most {len(MARKERS)} numbers, of {len(all_cores)} cores")
        for count in args.cores:
            own = all_cores[:count]
            child = subprocess.Popen(
                here, stdout=subprocess.PIPE, text=True, preexec_fn=lambda own=own: os.sched_setaffinity(0, own)
            )
            assert child.stdout is not None
            for line in child.stdout:
                print(line, end="", flush=True)
                found.append(json.loads(line))
            if child.wait():
                raise SystemExit(f"measuring on {count} cores ended with {child.returncode}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        _draw(found, args.picture)


if __name__ == "__main__":
    main()
