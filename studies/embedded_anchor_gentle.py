"""The anchor of studies/embedded_anchor.py in gentle rounds, one epoch each; five of its seeds.

python -m sera_jax.study --config=studies/embedded_anchor_gentle.py
"""

from sera_jax.studies.plan import Study
from studies.embedded_anchor import ANCHOR
from studies.embedded_plane import NOISY, like


def get_config() -> Study:
    return like(
        {"train.num_train_epochs": 1, "sera.arms": ("daa", "sera_recommended")},
        settings=ANCHOR,
        grid=NOISY,
        seeds=range(20, 25),
        baseline="no anchor/daa",
    )
