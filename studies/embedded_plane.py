"""SeRA against its loss alone in the embedded world: shares of flipped labels, ten seeds, where the loss alone is best.

python -m sera_jax.study --config=studies/embedded_plane.py

Learning rate and epochs are the point of {1e-4, 3e-4, 1e-3} x {1, 3} at which DPO alone had the highest greedy gold
reward over 20 and 40 % flips and seeds 101 and 102. None of the seeds here was used for any choice.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sera_jax.studies.plan import Study

NOISY = {"data.label_noise": (0.2, 0.4)}
FEW_SEEDS = range(10, 13)  # of those below


def like(overrides: Mapping[str, Any] | None = None, **fields: Any) -> Study:
    """This study with these overrides besides its own, and these fields in place of its own."""
    plane = get_config()
    return dataclasses.replace(plane, overrides={**plane.overrides, **(overrides or {})}, **fields)


def get_config() -> Study:
    return Study(
        base="configs/quickstart.py",
        overrides={
            "world.name": "wrong_habits",
            "eval.temperature": 1.0,
            "sera.arms": ("daa", "sera", "sera_recommended"),
            "train.learning_rate": 3e-4,
            "train.num_train_epochs": 3,
        },
        grid={"data.label_noise": (0.0, 0.2, 0.4)},
        seeds=range(10, 20),
        metrics=(
            "gold_by_temperature/0:gold_by_temperature/*",  # greedily, against the baseline at its best temperature
            *(f"gold_by_temperature/{t}" for t in ("0", "0.5", "1")),
            "round3/flipped_fraction_kept",
            *(f"round{n}/agreement/{share}" for n in (2, 3) for share in ("agree", "disagree")),
            "response_tokens_mean",
            "cost/passes_tokens",
        ),
        baseline="daa",
        panels="data.label_noise",
    )
