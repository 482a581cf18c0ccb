"""Cost against size: DPO steps and scoring over the width of the model, the length of rows and the number of cores.

    python -m tests.benchmarks.scaling [--repeats 3] [--cores 1 2] [--json scaling.json] [--picture docs/scaling.png]
    python -m tests.benchmarks.scaling --drawn-from scaling.json --picture docs/scaling.png

The work is `training_speed`'s, of models of as many layers whose heads and feed-forward grow with their width. A number
of cores is a process of its own that may run on those alone. `of_peak` are the FLOPs of the matmuls that the real
tokens need over what a square float32 matmul reaches on the same cores between the rounds.
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
WORKS = ("cached", "score")
MARKERS = "os^D"  # of numbers of cores
STEPS = 2  # of a round of training


def _measured(repeats: int) -> list[dict[str, Any]]:
    """A line for each width, row and work, on the cores of this process."""
    import numpy as np

    from sera_jax.config import TrainGroup
    from tests.benchmarks import training_speed as bench

    peak = bench.matmul_peak()
    found = []
    for hidden in HIDDEN:
        cfg = dataclasses.replace(
            bench.BENCH,
            hidden_size=hidden,
            intermediate_size=hidden * bench.BENCH.intermediate_size // bench.BENCH.hidden_size,
            num_attention_heads=hidden // bench.BENCH.head_dim,
            num_key_value_heads=hidden // bench.BENCH.head_dim // 2,
        )
        for row in ROWS:
            given = argparse.Namespace(steps=STEPS, chunk_tokens=TrainGroup().logits_chunk_tokens)
            works: dict[str, bench.Training | bench.Scoring] = {
                "cached": bench.Training(row, given, in_step=False, cfg=cfg),
                "score": bench.Scoring(row, given, cfg=cfg),
            }
            for name, work in works.items():
                work.warm()
                peaks, seconds, counts = [], [], []
                for _ in range(repeats):
                    peaks.append(peak())
                    start = time.perf_counter()
                    counts.append(work.round())
                    seconds.append(time.perf_counter() - start)
                found.append(
                    {
                        "work": name,
                        "hidden": hidden,
                        "row": row,
                        "cores": len(os.sched_getaffinity(0)),
                        "tokens_per_s": float(np.median([c.real / s for c, s in zip(counts, seconds)])),
                        "of_peak": float(np.median([c.flops / s / 1e9 / p for c, s, p in zip(counts, seconds, peaks)])),
                        "padding": 1 - sum(c.used for c in counts) / sum(c.laid for c in counts),
                        "peak_gflops": float(np.median(peaks)),
                    }
                )
                print(json.dumps(found[-1]), flush=True)
    return found


def _draw(found: list[dict[str, Any]], path: str) -> None:
    from sera_jax.evaluation import look

    colours = dict(zip(ROWS, (look.BLUE, look.VERMILION, look.GREEN), strict=True))
    cores = sorted({one["cores"] for one in found})
    names = {"cached": "DPO steps of 8 pairs", "score": "Scoring 256 pairs"}
    with look.page(path, columns=2, lines=1) as figure:
        for axes, work in zip(figure.subplots(1, 2, sharey=True), WORKS, strict=True):
            for row in ROWS:
                for count in cores:
                    of = [one for one in found if (one["work"], one["row"], one["cores"]) == (work, row, count)]
                    axes.plot(
                        [one["hidden"] for one in of],
                        [one["of_peak"] for one in of],
                        color=colours[row],
                        marker=MARKERS[cores.index(count)],
                        linestyle="-" if count == cores[0] else "--",
                    )
            axes.set(title=names[work], xlabel="hidden size", xticks=HIDDEN, ylim=(0, 1))
        figure.axes[0].set_ylabel("share of the matmul peak of those cores")
        handles = [look.line(colours[row], "o", f"rows of {row}") for row in ROWS]
        for count, marker in zip(cores, MARKERS):
            handles.append(look.line(look.GREY, marker, f"{count} core{'s' if count > 1 else ''}"))
        look.head(figure, "Useful work against size", handles, wide=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
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
