"""How hard to train: SeRA against its loss alone, from barely to far too much.

python -m sera_jax.study --config=studies/embedded_regimes.py
"""

from sera_jax.studies.plan import Study

RATE, EPOCHS = "train.learning_rate", "train.num_train_epochs"


def get_config() -> Study:
    return Study(
        base="configs/quickstart.py",
        overrides={
            "world.name": "wrong_habits",
            "eval.temperature": 1.0,
            "sera.arms": ("daa", "sera", "sera_recommended"),
        },
        settings={
            "under-trained": {RATE: 1e-4, EPOCHS: 1},
            "gentle": {RATE: 3e-4, EPOCHS: 1},
            "well-trained": {RATE: 3e-4, EPOCHS: 3},
            "over-trained": {RATE: 1e-3, EPOCHS: 3},
        },
        grid={"data.label_noise": (0.2, 0.4)},
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
        panels="data.label_noise",
    )
