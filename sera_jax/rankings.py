"""`python -m sera_jax.rankings RUN`: which ranking of a run's candidates would its gold reward have agreed with?

Of SeRA's rounds that made pairs of their own, in a run with a gold reward (docs/studies.md).
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from sera_jax.checkpoint.papers import load_json
from sera_jax.evaluation.rankings import LEGEND, table
from sera_jax.stop import EXIT_REFUSED


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, print the table; 2 where there is none."""
    args = _parser().parse_args(argv)
    try:
        summary = load_json(
            pathlib.Path(args.run) / "summary.json", "finish the run: start its command again", "rounds"
        )
        rounds = [round_ for round_ in summary["rounds"] if round_.get("rankings")]
        if not rounds:
            raise ValueError(
                f"{args.run} has no ranking to compare: no round made pairs of its own, or there is no gold reward "
                "(config.eval.gold for real rows)"
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(f"{table(rounds)}\n\n{LEGEND}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sera_jax.rankings", description="Compare rankings of a run's candidates.", allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="work directory of a finished run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
