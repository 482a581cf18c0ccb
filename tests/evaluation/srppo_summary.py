"""Summaries as a run of Self-Rewarding PPO writes them; figures made up, all different, noisy where a run's are."""

import numpy as np

TRAINED = ("srppo", "random_reward", "reinforce")
USUAL = ("sft_longer", "sft_equal_compute", "best_of_n", "srppo", "random_reward")
EVERY = ("sft_longer", "sft_equal_compute", "best_of_n", *TRAINED)


def make_summary(*, arms=USUAL, iterations=12, every=4, with_gold=True, with_pattern=False):
    """`every`: iterations between evaluations. Facts of an arm differ from those of every other."""
    rng = np.random.default_rng(0)

    def facts(arm, progress):
        better = 0.1 * progress * (1 if arm != "random_reward" else -0.5) + rng.normal(0, 0.004)
        coherent = 4 + 30 * better
        out = {
            "response_tokens_mean": 9.3 + 20 * better,
            "eos_fraction": 0.98 - 0.1 * abs(better),
            "coherent_reward_mean": coherent,
            "coherent_reward_ci95": [coherent - 0.31, coherent + 0.33],
            "coherent_reward_length_corr": 0.3 + better,
            "kl_to_sft": 0.0 if arm == "sft" else 3 * progress + abs(better),
        }
        out |= {} if arm == "best_of_n" else {"heldout_nll": 1.21 + abs(better)}
        if with_gold:
            out |= {"gold_mean": 0.41 + better, "gold_ci95": [0.37 + better, 0.452 + better]}
            out |= {} if arm == "sft" else {"win_rate_vs_sft": 0.5 + better}
        if with_pattern:
            out |= {"wellformed_fraction": 0.8 + better, "answer_accuracy": 0.3 + better}
        return out

    def metrics(arm, iteration):
        out = {
            "arm": arm,
            "iteration": iteration,
            "coherent_reward/mean": 3.4 + rng.normal(0, 0.3),
            "coherent_reward/std": 2.6 + rng.normal(0, 0.1),
            "coherent_reward/length_corr": 0.3,
            "objective/kl": 0.2 * iteration + rng.normal(0, 0.1),
            "completions/mean_length": 10 + rng.normal(0, 0.5),
            "completions/clipped_ratio": 0.04,
            "policy/clipfrac_avg": 0.1,
        }
        out |= {"rollout/gold_mean": 0.4 + rng.normal(0, 0.03)} if with_gold else {}
        out |= {} if arm == "reinforce" else {"critic/vf_explained_var": 0.6 - 8.0 / iteration**2}
        return out

    def row(arm, round_):
        last = min(round_ * every, iterations)
        held = {name: value for name, value in facts(arm, last / iterations).items() if not name.endswith("ci95")}
        return {"arm": arm, "round": round_, "iteration": last, **held}

    trained = [arm for arm in arms if arm in TRAINED]
    rounds = [row(arm, round_) for arm in trained for round_ in range(1, -(-iterations // every) + 1)]
    return {
        "arms": {arm: facts(arm, 1.0 if arm in TRAINED else 0.1) for arm in ("sft", *arms)},
        "rounds": rounds,
        "iterations": [metrics(arm, i) for arm in trained for i in range(1, iterations + 1)],
        "prompts": {"sft": 200, "new": 0, "heldout": 64},
        "wall_seconds": {"sft": 3.0},
        "peak_memory_bytes": 10**9,
        "params_sha256": {"sft": "00"},
        "config": {"method": "srppo", "reward": {"placement": "eos"}, "ppo": {"kl_coef": 0.05, "best_of": 8}},
        "seed": 0,
        "versions": {"jax": "0"},
    }
