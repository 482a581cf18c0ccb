"""The anchor of studies/embedded_anchor.py in gentle rounds, one epoch each; its ten seeds.

python -m sera_jax.study --config=studies/embedded_anchor_gentle.py
"""

import dataclasses

from sera_jax.studies.plan import Study
from studies.embedded_anchor_noise import get_config as noise
from studies.embedded_plane import NOISY


def get_config() -> Study:
    study = noise()
    overrides = {**study.overrides, "train.num_train_epochs": 1}
    return dataclasses.replace(study, overrides=overrides, grid=NOISY)
