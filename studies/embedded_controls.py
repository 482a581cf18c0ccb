"""Every control of SeRA in the embedded world, at the settings of studies/embedded_plane.py.

python -m sera_jax.study --config=studies/embedded_controls.py
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import FEW_SEEDS, NOISY, like

ARMS = (
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
)


def get_config() -> Study:
    return like({"sera.arms": ARMS}, grid=NOISY, seeds=FEW_SEEDS)
