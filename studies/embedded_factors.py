"""One factor at a time around studies/embedded_plane.py at 20 % flips: candidates, data, cue, ensemble, held-out tasks.

python -m sera_jax.study --config=studies/embedded_factors.py
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import FEW_SEEDS, like


def get_config() -> Study:
    return like(
        {"data.label_noise": 0.2},
        settings={
            "2 candidates": {"sera.num_samples": 2},
            "8 candidates": {"sera.num_samples": 8},
            "200 pairs": {"world.preferences": 200},
            "4000 pairs": {"world.preferences": 4000, "train.num_train_epochs": 1},
            "no cue": {"world.cue": 0.0},
            "full cue": {"world.cue": 1.0},
            "no ensemble": {"sera.ensemble_gamma": 0.0},
            "ensemble 0.6": {"sera.ensemble_gamma": 0.6},
            "two tasks held out": {"world.heldout_tasks": ("repeat", "last")},
        },
        grid={},
        seeds=FEW_SEEDS,
        panels="",
    )
