"""Every control of SeRA in the embedded world, at the settings of studies/embedded_plane.py.

python -m sera_jax.study --config=studies/embedded_controls.py
"""

from sera_jax.studies.plan import Study


def get_config() -> Study:
    return Study(
        base="configs/quickstart.py",
        overrides={
            "world.name": "wrong_habits",
            "eval.temperature": 1.0,
            "sera.arms": (
                "daa",
                "selection_only",
                "bootstrap_only",
                "bootstrap_only_likelihood",
                "random",
                "random_pairing",
                "oracle_pairing",
                "sft_likelier_of_4",
                "curriculum",
                "cdpo",
                "robust_dpo",
            ),
            "train.learning_rate": 3e-4,
            "train.num_train_epochs": 3,
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
