"""Gold against the KL to the SFT model, as training grows longer and harder: where each arm begins to over-optimise.

python -m sera_jax.study --config=studies/embedded_overoptimisation.py

As Gao, Schulman and Hilton (2023, arXiv:2210.10760) draw it for reward models. 20 % flips, three seeds.
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import FEW_SEEDS, like

RATE, EPOCHS = "train.learning_rate", "train.num_train_epochs"


def get_config() -> Study:
    return like(
        {"data.label_noise": 0.2},
        settings={
            f"{rate:g} x {epochs}": {RATE: rate, EPOCHS: epochs}
            for rate, epochs in ((5e-5, 1), (1e-4, 1), (3e-4, 1), (3e-4, 3), (1e-3, 3))
        },
        grid={},
        seeds=FEW_SEEDS,
        metrics=("gold_by_temperature/0", "kl_to_sft", "response_tokens_mean", "round3/agreement/agree"),
        panels="",
        curve="kl_to_sft",
    )
