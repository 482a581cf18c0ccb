"""Between the log-ratio and the likelihood, in the embedded world: what is safe where one of the two is wrong?

python -m sera_jax.study --config=studies/embedded_between.py

That of studies/embedded_plane.py, where the log-ratio turns, on five of the seeds of studies/embedded_anchor.py. The
world in which the likelihood knows nothing is that of studies/smollm2_sentiment.py.
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import NOISY, like

SERA = {"sera.arms": ("sera",)}


def get_config() -> Study:
    return like(
        settings={
            "one": {},
            "both agree": {**SERA, "sera.agreement": "rewards"},
            "half and half": {**SERA, "sera.likelihood_weight": 0.5, "sera.ranking_reduction": "mean"},
        },
        grid=NOISY,
        seeds=range(20, 25),
        baseline="one/daa",
    )
