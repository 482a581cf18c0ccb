"""Held-out facts of a policy, each where the run has what it needs.

Preference pairs: reward accuracy. Prompts: length of the answers, gold where a world has one, what `answer_pattern`
finds, and, of answers at temperature 1, the KL to the SFT model. Demonstrations: their likelihood. A base model: the
coherent reward of the answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sera_jax.checkpoint.papers import write_jsonl
from sera_jax.config import EvalGroup, SamplingGroup
from sera_jax.data.items import Item, PairItem
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.evaluation import gold, heldout
from sera_jax.evaluation.answers import coherent_facts, kl_facts, likelihood_facts, pattern_facts
from sera_jax.evaluation.report import in_a_line
from sera_jax.experiment.corpus import Corpus
from sera_jax.experiment.phases import policy_in_words
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.loops.sera_study import Gold
from sera_jax.losses.preference import ResolvedLoss
from sera_jax.sampling import Sample

Answers = Sequence[Sample]  # one for each prompt


def phases(
    policy: str,
    corpus: Corpus,
    settings: EvalGroup,
    *,
    pairs: bool = False,
    base: bool = False,
    trained: bool = True,
    last: bool = False,
) -> list[str]:
    """What it takes to evaluate a policy, or, not `trained`, the answers of an arm that is none.

    Args:
        pairs: there is a loss whose reward ranks pairs. base: there is a base model that scores answers.
        last: it is the SFT model or an arm's last policy.
    """
    names = [f"{policy}/heldout", "sft/heldout"] if pairs and corpus.heldout and trained else []
    if corpus.heldout_demonstrations and trained:
        names.append(f"{policy}/heldout_demonstrations")
    if corpus.eval_prompts:
        names += [f"{policy}/generations"] if trained else []
        names += [f"{policy}/generations_by_{scorer}" for scorer in ("sft", "base")] if base else []
        temperatures = settings.temperatures if trained and last and corpus.gold is not None else ()
        names += [f"{policy}/{answers_phase(settings, t)}" for t in temperatures]
        if trained and policy != "sft" and draws(settings, base=base, gold=corpus.gold is not None, last=last):
            names += [f"{policy}/{draws_phase(settings, scorer)}" for scorer in ("sft", "itself")]
    return list(dict.fromkeys(names))


def answers_phase(settings: EvalGroup, temperature: float | None = None) -> str:
    """The phase of a policy that answers held-out prompts; None: at `settings.temperature`."""
    return "generations" if temperature in (None, settings.temperature) else f"generations_at_{temperature:g}"


def draws(settings: EvalGroup, *, base: bool, gold: bool, last: bool) -> bool:
    """Whether answers are draws from the policy itself, at temperature 1, and its KL to the SFT model is known by them.
    Without a base that is of a last policy alone: it takes two scores of its answers."""
    return (settings.temperature == 1.0 and (base or last)) or (gold and last and 1.0 in settings.temperatures)


def draws_phase(settings: EvalGroup, scorer: str) -> str:
    """The phase in which a policy's answers at temperature 1 are scored."""
    return f"{'generations' if settings.temperature == 1.0 else 'draws'}_by_{scorer}"


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Looks at policies: the facts that the report shows, and the first answers, which generations.jsonl collects.

    Attributes:
        loss: its implicit reward ranks the pairs; None where there are none.
        pairs: held-out preference pairs. prompts: what generations answer.
        tokenizer: turns answers into text. gold: reward of (prompt item, response tokens), or None.
        reference: the SFT model; implicit rewards and win rates are against it.
        base: the model before SFT, where answers get a coherent reward. demonstrations: held-out ones.
        tasks: the task of each prompt, where the gold's world has tasks. heldout_tasks: those that were not trained on.
    """

    run: Runtime
    loss: ResolvedLoss | None
    pairs: Sequence[PairItem]
    prompts: Sequence[Item]
    tokenizer: Tokenizer
    gold: Gold | None
    reference: Policy
    settings: EvalGroup
    sampling: SamplingGroup
    base: Policy | None = None
    demonstrations: Sequence[Item] = ()
    tasks: Sequence[str] = ()
    heldout_tasks: Sequence[str] = ()
    _generations: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict, init=False)
    _said: set[str] = dataclasses.field(default_factory=set, init=False)

    def look_at(self, policy: Policy, round_: int) -> dict[str, Any]:
        """The policy's facts after a round, without intervals, said in a line; its first answers go to
        generations.jsonl. What an evaluation costs is on no arm's account (`loops.cost`)."""
        with self.run.ledger.account():
            self.show(policy)
            measured = self._measured(policy)
        facts = {name: value for name, value in measured.items() if not name.endswith("_ci95")}
        self.say(policy.name, facts)
        return facts

    def say(self, name: str, facts: dict[str, Any]) -> None:
        """The main facts of a policy, in a line for the user; once, as arms share the first round."""
        if facts and name not in self._said:
            self.run.writer.announce(f"held out, {policy_in_words(name)}: {in_a_line(facts)}")
        self._said.add(name)

    def of_arm(self, policy: Policy) -> dict[str, Any]:
        """The same facts with their intervals, the gold by temperature, and the KL to the SFT model."""
        with self.run.ledger.account():
            return self._measured(policy, last=True) | self._gold_by_temperature(policy)

    def _measured(self, policy: Policy, *, last: bool = False) -> dict[str, Any]:
        """All facts but the gold by temperature, with intervals and the win rate against the SFT model."""
        facts = self._facts(policy, last=last)
        return facts | self._win_rate(self.answers(policy)) if self.prompts else facts

    def facts_of_answers(self, name: str, answers: Answers) -> dict[str, Any]:
        """The facts of an arm that is no policy but has an answer to each prompt; `name` is the arm's."""
        with self.run.ledger.account():
            return self._answer_facts(name, answers) | self._win_rate(answers) if self.prompts else {}

    def answers(self, policy: Policy, temperature: float | None = None) -> Answers:
        """The policy's answers to the held-out prompts, in their order; None: at `settings.temperature`."""
        how = self.answer_settings()
        if temperature is not None:
            how = dataclasses.replace(how, temperature=temperature)
        name = f"{policy.name}/{answers_phase(self.settings, temperature)}"
        return [c.samples[0] for c in self.run.sample(name, policy, self.prompts, 1, how, round_=0)]

    def answer_settings(self) -> SamplingGroup:
        """How held-out prompts are answered."""
        return dataclasses.replace(
            self.sampling,
            temperature=self.settings.temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=self.settings.max_new_tokens or self.sampling.max_new_tokens,
        )

    def show(self, policy: Policy) -> None:
        """Add the policy's first answers to generations.jsonl."""
        self.show_answers(policy.name, self.answers(policy) if self.prompts else [])

    def show_answers(self, name: str, answers: Answers) -> None:
        """Add the first of these answers to generations.jsonl, which is whole after every call."""
        shown = zip(self.prompts[: self.settings.num_generations], answers)
        self._generations[name] = [
            {
                "policy": name,
                "id": item.id,
                **self.texts(item, answer.tokens),
                "finished": answer.finished,
                "tokens": len(answer.tokens),
            }
            for item, answer in shown
        ]
        rows = [row for rows in self._generations.values() for row in rows]
        write_jsonl(self.run.workdir.root / "generations.jsonl", rows)

    def texts(self, item: Item, tokens: np.ndarray) -> dict[str, Any]:
        """Prompt and response as people read them."""
        return {
            "prompt": self.tokenizer.decode(item.prompt),
            "response": self.tokenizer.decode_response(tokens),
        }

    def _facts(self, policy: Policy, *, last: bool) -> dict[str, Any]:
        facts = self._pair_facts(policy) | self._demonstration_facts(policy)
        if not self.prompts:
            return facts
        return facts | self._answer_facts(policy.name, self.answers(policy)) | self._divergence(policy, last=last)

    def _pair_facts(self, policy: Policy) -> dict[str, Any]:
        if not self.pairs or self.loss is None:
            return {}
        items = [pair.item for pair in self.pairs]
        lengths = np.array([[len(r) for r in item.responses] for item in items])  # [n, 2]
        logps = np.array(self.run.score(f"{policy.name}/heldout", policy, items))
        reference = np.array(self.run.score(f"{self.reference.name}/heldout", self.reference, items))
        rewards = self.loss.reward(logps, lengths, reference if self.loss.uses_reference else None)
        return heldout.facts(rewards[:, 0], rewards[:, 1], lengths[:, 0], lengths[:, 1], scale=self.loss.scale)

    def _demonstration_facts(self, policy: Policy) -> dict[str, Any]:
        if not self.demonstrations:
            return {}
        logps = self.run.score(f"{policy.name}/heldout_demonstrations", policy, self.demonstrations)
        lengths = [len(item.responses[0]) for item in self.demonstrations]
        return likelihood_facts(np.concatenate(logps), np.array(lengths))

    def _answer_facts(self, name: str, answers: Answers) -> dict[str, Any]:
        lengths = np.array([len(answer.tokens) for answer in answers])
        facts: dict[str, Any] = {
            "response_tokens_mean": float(np.mean(lengths)),
            "eos_fraction": float(np.mean([answer.finished for answer in answers])),
        }
        if self.gold is not None:
            golds = self._golds(answers)
            facts |= gold.facts(golds) | gold.by_domain(golds, self.tasks, self.heldout_tasks)
            facts |= {"gold_by_task": gold.by_task(golds, self.tasks)} if self.tasks else {}
        if self.base is not None:
            by_sft = self._logps(f"{name}/generations_by_sft", answers, self.reference)
            by_base = self._logps(f"{name}/generations_by_base", answers, self.base)
            facts |= coherent_facts(by_sft, by_base, lengths)
        if self.settings.answer_pattern:
            said = [self.tokenizer.decode_response(answer.tokens) for answer in answers]
            facts |= pattern_facts(self.settings.answer_pattern, said, self._references())
        return facts

    def _divergence(self, policy: Policy, *, last: bool) -> dict[str, Any]:
        """KL to the SFT model, where the policy gave `draws`."""
        if not draws(self.settings, base=self.base is not None, gold=self.gold is not None, last=last):
            return {}
        if policy.digest == self.reference.digest:
            return {"kl_to_sft": 0.0}
        answers, scorers = self.answers(policy, 1.0), {"itself": policy, "sft": self.reference}
        phases = {scorer: f"{policy.name}/{draws_phase(self.settings, scorer)}" for scorer in scorers}
        return kl_facts(*(self._logps(phases[scorer], answers, by) for scorer, by in scorers.items()))

    def _win_rate(self, answers: Answers) -> dict[str, Any]:
        if self.gold is None:
            return {}
        return {"win_rate_vs_sft": gold.win_rate(self._golds(answers), self._golds(self.answers(self.reference)))}

    def _gold_by_temperature(self, policy: Policy) -> dict[str, Any]:
        if self.gold is None or not self.prompts or not self.settings.temperatures:
            return {}
        found: dict[str, dict[str, float]] = {}
        for t in self.settings.temperatures:
            golds = self._golds(self.answers(policy, t))
            means = {"gold": float(golds.mean())} | gold.by_domain(golds, self.tasks, self.heldout_tasks)
            for name, mean in means.items():
                found.setdefault(f"{name}_by_temperature", {})[f"{t:g}"] = mean
        return found

    def _logps(self, phase: str, answers: Answers, policy: Policy) -> np.ndarray:
        """Summed log-prob f32[prompts] of the answers under `policy`, scored in `phase`."""
        items = [
            dataclasses.replace(item, responses=(answer.tokens,))
            for item, answer in zip(self.prompts, answers, strict=True)
        ]
        return np.concatenate(self.run.score(phase, policy, items))

    def _references(self) -> list[str | None]:
        """The text of the first held-out demonstration of each prompt."""
        given: dict[bytes, str] = {}
        for item in self.demonstrations:
            given.setdefault(item.prompt.tobytes(), self.tokenizer.decode_response(item.responses[0]))
        return [given.get(item.prompt.tobytes()) for item in self.prompts]

    def _golds(self, answers: Answers) -> np.ndarray:
        rule = self.gold
        assert rule is not None
        return np.array([rule(item, answer.tokens) for item, answer in zip(self.prompts, answers, strict=True)])
