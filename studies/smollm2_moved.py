"""SmolLM2-135M-Instruct again, at four times the rate, where the policy has moved and a ranking may show: 9 runs of the
plain loss, the method as published and as recommended.

python -m sera_jax.study --config=studies/smollm2_moved.py

Noisy labels come first; each run leaves its row, as in studies/smollm2.py.
"""

import dataclasses

from sera_jax.studies.plan import Study
from studies.smollm2 import get_config as gentle


def get_config() -> Study:
    return dataclasses.replace(
        gentle(),
        overrides={"sera.arms": ("daa", "sera", "sera_recommended"), "train.learning_rate": 2e-5},
        grid={"data.label_noise": (0.4, 0.2, 0.0)},
    )
