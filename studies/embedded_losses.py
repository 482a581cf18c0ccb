"""SeRA with the other losses in the embedded world.

python -m sera_jax.study --config=studies/embedded_losses.py
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import NOISY, like


def get_config() -> Study:
    return like(
        settings={name: {"loss.name": name} for name in ("ipo", "slic", "simpo")}, grid=NOISY, seeds=range(10, 20)
    )
