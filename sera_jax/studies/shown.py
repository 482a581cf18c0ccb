"""What rows say together: on the terminal and, in a folder, as comparison.md, comparison.json and comparison.png."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from sera_jax.checkpoint.papers import write_json
from sera_jax.evaluation.comparison import compare
from sera_jax.evaluation.comparison_report import draw, markdown, table
from sera_jax.experiment.method import looks
from sera_jax.experiment.methods import METHODS
from sera_jax.studies.plan import COMPUTES
from sera_jax.studies.rows import Row


def show(
    rows: Sequence[Row],
    metrics: Sequence[str],
    *,
    arms: Sequence[str],
    baseline: str,
    panels: str,
    curve: str,
    smaller_is_better: bool,
    out: pathlib.Path | None,
) -> None:
    """Print the comparison of the rows, and write it where a folder is given.

    Raises:
        ValueError: as `comparison.compare`.
    """
    found = compare(
        rows, metrics, arms=arms, baseline=baseline, panels=panels, curve=curve, smaller_is_better=smaller_is_better
    )
    made_by = {", ".join(f"{name} {row['versions'].get(name)}" for name in COMPUTES) for row in rows}
    if len(made_by) > 1:
        words = f"runs of several versions, which may compute other numbers: {'; '.join(sorted(made_by))}"
        found = dataclasses.replace(found, notes=(words, *found.notes))
    print(table(found))
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "comparison.md").write_text(markdown(found), encoding="utf-8")
    write_json(out / "comparison.json", found.as_dict())
    draw(
        found,
        out / "comparison.png",
        {arm: its for method in METHODS.values() for arm, its in looks(method.arms).items()},
    )
    print(f"written: {out}/comparison.md, comparison.json, comparison.png")
