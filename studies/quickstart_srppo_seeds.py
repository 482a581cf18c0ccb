"""Self-Rewarding PPO in the embedded world `habits` over five seeds: 5 runs of all its arms, each minus `srppo`.

python -m sera_jax.study --config=studies/quickstart_srppo_seeds.py
"""

from sera_jax.studies.plan import Study


def get_config() -> Study:
    return Study(
        base="configs/quickstart_srppo.py",
        overrides={"world.name": "habits"},
        seeds=range(5),
        metrics=(
            "gold_mean",
            "gold_by_temperature/0",
            "gold_by_temperature/0.5",
            "coherent_reward_mean",
            "kl_to_sft",
            "heldout_nll",
            "response_tokens_mean",
        ),
        baseline="srppo",
    )
