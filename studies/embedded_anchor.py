"""SeRA and its loss with an anchor, on ten seeds more: the likelihood of the chosen answer, of weight 0.2.

python -m sera_jax.study --config=studies/embedded_anchor.py

The weight is the one of studies/guard_rails.py, whose seeds are others.
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import like

ANCHOR = {"no anchor": {}, "anchor": {"loss.nll_coef": 0.2}}


def get_config() -> Study:
    return like(
        {"data.label_noise": 0.2},
        settings=ANCHOR,
        grid={},
        seeds=range(20, 30),
        baseline="no anchor/daa",
        panels="",
    )
