"""The guard rails of SeRA one at a time around studies/embedded_plane.py, at 20 % flips.

python -m sera_jax.study --config=studies/guard_rails.py

`daa` samples nothing, so of these it is the NLL anchor alone that changes it. `sera_recommended` sets its own weight of
the likelihood, so half of the likelihood does not change it.
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import FEW_SEEDS, like


def get_config() -> Study:
    return like(
        {"data.label_noise": 0.2},
        settings={
            "nothing": {},
            "half the likelihood": {"sera.likelihood_weight": 0.5, "sera.ranking_reduction": "mean"},
            "support 0.1": {"sera.support_quantile": 0.1},
            "support 0.3": {"sera.support_quantile": 0.3},
            "without the largest tenth": {"sera.bootstrap_band": (0.0, 0.9)},
            "the smaller half": {"sera.bootstrap_band": (0.0, 0.5)},
            "two rewards agree": {"sera.agreement": "rewards"},
            "two policies agree": {"sera.agreement": "policies"},
            "NLL anchor 0.2": {"loss.nll_coef": 0.2},
            "replay 0.5": {"sera.replay_fraction": 0.5},
            "kept by a mixture": {"sera.keep_rule": "mixture"},
            "stop at a margin spread of 5": {"sera.stop_margin_std": 5.0},
            "stop at a KL of 3": {"sera.stop_kl": 3.0},
        },
        grid={},
        seeds=FEW_SEEDS,
        panels="",
    )
