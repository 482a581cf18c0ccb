"""Self-Rewarding PPO over the number of demonstrations, against SFT, more SFT, re-ranking and a reward model.

python -m sera_jax.study --config=studies/demonstrations.py

The reward model has as many preference pairs as SFT has demonstrations.
"""

from sera_jax.studies.plan import Study

SIZES = (25, 50, 100, 200, 400, 800)


def get_config() -> Study:
    return Study(
        base="configs/quickstart_srppo.py",
        overrides={
            "world.name": "wrong_habits",
            "ppo.arms": ("srppo", "sft_longer", "best_of_n", "sft_equal_compute", "ppo_reward_model"),
        },
        settings={f"{n} demonstrations": {"world.demonstrations": n, "world.preferences": n} for n in SIZES},
        seeds=range(10, 20),
        metrics=(
            "gold_by_temperature/0:gold_by_temperature/*",
            *(f"gold_by_temperature/{t}" for t in ("0", "0.5", "1")),
            "gold_mean",
            "kl_to_sft",
            "response_tokens_mean",
            "reward_model_accuracy",
            "cost/passes_tokens",
        ),
        baseline="sft",
        curve="world.demonstrations",
    )
