"""`python -m sera_jax.compare RUNS...`: runs, or rows of a study, in one table: means over seeds and differences.

RUNS are work directories of finished runs, of whatever methods, or files of rows. Runs whose configs differ in nothing
but the seed (and in arms, folder, log and mesh) are of one setting; settings are named by the fields that differ.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from sera_jax.stop import EXIT_REFUSED
from sera_jax.studies.rows import rows_of
from sera_jax.studies.shown import show


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, compare; 2 where something is refused."""
    args = _parser().parse_args(argv)
    try:
        show(
            rows_of(args.runs),
            [metric for metric in args.metrics.split(",") if metric],
            arms=[arm for arm in args.arms.split(",") if arm],
            baseline=args.baseline,
            panels=args.panels,
            curve=args.curve,
            smaller_is_better=args.smaller_is_better,
            out=pathlib.Path(args.out) if args.out else None,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sera_jax.compare", description="Compare runs over their seeds.", allow_abbrev=False
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS", help="work directories of finished runs, or files of rows (JSONL)")
    add(
        "--metrics",
        default="gold_mean",
        help="facts of an arm, comma-separated, or MINE:BASELINES; the first one ranks",
    )
    add("--arms", default="", help="those shown, comma-separated; default: all")
    add("--baseline", default="", help="differences to an arm, a part of a setting's name, PART/ARM or SETTING/ARM")
    add("--panels", default="", help="a field, by whose values tables are made")
    add(
        "--curve",
        default="",
        help="a field, or a further one of the metrics, over whose values the picture draws lines",
    )
    add("--smaller_is_better", action="store_true", help="of the first metric")
    add("--out", default="", help="folder for comparison.md, comparison.json and comparison.png")
    return parser


if __name__ == "__main__":
    sys.exit(main())
