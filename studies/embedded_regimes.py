"""How hard to train: SeRA against its loss alone, from barely to far too much.

python -m sera_jax.study --config=studies/embedded_regimes.py
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import FEW_SEEDS, NOISY, like

RATE, EPOCHS = "train.learning_rate", "train.num_train_epochs"


def get_config() -> Study:
    return like(
        settings={
            "under-trained": {RATE: 1e-4, EPOCHS: 1},
            "gentle": {RATE: 3e-4, EPOCHS: 1},
            "well-trained": {RATE: 3e-4, EPOCHS: 3},
            "over-trained": {RATE: 1e-3, EPOCHS: 3},
        },
        grid=NOISY,
        seeds=FEW_SEEDS,
    )
