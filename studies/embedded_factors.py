"""One factor at a time around studies/embedded_plane.py at 20 % flips: candidates, data, cue, ensemble, held-out tasks.

python -m sera_jax.study --config=studies/embedded_factors.py
"""

from sera_jax.studies.plan import Study


def get_config() -> Study:
    return Study(
        base="configs/quickstart.py",
        overrides={
            "world.name": "wrong_habits",
            "eval.temperature": 1.0,
            "sera.arms": ("daa", "sera", "sera_recommended"),
            "train.learning_rate": 3e-4,
            "train.num_train_epochs": 3,
            "data.label_noise": 0.2,
        },
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
        seeds=range(10, 13),
        metrics=(
            "gold_by_temperature/0:gold_by_temperature/*",  # greedily, against the baseline at its best temperature
            *(f"gold_by_temperature/{t}" for t in ("0", "0.5", "1")),
            "round3/flipped_fraction_kept",
            *(f"round{n}/agreement/{share}" for n in (2, 3) for share in ("agree", "disagree")),
            "response_tokens_mean",
            "cost/passes_tokens",
        ),
        baseline="daa",
    )
