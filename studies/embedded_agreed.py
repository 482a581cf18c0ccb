"""Self-made pairs on which log-ratio and likelihood agree, in the embedded world, where the log-ratio alone turns.

python -m sera_jax.study --config=studies/embedded_agreed.py

That of studies/embedded_plane.py on five of the seeds of studies/embedded_anchor.py. The world in which the likelihood
knows nothing is that of studies/smollm2_sentiment.py.
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import NOISY, like


def get_config() -> Study:
    return like(
        settings={"one of them": {}, "both agree": {"sera.agreement": "rewards", "sera.arms": ("sera",)}},
        grid=NOISY,
        seeds=range(20, 25),
        baseline="one of them/daa",
    )
