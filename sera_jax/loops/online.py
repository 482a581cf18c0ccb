"""Online DAA: the policy makes every pair that it learns from. With DPO this is online DPO (Guo et al. 2024), with the
policy's own reward in place of a judge.

    round 1:  train on all offline pairs                     (an untrained policy's implicit reward is 0 everywhere)
    repeat:   candidates = sample(policy, prompts)
              pairs      = the best and the worst of each prompt's candidates, by the reward that ranks
              policy     = one update of the direct alignment loss on these pairs

The reference stays the SFT model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax import guards, irm
from sera_jax.config.groups import OnlineGroup
from sera_jax.core import Mean, Stream
from sera_jax.data import stored
from sera_jax.data.batches import Batch, PairLoader
from sera_jax.data.items import PairItem, items_digest
from sera_jax.data.packing import rounded_window
from sera_jax.data.planning import Shapes
from sera_jax.data.rollouts import PromptSchedule, coarse_sizes
from sera_jax.data.stored import items_of
from sera_jax.evaluation import gold
from sera_jax.loops import cost
from sera_jax.loops.log import warn_of_still_margins, write_round
from sera_jax.loops.optimise import Training, Updates, optimise
from sera_jax.loops.restartable import Span
from sera_jax.loops.review import pair_golds, pair_items, pair_up
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sera_study import (
    Round,
    SeraStudy,
    pair_target,
    pairs_digest,
    pool_logps,
    train_round,
    updates_per_round,
)
from sera_jax.models.decoder import Params
from sera_jax.sampling import Candidates, grouped
from sera_jax.training.step import TrainState

REFUSALS = (*irm.REFUSALS, "below_min_margin")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the batch of each update comes from.

    Attributes:
        batch: from (the state before the update, its number from 1) to pairs.
        window: no item of it is longer than this.
        depends: what the batches depend on, JSON-able. epoch_updates: how many go over the source once.
    """

    batch: Callable[[TrainState, int], Batch]
    window: int
    depends: dict[str, Any]
    epoch_updates: int


def online(study: SeraStudy, settings: OnlineGroup, arm: str, source: Source) -> tuple[Policy, list[dict[str, Any]]]:
    """Round 1, then `settings.updates` updates on the pairs of `source`; the last policy, and the facts of every
    evaluation: round 1 and every `eval_updates` updates after it.

    Raises:
        ValueError: no pair could be made.
    """
    policy = train_round(study, dataclasses.replace(study.settings, rounds=1), study.sft, study.pool, Round(arm, 1))
    offline_updates = updates_per_round(study)
    facts = [{"arm": arm, "round": 1, "update": 0, **study.evaluate(policy, 1)}]
    write_round(study.run, facts[-1], offline_updates)
    for round_, (before, last) in enumerate(segments(settings), 2):
        training = Training(
            name=f"{arm}/update{last}",
            start=policy,
            batches=lambda state, update, before=before: source.batch(state, before + update),
            epoch_updates=source.epoch_updates,
            depends=source.depends,
            target=pair_target(study.run, study.loss, source.window),
            group=study.train,
            trained=study.run.trained(study.train),
            updates=Updates(last - before, planned=settings.updates, before=before),
            span=Span("train", arm, round_, offline_updates + before),
            continue_from=policy if before else None,
            last_of=policy if before else None,
        )
        policy = optimise(study.run, training)
        if policy.name in study.run.workdir.fresh:
            warn_of_still_margins(study.run, training.span, study.loss, study.train.learning_rate)
        facts.append({"arm": arm, "round": round_, "update": last, **study.evaluate(policy, round_)})
        write_round(study.run, facts[-1], offline_updates + last)
    return policy, facts


def segments(settings: OnlineGroup) -> list[tuple[int, int]]:
    """(Updates before, updates after) of what lies between two evaluations."""
    every = settings.eval_updates or settings.updates
    return [(before, min(before + every, settings.updates)) for before in range(0, settings.updates, every)]


def self_made(study: SeraStudy) -> Source:
    """Pairs of the policy's own answers to `train.batch_size` prompts an update, by the rules of `study.settings`."""
    run, rules = study.run, study.settings
    layout = run.layout.accumulated(study.train.gradient_accumulation_steps)
    schedule = PromptSchedule(study.prompts, (), 1.0, study.train.batch_size, run.seed)
    longest = max(len(item.prompt) for item in study.prompts)
    window = rounded_window(longest + rules.num_samples * study.sampling.max_new_tokens, layout.row_tokens)
    sampling = dataclasses.replace(study.sampling, slots=min(study.sampling.slots, study.train.batch_size))
    known = Shapes(coarse_sizes(layout.planned))  # so that few numbers of rows are compiled

    def batch(state: TrainState, update: int) -> Batch:
        prompts = schedule.prompts(update)
        how = dict(round_=update, max_prompt_tokens=longest)
        sampled = grouped(prompts, run.generate(state.params, prompts, rules.num_samples, sampling, **how))
        candidates = _scored(study, state.params, sampled, window)
        ranked = pair_up(study, candidates, [study.ranking(group) for group in candidates], rules)
        pairings = [guards.above(made, rules.min_margin) for made in ranked]
        kept = [made.pairs for made in pairings]
        chosen = [(group, made) for group, made in zip(candidates, kept, strict=True) if made]
        pairs = [pair for group, made in chosen for pair in pair_items(group, made, "", layout)]
        if not pairs:
            raise ValueError(_nothing_left(study, update, pairings))
        count = sum(map(len, kept))
        loader = PairLoader(pairs, layout, batch_size=count, seed=run.seed, known=known, order="given")
        margins = [pair.margin for made in kept for pair in made]
        tokens = cost.laid([group.item for group in candidates], layout)
        return dataclasses.replace(
            loader.batch(0),
            metrics=_metrics(study, pairs, np.array(margins, np.float32), pairings),
            spent={"sampling": tokens, "scoring": (1 + study.loss.uses_reference) * tokens},
        )

    depends = {
        "prompts": items_digest(study.prompts),
        "sft": study.sft.digest,
        "rules": dataclasses.asdict(rules),
        "sampling": dataclasses.asdict(study.sampling),
        "stop_ids": run.stop_ids,
        "seed": run.seed,
        "row_tokens": run.layout.row_tokens,
    }
    return Source(batch, window, depends, -(-len(study.prompts) // study.train.batch_size))


def _scored(study: SeraStudy, params: Params, candidates: Sequence[Candidates], window: int) -> list[Candidates]:
    """The candidates with their log-probs under `params` and, where the loss has one, under the reference."""
    run = study.run
    logps: list[Any] = run.score_now(params, candidates, window)
    reference: list[Any] = [None] * len(candidates)
    if study.loss.uses_reference:
        reference = run.score_now(run.params(study.sft), candidates, window)
    return [
        dataclasses.replace(group, logp=logp, ref_logp=ref)
        for group, logp, ref in zip(candidates, logps, reference, strict=True)
    ]


def _metrics(
    study: SeraStudy, pairs: Sequence[PairItem], margins: np.ndarray, pairings: Sequence[irm.Pairing]
) -> dict[str, Mean]:
    """How many pairs an update has, their margin (nats), what was refused, and, of those with a gold reward, whether it
    agrees."""
    refused = {reason: np.float32(sum(made.refused[reason] for made in pairings)) for reason in REFUSALS}
    count = np.float32(len(margins))
    golds = np.zeros((0, 2)) if study.gold is None else pair_golds(study.gold, pairs)
    known = np.float32(np.sum(~np.isnan(golds).any(axis=1)))
    shares = gold.agreement(*golds.T)
    return {
        "bootstrap/pairs": Mean(count, np.float32(1)),
        "bootstrap/margin_mean": Mean(margins.sum(), count),
        **{f"bootstrap/refused_{reason}": Mean(number, np.float32(1)) for reason, number in refused.items()},
        **{f"bootstrap/gold_{name}": Mean(np.float32(share) * known, known) for name, share in shares.items()},
    }


def _nothing_left(study: SeraStudy, update: int, pairings: Sequence[irm.Pairing]) -> str:
    refused: Counter[str] = sum((made.refused for made in pairings), Counter())
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items()))
    return (
        f"update {update}: the answers to {len(pairings)} prompts make no pair ({counts}); "
        f"raise config.sampling.temperature ({study.sampling.temperature}) or config.sera.num_samples "
        f"({study.settings.num_samples}), or lower config.sera.min_margin, under another --config.workdir"
    )


def offline(study: SeraStudy) -> Source:
    """The control: as many updates, on the offline pairs again."""
    run, group = study.run, study.train
    loader = PairLoader(
        study.pool,
        run.layout.accumulated(group.gradient_accumulation_steps),
        batch_size=group.batch_size,
        seed=run.seed,
        stream_indices=(Stream.SHUFFLE, 2),
        known=run.pair_shapes.known,
    )
    depends = {"pairs": pairs_digest(study.pool), "seed": run.seed, "row_tokens": run.layout.row_tokens}
    window = run.layout.window(items_of(study.pool))
    return Source(lambda state, update: loader.batch(update - 1), window, depends, loader.steps_per_epoch)


def with_reference(study: SeraStudy) -> SeraStudy:
    """The study whose offline pairs carry the SFT model's log-probs, which training reads."""
    reference = pool_logps(study, study.sft)
    return dataclasses.replace(study, pool=stored.with_reference(study.pool, reference))
