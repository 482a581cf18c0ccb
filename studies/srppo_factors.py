"""One factor at a time around configs/quickstart_srppo.py: the KL, lam, the value clip, how the reward is paid,
whose prompts are answered, the critic, held-out tasks.

python -m sera_jax.study --config=studies/srppo_factors.py
"""

import dataclasses

from sera_jax.studies.plan import Study
from studies.demonstrations import get_config as demonstrations


def get_config() -> Study:
    study = demonstrations()
    return dataclasses.replace(
        study,
        overrides={**study.overrides, "ppo.arms": ("srppo",)},
        metrics=("gold_by_temperature/0", "kl_to_sft", "response_tokens_mean", "cost/passes_tokens"),
        settings={
            "nothing": {},
            "KL 0.05": {"ppo.kl_coef": 0.05},
            "KL 0.8": {"ppo.kl_coef": 0.8},
            "KL in the loss": {"ppo.kl_in": "loss", "ppo.kl_estimator": "k2"},
            "lam 0.5": {"ppo.lam": 0.5},
            "lam 1": {"ppo.lam": 1.0},
            "values clipped at 0.2": {"ppo.cliprange_value": 0.2},
            "paid by token": {"reward.placement": "token"},
            "divided by length": {"reward.length_normalize": True},
            "no prompt of a demonstration": {"ppo.prompt_overlap": 0.0},
            "half of the prompts": {"ppo.prompt_overlap": 0.5},
            "their prompts alone": {"ppo.prompt_overlap": 1.0},
            "critic on the policy": {"ppo.critic": "head", "ppo.critic_learning_rate": None},
            "two tasks held out": {"world.heldout_tasks": ("repeat", "last")},
        },
        seeds=range(10, 13),
        baseline="nothing/srppo",
        curve="",
    )
