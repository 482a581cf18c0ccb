"""SeRA in the embedded world `habits` over five seeds and three shares of flipped labels: 15 runs of three arms.

python -m sera_jax.study --config=studies/quickstart_seeds.py
"""

from sera_jax.studies.plan import Study


def get_config() -> Study:
    return Study(
        base="configs/quickstart.py",
        overrides={
            "world.name": "habits",
            "eval.temperature": 1.0,
            "sera.arms": ("daa", "sera", "random"),
            "train.learning_rate": 3e-4,
            "train.num_train_epochs": 3,
        },
        grid={"data.label_noise": (0.0, 0.2, 0.4)},
        seeds=range(5),
        metrics=(
            "gold_mean",
            "gold_by_temperature/0:gold_by_temperature/*",  # the likeliest answers against DPO at its best temperature
            "gold_by_temperature/0.5",
            "response_tokens_mean",
            "round3/flipped_fraction_kept",
            *(f"round{n}/agreement/{share}" for n in (2, 3) for share in ("agree", "disagree")),
        ),
        baseline="daa",
        panels="data.label_noise",
    )
