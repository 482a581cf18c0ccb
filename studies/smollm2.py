"""SmolLM2-135M-Instruct on short pairs: 9 runs of the arms that tell whether a ranking of self-made pairs helps.

python -m sera_jax.study --config=studies/smollm2.py

Model and pairs as configs/smollm2_sera.py says. A run at a time, on two cores; each leaves its row, so the study may be
stopped and gone on with.
"""

from sera_jax.evaluation.rankings import RANKINGS
from sera_jax.studies.plan import Study


def get_config() -> Study:
    return Study(
        base="configs/smollm2_sera.py",
        overrides={"sera.arms": ("daa", "sera", "sera_recommended", "random_pairing", "oracle_pairing")},
        grid={"data.label_noise": (0.0, 0.2, 0.4)},
        seeds=range(3),
        metrics=(
            "gold_by_temperature/0:gold_by_temperature/*",  # the likeliest answers against DPO at its best temperature
            "gold_mean",
            "kl_to_sft",
            "heldout_accuracy",
            "response_tokens_mean",
            "eos_fraction",
            "round2/added",
            *(f"round2/agreement/{share}" for share in ("agree", "disagree")),
            *(f"round2/rankings/{name}/gold_gap" for name in RANKINGS),
            *(f"round2/bootstrap/{name}" for name in ("reward_ref_corr", "reward_length_corr", "repeated_ngrams")),
        ),
        baseline="daa",
        panels="data.label_noise",
        threads=2,
        processes=1,
    )
