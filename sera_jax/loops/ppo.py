"""What an iteration of PPO is made of: sample, score, reward, update. All are functions of state and iteration."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from sera_jax.checkpoint.papers import write_jsonl
from sera_jax.core import Mean, Rows, Stream, rng_for
from sera_jax.data.items import Item, unique_prompts
from sera_jax.data.packing import Packed, rounded_window
from sera_jax.data.rollouts import PromptSchedule, lay_response_values, lay_rollouts, lay_token_values
from sera_jax.loops.ppo_checks import check_rewards, check_updates
from sera_jax.loops.srppo_study import PpoArm, SrppoStudy
from sera_jax.mesh import fetch, host_to_global, rows_sharding
from sera_jax.models.critic import without_output, without_value_head
from sera_jax.models.decoder import Params
from sera_jax.models.parts import merge
from sera_jax.sampling import Candidates, Sample, grouped
from sera_jax.training.optimizer import schedule
from sera_jax.training.ppo import Experience
from sera_jax.training.ppo_steps import PpoPrograms, PpoState, make_programs
from sera_jax.training.rewards import Scored
from sera_jax.training.score import place_rows

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """An iteration's answers and where they lie.

    Attributes:
        candidates: the answers by prompt.
        parts: minibatches of packed rows, whose `item` indexes the candidates.
        rows: the rows of each part on the device.
    """

    candidates: Sequence[Candidates]
    parts: Sequence[Packed]
    rows: Sequence[Rows]

    @functools.cached_property
    def items(self) -> list[Item]:
        """The prompts with their answers as responses."""
        return [group.item for group in self.candidates]

    @property
    def samples(self) -> list[tuple[Sample, ...]]:
        return [group.samples for group in self.candidates]


def _timed(name: str) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """Of a verb of `Learner`: the seconds it takes are added under `name`."""

    def decorate(verb: Callable[..., _T]) -> Callable[..., _T]:
        @functools.wraps(verb)
        def timed(self: Learner, *args: Any) -> _T:
            start = time.monotonic()
            out = verb(self, *args)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start
            return out

        return timed

    return decorate


def prompt_schedule(study: SrppoStudy) -> PromptSchedule:
    """Which prompts each iteration rolls out."""
    return PromptSchedule(
        sft=unique_prompts(study.demonstrations),
        new=study.prompts,
        overlap=study.ppo.prompt_overlap,
        per_iteration=study.train.batch_size // study.ppo.num_samples,
        seed=study.run.seed,
    )


class Learner:
    """The verbs of an iteration, with what they need besides the state: programs, frozen models, prompts."""

    def __init__(self, study: SrppoStudy, arm: PpoArm) -> None:
        self.study, self.arm = study, arm
        run, ppo = study.run, study.ppo
        self.schedule = prompt_schedule(study)
        self.longest_prompt = max(len(i.prompt) for i in (*self.schedule.sft, *self.schedule.new))
        self.layout = run.layout.accumulated(study.train.gradient_accumulation_steps)
        responses = ppo.num_samples if self.layout.share_prompt else 1
        longest = self.longest_prompt + responses * study.sampling.max_new_tokens
        self.window = rounded_window(longest, self.layout.row_tokens)
        self.sampling = dataclasses.replace(study.sampling, slots=min(study.sampling.slots, study.train.batch_size))
        self.trained = run.trained(study.train)
        self.over = run.over(study.sft, self.trained)
        self._frozen: tuple[Any, ...] | None = None
        self.seconds: dict[str, float] = {}  # of the verbs, since `timings` was last asked

    @property
    def programs(self) -> PpoPrograms:
        """The compiled functions; arms that compute the same share them."""
        study, arm, window = self.study, self.arm, self.window
        run = study.run

        def make() -> PpoPrograms:
            return make_programs(
                run.cfg,
                run.mesh,
                ppo=study.ppo,
                reward=arm.reward(study.reward),
                train=study.train,
                window=window,
                baseline=arm.baseline,
                trained=self.trained,
                like=next((made for made in run.made(PpoPrograms) if made.window == window), None),
            )

        return run.compiled(("ppo", window, arm.baseline, arm.reward), make)

    @property
    def frozen(self) -> tuple[Any, ...]:
        """Parameters of the SFT model, of the base and of the arm's reward model, if any, read when first asked for."""
        if self._frozen is None:
            run, model = self.study.run, self.arm.reward_model
            run.release()
            _ = self.still  # first: what it lies over is then the one copy of it
            frozen = (self.study.sft, self.study.base, *([] if model is None else [model.model]))
            self._frozen = tuple(map(run.load, frozen))
        return self._frozen

    @functools.cached_property
    def still(self) -> tuple[Params, Params]:
        """What does not move of the policy, and of a critic of its own; both are empty where everything does."""
        if self.trained.whole:
            return {}, {}
        sft, run = self.study.sft, self.study.run
        run.release()
        still = run.divided(sft, self.trained, lambda params: params)[1]
        return still, without_output(still)

    def release(self) -> None:
        """Let go of the frozen models."""
        self._frozen = None
        self.__dict__.pop("still", None)

    def policy(self, state: PpoState) -> Params:
        """All parameters of the policy."""
        return merge(without_value_head(state.policy.params), self.still[0])

    def critic(self, state: PpoState) -> Params:
        """All parameters of the critic, or of the policy with the head on it."""
        if state.critic is None:
            return merge(state.policy.params, self.still[0])
        return merge(state.critic.params, self.still[1])

    def timings(self) -> dict[str, float]:
        """Seconds of the iteration by verb, and a fresh start; `score` holds the rewards and advantages too."""
        seconds, self.seconds = self.seconds, {}
        return {f"timing_s/{name}": value for name, value in seconds.items()}

    # ---- the verbs

    @_timed("rollout")
    def sample(self, state: PpoState, iteration: int) -> Rollouts:
        """Responses of the policy to the iteration's prompts, laid into minibatches."""
        run, study = self.study.run, self.study
        prompts = self.schedule.prompts(iteration)
        samples = run.generate(
            self.policy(state),
            prompts,
            study.ppo.num_samples,
            self.sampling,
            round_=iteration,
            max_prompt_tokens=self.longest_prompt,
        )
        candidates = grouped(prompts, samples)
        parts = lay_rollouts(
            [group.item for group in candidates],
            study.ppo.num_mini_batches,
            self.layout,
            seed=run.seed,
            iteration=iteration,
            earlier=tuple(jax.device_get(state.control.shape).tolist()),
        )
        return Rollouts(candidates, parts, [place_rows(part.rows, run.mesh) for part in parts])

    @_timed("score")
    def score(self, state: PpoState, rollouts: Rollouts) -> list[dict[str, Any]]:
        """Token log-probs of the same rows under policy, SFT model and base, and the critic's values; by minibatch."""
        programs, (sft, base, *_) = self.programs, self.frozen
        policy, critic = self.policy(state), self.critic(state)
        return [
            {
                "logp": programs.score(policy, rows),
                "sft_logp": programs.score(sft, rows),
                "base_logp": programs.score(base, rows),
                "value": None if programs.values is None else programs.values(critic, rows),
            }
            for rows in rollouts.rows
        ]

    @_timed("score")
    def reward(
        self, state: PpoState, rollouts: Rollouts, scored: Sequence[dict[str, Any]], iteration: int
    ) -> tuple[PpoState, list[Experience], dict[str, float]]:
        """Coherent rewards less the KL, and advantages; the state with the next KL coefficient; metrics, checked.

        Raises:
            ValueError: a reward that is 0 everywhere or not finite, or a limit of PpoGroup that was passed.
        """
        study = self.study
        sampled = [[s.logps for s in group] for group in rollouts.samples]
        finished = [[s.finished for s in group] for group in rollouts.samples]
        numbers = self._given(rollouts, iteration)
        parts = []
        for packed, rows, found, given in zip(rollouts.parts, rollouts.rows, scored, numbers, strict=True):
            host = {
                "sampled_logp": lay_token_values(packed, sampled),
                "finished": lay_response_values(packed, finished, bool),
                "given": given,
            }
            parts.append(Scored(rows=rows, **found, **host_to_global(host, rows_sharding(study.run.mesh))))
        experience, control, found = self.programs.experience(parts, state.control)
        metrics = {name: float(value) for name, value in jax.device_get(found).items()}
        check_rewards(metrics, study.ppo, f"{self.arm.name}, iteration {iteration}")
        return dataclasses.replace(state, control=control), experience, metrics | self._prompt_metrics(rollouts)

    def _given(self, rollouts: Rollouts, iteration: int) -> list[np.ndarray]:
        """The number of each response that the arm brings, f32[R, K] of each minibatch; 0 where it brings none."""
        study, arm = self.study, self.arm
        if arm.reward_model is not None:
            score, model = study.run.scorer(self.window, scalar=True), self.frozen[2]
            return [arm.reward_model.paid(jax.device_get(score(model, rows))) for rows in rollouts.rows]
        none = np.zeros((len(rollouts.candidates), study.ppo.num_samples), np.float32)
        given = none if arm.given is None else arm.given(study, rollouts.candidates, iteration)
        return [lay_response_values(part, given, np.float32) for part in rollouts.parts]

    @_timed("update")
    def update(
        self, state: PpoState, experience: Sequence[Experience], iteration: int
    ) -> tuple[PpoState, dict[str, float]]:
        """PPO epochs over the minibatches, in another order each epoch; the state is donated.

        Raises:
            NonFinite: a loss or gradient was not finite.
        """
        study, ppo, programs = self.study, self.study.ppo, self.programs
        critic_step = programs.critic_step
        warming = iteration <= ppo.critic_warmup_iterations  # in every arm, so that all update the policy as often
        policy, critic = state.policy, state.critic
        of_policy, of_critic = ((), ()) if self.trained.whole else ((self.still[0],), (self.still[1],))
        policy_metrics, critic_metrics, stopped = [], [], False
        for epoch in range(ppo.num_ppo_epochs):
            rng = rng_for(study.run.seed, Stream.SHUFFLE, int(Stream.PROMPTS), iteration, epoch)
            for part in rng.permutation(len(experience)):
                batch = experience[part]
                if critic_step is not None and critic is not None:
                    critic, found = critic_step(critic, batch, *of_critic)
                    critic_metrics.append(found)
                elif critic_step is not None and warming:  # a head on the policy: the head alone
                    policy, found = critic_step(policy, batch, *of_policy)
                    critic_metrics.append(found)
                if not warming and not stopped:
                    policy, found = programs.policy_step(policy, batch, *of_policy)
                    policy_metrics.append(found)
                    stopped = ppo.target_kl is not None and _fetch(found[_APPROX_KL]) > ppo.target_kl
        state = dataclasses.replace(state, policy=policy, critic=critic)
        metrics = _summed(policy_metrics) | _of_critic(_summed(critic_metrics))
        check_updates(state, f"{self.arm.name}, iteration {iteration}", study.train.learning_rate)
        return state, metrics | {
            "ppo/updates": len(policy_metrics) - metrics["ppo/refused_updates"],
            "ppo/early_stop": float(stopped),
            # of the last update made
            "lr": float(schedule(study.train, programs.updates)(max(int(policy.step) - 1, 0))),
            "episode": iteration * study.train.batch_size,
        }

    def save_texts(self, rollouts: Rollouts, scored: Sequence[dict[str, Any]], iteration: int) -> None:
        """Every few iterations, the rollouts as texts with their rewards: WORKDIR/rollouts/ARM/ITERATION.jsonl."""
        study, every = self.study, self.study.rollout_iterations
        if not every or (iteration % every and iteration != 1):
            return
        sums: dict[tuple[int, int], dict[str, float]] = {}
        for part, found in zip(rollouts.parts, scored, strict=True):
            logp, sft, base = fetch([found[name] for name in ("logp", "sft_logp", "base_logp")])
            for r, k in np.argwhere(part.item >= 0):
                here = part.rows.slot[r] == k
                reward, kl = float((sft - base)[r, here].sum()), float((logp - sft)[r, here].sum())
                key = (int(part.item[r, k]), int(part.response[r, k]))
                sums[key] = {"coherent_reward": round(reward, 6), "logratio_to_sft": round(kl, 6)}
        rows = []
        for i, (item, group) in enumerate(zip(rollouts.items, rollouts.samples, strict=True)):
            for k, sample in enumerate(group):
                row = {"iteration": iteration, "id": item.id, **study.texts(item, sample.tokens), **sums[i, k]}
                row |= {"finished": sample.finished, "tokens": len(sample.tokens)}
                gold = math.nan if study.gold is None else study.gold(item, sample.tokens)
                rows.append(row if math.isnan(gold) else row | {"gold": gold})
        write_jsonl(study.run.workdir.root / "rollouts" / self.arm.name / f"{iteration:06d}.jsonl", rows)

    def _prompt_metrics(self, rollouts: Rollouts) -> dict[str, float]:
        """How many prompts SFT had seen, and the gold reward of the rollouts that have one."""
        study = self.study
        metrics = {"rollout/sft_prompt_fraction": self.schedule.sft_per_iteration / self.schedule.per_iteration}
        if study.gold is not None:
            golds = [study.gold(item, response) for item in rollouts.items for response in item.responses]
            if not np.isnan(golds).all():
                metrics["rollout/gold_mean"] = float(np.nanmean(golds))
        return metrics


_APPROX_KL = "policy/approxkl_avg"
# What an update of the critic alone says, and what the log calls it; its other metrics are the policy's names.
_CRITIC_METRICS = {
    "loss/value_avg": "loss/value_avg",
    "val/clipfrac_avg": "val/clipfrac_avg",
    "grad_norm": "critic/grad_norm",
}


def _fetch(metric: Mean) -> float:
    return jax.device_get(metric).value()


def _summed(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of an iteration's updates as numbers: Means added, gradient norms averaged, refusals counted."""
    host = jax.device_get(list(found))
    out: dict[str, float] = {"ppo/refused_updates": sum(1 - float(m.get("accepted", 1)) for m in host)}
    if not host:
        return out
    for name, first in host[0].items():
        if isinstance(first, Mean):
            total = first
            for metrics in host[1:]:
                total = total + metrics[name]
            out[name] = total.value()
    out["grad_norm"] = float(np.mean([m["grad_norm"] for m in host]))
    if "val/ratio_squared" in out:
        out["val/ratio_var"] = max(out.pop("val/ratio_squared") - out["val/ratio"] ** 2, 0.0)
    return out


def _of_critic(metrics: dict[str, float]) -> dict[str, float]:
    return {ours: metrics[name] for name, ours in _CRITIC_METRICS.items() if name in metrics}
