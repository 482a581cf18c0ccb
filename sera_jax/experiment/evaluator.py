"""Held-out facts of a policy: reward accuracy on pairs, generations on prompts, and gold where a world has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax.config import EvalGroup, SamplingGroup
from sera_jax.data.items import Item, PairItem
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.evaluation import gold, heldout
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.losses.preference import ResolvedLoss


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Called with (policy, round), returns the facts that the report shows.

    Attributes:
        pairs: held-out preference pairs. prompts: what generations answer.
        tokenizer: turns answers into text. judge: gold reward of (prompt item, response tokens), or None.
        reference: the SFT model; implicit rewards and win rates are against it.
    """

    run: Runtime
    loss: ResolvedLoss
    pairs: Sequence[PairItem]
    prompts: Sequence[Item]
    tokenizer: Tokenizer
    judge: Callable[[Item, np.ndarray], float] | None
    reference: Policy
    settings: EvalGroup
    sampling: SamplingGroup

    def __call__(self, policy: Policy, round_: int) -> dict[str, Any]:
        facts = self.pair_facts(policy)
        facts |= {k: v for k, v in self.generation_facts(policy).items() if k != "gold_ci95"}
        return facts

    def of_arm(self, policy: Policy) -> dict[str, Any]:
        """The same facts with the gold's interval and the win rate against the SFT model."""
        facts = self.pair_facts(policy) | self.generation_facts(policy)
        if self.judge is not None and self.prompts:
            facts["win_rate_vs_sft"] = gold.win_rate(self._golds(policy), self._golds(self.reference))
        return facts

    def pair_facts(self, policy: Policy) -> dict[str, Any]:
        if not self.pairs:
            return {}
        items = [pair.item for pair in self.pairs]
        lengths = np.array([[len(r) for r in item.responses] for item in items])  # [n, 2]
        logps = np.array(self.run.score(f"{policy.name}/heldout", policy, items))
        reference = np.array(self.run.score(f"{self.reference.name}/heldout", self.reference, items))
        rewards = self.loss.reward(logps, lengths, reference if self.loss.uses_reference else None)
        return heldout.facts(rewards[:, 0], rewards[:, 1], lengths[:, 0], lengths[:, 1], scale=self.loss.scale)

    def generation_facts(self, policy: Policy) -> dict[str, Any]:
        if not self.prompts:
            return {}
        answers = self._answers(policy)
        facts: dict[str, Any] = {
            "response_tokens_mean": float(np.mean([len(tokens) for tokens, _ in answers])),
            "eos_fraction": float(np.mean([finished for _, finished in answers])),
        }
        if self.judge is not None:
            facts |= gold.facts(self._golds(policy))
        return facts

    def show(self, policy: Policy) -> list[dict[str, Any]]:
        """The first generations, as texts."""
        if not self.prompts:
            return []
        answers = self._answers(policy)[: self.settings.num_generations]
        return [
            {
                "policy": policy.name,
                "id": item.id,
                "prompt": self.tokenizer.decode(item.prompt),
                "response": self.tokenizer.decode_response(tokens),
                "finished": finished,
                "tokens": len(tokens),
            }
            for item, (tokens, finished) in zip(self.prompts, answers)
        ]

    def _answers(self, policy: Policy) -> list[tuple[np.ndarray, bool]]:
        settings = dataclasses.replace(
            self.sampling,
            temperature=self.settings.temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=self.settings.max_new_tokens or self.sampling.max_new_tokens,
        )
        groups = self.run.sample(f"{policy.name}/generations", policy, self.prompts, 1, settings, round_=0)
        return [(group[0].tokens, group[0].finished) for group in groups]

    def _golds(self, policy: Policy) -> np.ndarray:
        judge = self.judge
        assert judge is not None
        return np.array([judge(i, tokens) for i, (tokens, _) in zip(self.prompts, self._answers(policy), strict=True)])
