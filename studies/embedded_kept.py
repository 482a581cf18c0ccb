"""How many offline pairs SeRA keeps, in the embedded world: flips among them, and gold.

python -m sera_jax.study --config=studies/embedded_kept.py

That of studies/embedded_plane.py, where 0.7 are kept, on three of its seeds.
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import FEW_SEEDS, NOISY, like


def get_config() -> Study:
    return like(
        settings={
            "kept 0.7": {"sera.arms": ("daa", "sera_recommended")},
            "kept 0.5": {"sera.arms": ("sera_recommended",), "sera.keep_fraction": 0.5},
        },
        grid=NOISY,
        seeds=FEW_SEEDS,
        metrics=(
            "gold_by_temperature/0:gold_by_temperature/*",
            "round2/flipped_fraction_kept",
            "round3/flipped_fraction_kept",
            *(f"round3/agreement/{share}" for share in ("agree", "disagree")),
        ),
        baseline="kept 0.7/daa",
    )
