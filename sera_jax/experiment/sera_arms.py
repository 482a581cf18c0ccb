"""The arms of a SeRA experiment: what their rounds are given, and what each leaves for the report."""

from __future__ import annotations

from typing import Any

from sera_jax.config import Config
from sera_jax.experiment.corpus import Corpus
from sera_jax.experiment.evaluator import Evaluator, Generations
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.loops.sera import sera
from sera_jax.loops.study import Study
from sera_jax.losses.preference import ResolvedLoss


def run_sera_arms(
    config: Config, runtime: Runtime, corpus: Corpus, start: Policy, loss: ResolvedLoss
) -> tuple[dict[str, Policy], dict[str, Any]]:
    """Run every arm from the SFT model `start`.

    Returns:
        The last policy of each arm, `sft` first; and the method's part of the summary.
    """
    evaluator, study = prepare_rounds(config, runtime, corpus, start, loss)
    arms: dict[str, dict[str, Any]] = {"sft": evaluator.of_arm(start)}
    rounds: list[dict[str, Any]] = []
    final = {"sft": start}
    for arm in config.sera.arms:
        final[arm], facts = sera(study, arm)
        rounds += facts
        arms[arm] = evaluator.of_arm(final[arm])
    return final, {"arms": arms, "rounds": rounds, "loss": loss.as_dict()}


def prepare_rounds(
    config: Config, runtime: Runtime, corpus: Corpus, start: Policy, loss: ResolvedLoss
) -> tuple[Evaluator, Study]:
    """What the rounds of every arm are given; evaluating a round also adds its answers to generations.jsonl."""
    evaluator = Evaluator(
        run=runtime,
        loss=loss,
        pairs=corpus.heldout,
        prompts=corpus.eval_prompts,
        tokenizer=corpus.tokenizer,
        judge=corpus.judge,
        reference=start,
        settings=config.eval,
        sampling=config.sampling,
    )
    generations = Generations(runtime.workdir.root)

    def evaluate(policy: Policy, round_: int) -> dict[str, Any]:
        generations.add(policy.name, evaluator.show(policy))
        return evaluator(policy, round_)

    evaluate(start, 0)
    study = Study(
        run=runtime,
        sft=start,
        loss=loss,
        settings=config.sera,
        train=config.train,
        sampling=config.sampling,
        pool=corpus.train,
        prompts=corpus.prompts,
        evaluate=evaluate,
        judge=corpus.judge,
        max_row_shapes=config.data.max_row_shapes,
        logging_steps=config.log.logging_steps,
    )
    return evaluator, study
