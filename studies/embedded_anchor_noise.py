"""The anchor of studies/embedded_anchor.py with clean labels and at 40 % flips; its ten seeds.

python -m sera_jax.study --config=studies/embedded_anchor_noise.py

Without the anchor the loss alone is trained, to which all is compared.
"""

from sera_jax.studies.plan import Study
from studies.embedded_anchor import ANCHOR
from studies.embedded_plane import like

SETTINGS = {
    "no anchor": {**ANCHOR["no anchor"], "sera.arms": ("daa",)},
    "anchor": {**ANCHOR["anchor"], "sera.arms": ("sera", "sera_recommended")},
}


def get_config() -> Study:
    return like(settings=SETTINGS, grid={"data.label_noise": (0.4, 0.0)}, seeds=range(20, 30), baseline="no anchor/daa")
