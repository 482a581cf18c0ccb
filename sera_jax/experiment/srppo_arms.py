"""The arms of a Self-Rewarding PPO experiment: PPO, its ablations and its controls, all from one SFT model."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

from sera_jax.config import Config
from sera_jax.data.items import unique_prompts
from sera_jax.experiment.corpus import Corpus
from sera_jax.experiment.evaluator import Evaluator, Generations
from sera_jax.loops.controls import best_of_n, sft_equal_compute, sft_longer
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.loops.srppo import srppo
from sera_jax.loops.srppo_study import SrppoStudy
from sera_jax.writer import RESERVED, read_records


def run_srppo_arms(
    config: Config, runtime: Runtime, corpus: Corpus, base: Policy, start: Policy
) -> tuple[dict[str, Policy], dict[str, Any]]:
    """Run every arm from the SFT model `start`, whose base is `base`.

    Returns:
        The last policy of each arm that has one, `sft` first; and the method's part of the summary: `arms`, `rounds`
        (the evaluations of the PPO arms), `prompts` (how many of which kind) and `iterations` (their metrics).
    """
    if "best_of_n" in config.ppo.arms and not corpus.eval_prompts:
        raise ValueError(
            "config.ppo.arms has best_of_n, which answers held-out prompts, and there are none; name held-out "
            f"demonstrations in config.data.eval, raise config.data.eval_fraction={config.data.eval_fraction}, or take "
            "best_of_n out"
        )
    evaluator, generations, study = prepare_iterations(config, runtime, corpus, base, start)
    final = {"sft": start}
    arms: dict[str, dict[str, Any]] = {"sft": evaluator.of_arm(start)}
    rounds: list[dict[str, Any]] = []
    passes_tokens = 0
    # sft_equal_compute is given what srppo cost
    for arm in sorted(config.ppo.arms, key=lambda name: name == "sft_equal_compute"):
        if arm == "best_of_n":
            settings = dataclasses.replace(evaluator.answer_settings(), temperature=config.sampling.temperature)
            answers = best_of_n(study, corpus.eval_prompts, settings)
            generations.add(arm, evaluator.show_answers(arm, answers))
            arms[arm] = evaluator.facts_of_answers(arm, answers)
            continue
        if arm == "sft_longer":
            final[arm] = sft_longer(study, config.sft, arm)
        elif arm == "sft_equal_compute":
            final[arm] = sft_equal_compute(study, config.sft, passes_tokens)
        else:
            final[arm], facts = srppo(study, arm)
            rounds += facts
            if arm == "srppo":
                passes_tokens = facts[-1]["passes_tokens"]
        generations.add(final[arm].name, evaluator.show(final[arm]))
        arms[arm] = evaluator.of_arm(final[arm])
    summary = {
        "arms": {arm: arms[arm] for arm in ("sft", *config.ppo.arms)},
        "rounds": rounds,
        "prompts": prompt_counts(config, corpus),
        "iterations": iteration_metrics(runtime.workdir.root / "metrics.jsonl"),
    }
    return final, summary


def prepare_iterations(
    config: Config, runtime: Runtime, corpus: Corpus, base: Policy, start: Policy
) -> tuple[Evaluator, Generations, SrppoStudy]:
    """What the iterations of every arm are given; evaluating a policy also adds its answers to generations.jsonl."""
    evaluator = Evaluator(
        run=runtime,
        loss=None,
        pairs=[],
        prompts=corpus.eval_prompts,
        tokenizer=corpus.tokenizer,
        judge=corpus.judge,
        reference=start,
        settings=config.eval,
        sampling=config.sampling,
        base=base,
        demonstrations=corpus.heldout_demonstrations,
    )
    generations = Generations(runtime.workdir.root)

    def evaluate(policy: Policy, round_: int) -> dict[str, Any]:
        generations.add(policy.name, evaluator.show(policy))
        return evaluator(policy, round_)

    evaluate(start, 0)
    study = SrppoStudy(
        run=runtime,
        base=base,
        sft=start,
        reward=config.reward,
        ppo=config.ppo,
        train=config.train,
        sampling=config.sampling,
        demonstrations=corpus.demonstrations,
        prompts=corpus.prompts,
        evaluate=evaluate,
        judge=corpus.judge,
        show=evaluator.texts,
        logging_steps=config.log.logging_steps,
        rollout_iterations=config.log.rollout_iterations,
        max_row_shapes=config.data.max_row_shapes,
    )
    return evaluator, generations, study


def prompt_counts(config: Config, corpus: Corpus) -> dict[str, Any]:
    """Which prompts there are: of the demonstrations, new ones (and those left out, by reason), held out."""
    return {
        "sft": len(unique_prompts(corpus.demonstrations)),
        "new": len(corpus.prompts),
        "overlap": config.ppo.prompt_overlap,
        **{f"left_out_{reason}": count for reason, count in corpus.prompts_left_out.items()},
        "heldout": len(corpus.eval_prompts),
    }


def iteration_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The PPO lines of a metrics.jsonl: `arm`, `iteration` and every finite metric but the clock's."""
    out = []
    for record in read_records(path)[0]:
        if record["phase"] == "ppo":
            numbers = {
                name: value
                for name, value in record.items()
                if name not in RESERVED
                and not name.startswith("timing_s/")
                and isinstance(value, int | float)
                and math.isfinite(value)
            }
            out.append({"arm": record["arm"], "iteration": record["step"], **numbers})
    return out
