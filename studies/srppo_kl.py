"""Self-Rewarding PPO at the default's KL penalty and at four times that, on seeds that chose nothing.

python -m sera_jax.study --config=studies/srppo_kl.py
"""

import dataclasses

from sera_jax.studies.plan import Study
from studies.demonstrations import get_config as demonstrations


def get_config() -> Study:
    study = demonstrations()
    return dataclasses.replace(
        study,
        overrides={**study.overrides, "ppo.arms": ("srppo",)},
        metrics=(
            "gold_by_temperature/0",
            "gold_by_temperature/0:gold_by_temperature/*",
            "kl_to_sft",
            "response_tokens_mean",
        ),
        settings={"200 demonstrations": {"world.demonstrations": 200, "world.preferences": 200}},
        grid={"ppo.kl_coef": (0.2, 0.8)},
        seeds=range(20, 30),
        baseline="kl_coef=0.2",
        curve="",
    )
