"""What stops PPO (a reward that says nothing, numbers not finite, a policy that ran away), and what it is warned of."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from sera_jax.config import PpoGroup, RewardGroup
from sera_jax.loops.runtime import NonFinite
from sera_jax.training.ppo_steps import PpoState

# val/clipfrac_avg above which the clip is what holds the critic back. An iteration's first minibatch is never cut, nor
# is a value on its way back: a critic that is held back shows 0.2 to 0.4 (tests/benchmarks/value_clip.py).
CLIPPED = 0.2
BELOW_ZERO, STALLED = 10, 3  # iterations in a row, after which a warning is due
STILL_KL = 1e-3  # nats per response: below it in every iteration, the policy stayed at the SFT model
LEAST_ITERATIONS = 3  # with a policy that PPO has updated, before that is said


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
                f"{where}: the loss or gradient of the {name} is not finite. Lower {rates}, and start with a new "
                "--config.workdir"
            )


class Watch:
    """What is amiss in an arm's iterations but stops nothing. It is told of each from the first on, whichever segment
    and process they are of: all that it remembers follows from their lines in the log."""

    def __init__(self, ppo: PpoGroup, reward: RewardGroup, learning_rate: float) -> None:
        self.ppo, self.reward, self.learning_rate = ppo, reward, learning_rate
        self.below = self.clipped = 0  # iterations in a row with a KL below 0, with a critic that is held back
        self.running_on = 0  # iterations in which that paid
        self.kls: list[float] = []  # of policies that PPO has updated

    def warnings(self, metrics: Mapping[str, float | None], iteration: int) -> list[str]:
        """What is to be said after this iteration; `metrics` as they are, or as a line of the log has them."""
        ppo, warm = self.ppo, iteration - self.ppo.critic_warmup_iterations
        clipped, finished = _finite(metrics, "val/clipfrac_avg"), _finite(metrics, "objective/finished_scores")
        pays = self.reward.missing_eos == "penalty" and finished < -self.reward.missing_eos_penalty
        self.below = self.below + 1 if _finite(metrics, "objective/kl") < 0 else 0
        self.clipped = self.clipped + 1 if warm > 0 and clipped > CLIPPED else 0
        self.running_on += pays
        if warm > 1:  # an iteration's KL is of the policy before its updates, and those of the warm-up make none
            self.kls.append(abs(_finite(metrics, "objective/kl_k3")))
        said = []
        if self.below == BELOW_ZERO:
            said.append(
                f"objective/kl has been below 0 for {BELOW_ZERO} iterations, as no KL is: rollouts are not of the "
                "policy that is scored, or k1 is too noisy for so few responses (see objective/kl_k3)"
            )
        if self.clipped == STALLED:
            said.append(
                f"val/clipfrac_avg has been above {CLIPPED} for {STALLED} iterations: config.ppo.cliprange_value="
                f"{ppo.cliprange_value} (config.ppo.value_scale={ppo.value_scale}) holds the critic back from its "
                "returns; raise it, or unset it (--config.ppo.cliprange_value=None)"
            )
        if pays and self.running_on == 1:
            said.append(
                f"iteration {iteration}: answers that ended score {finished:.4g} on average, less than the "
                f"{-self.reward.missing_eos_penalty:g} of those that were cut, so PPO is paid for running on; set "
                "config.reward.missing_eos=subtract, or raise config.reward.missing_eos_penalty"
            )
        return [f"warning: {text}" for text in said]

    def at_evaluation(self, iteration: int) -> list[str]:
        """What is to be said when the policy is evaluated after this iteration."""
        said = []
        if len(self.kls) >= LEAST_ITERATIONS and max(self.kls) < STILL_KL:
            said.append(
                f"iteration {iteration}, at {self.learning_rate:g}: the KL to the SFT model stayed at 0 (never above "
                f"{max(self.kls):.1g} nats per response), so nothing was learnt; raise config.train.learning_rate or "
                "config.ppo.iterations"
            )
        if self.running_on > 1 and iteration == self.ppo.iterations:
            said.append(f"PPO was paid for running on in {self.running_on} of {iteration} iterations")
        return [f"warning: {text}" for text in said]


def _finite(metrics: Mapping[str, float | None], name: str) -> float:
    """The metric, or 0 where there is none or it is not finite, which a line of the log has as None."""
    value = metrics.get(name)
    return 0.0 if value is None or not math.isfinite(value) else value
