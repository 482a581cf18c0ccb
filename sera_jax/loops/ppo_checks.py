"""What stops PPO: a reward that says nothing, numbers that are not finite, a policy that ran away."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from sera_jax.config import PpoGroup
from sera_jax.loops.runtime import NonFinite
from sera_jax.training.ppo_steps import PpoState


def check_rewards(metrics: Mapping[str, float], ppo: PpoGroup, where: str) -> None:
    """Raises before an iteration's rewards are learnt from.

    Raises:
        NonFinite: a reward is not finite.
        ValueError: the coherent reward is 0 everywhere, the sampler and the scorer disagree, or the policy is further
            from the SFT model than `max_kl`.
    """
    for name in ("coherent_reward/mean", "objective/kl", "objective/rlhf_reward", "rollout/decode_score_gap"):
        if not math.isfinite(metrics[name]):
            raise NonFinite(
                f"{where}: {name} is {metrics[name]}; look at the parameters of the SFT model and the base, lower the "
                "learning rate, and start with a new --config.workdir"
            )
    if metrics["coherent_reward/largest"] == 0:
        raise ValueError(
            f"{where}: log pi_sft - log pi_base is 0 for every token: the SFT model equals the base, so there is "
            "nothing to learn; give another base (config.model.model_name_or_path) or train SFT for longer (config.sft)"
        )
    gap, limit = metrics["rollout/decode_score_gap"], ppo.max_decode_score_gap
    if gap > limit:
        raise ValueError(
            f"{where}: the sampler's and the scorer's log-probs differ by {gap:.3g} nats a token on average "
            f"(rollout/decode_score_gap), more than config.ppo.max_decode_score_gap={limit}; use "
            "config.model.dtype=float32 or config.model.logits_dtype=float32, or raise the limit, and start with a new "
            "--config.workdir"
        )
    kl = metrics["objective/kl"]
    if kl > ppo.max_kl:
        raise ValueError(
            f"{where}: objective/kl={kl:.4g} nats per response exceeds config.ppo.max_kl={ppo.max_kl}: the policy ran "
            f"away from the SFT model; raise config.ppo.kl_coef ({ppo.kl_coef}), lower config.train.learning_rate, or "
            "set config.ppo.target_kl, and start with a new --config.workdir"
        )


def check_updates(state: PpoState, where: str, learning_rate: float) -> None:
    """Raises NonFinite where an update of policy or critic was refused because its loss or gradient was not finite."""
    rate = f"config.train.learning_rate ({learning_rate})"
    for name, part, rates in (
        ("policy", state.policy, rate),
        ("critic", state.critic, f"{rate} or config.ppo.critic_learning_rate"),
    ):
        if part is not None and not bool(jax.device_get(part.ok)):
            raise NonFinite(
                f"{where}: the loss or gradient of the {name} is not finite; nothing of this iteration was saved. "
                f"Lower {rates}, and start with a new --config.workdir"
            )
