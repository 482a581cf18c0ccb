"""The two things a round of SeRA does before it trains: review the offline pairs, bootstrap new ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sera_jax import irm
from sera_jax.config import SeraGroup
from sera_jax.core import Stream, rng_for
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import Layout, laid_tokens
from sera_jax.evaluation import gold
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sera_study import Gold, SeraStudy, pair_margins, pool_logps
from sera_jax.sampling import Candidates


def review(
    study: SeraStudy, settings: SeraGroup, pool: Sequence[PairItem], policies: Sequence[Policy], round_: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Which offline pairs the rule selects by their ensembled margin (ascending indices), and the margins of all."""

    def margins_under(policy: Policy) -> np.ndarray:
        logps = pool_logps(study, policy)
        return np.array([pair_margins(study.loss, pair, logp)[0] for pair, logp in zip(pool, logps, strict=True)])

    current, previous = margins_under(policies[-1]), margins_under(policies[-2])
    margins = irm.ensemble(current, previous, settings.ensemble_gamma)

    def select(rules: SeraGroup, fraction: float) -> np.ndarray:
        return irm.select(
            margins,
            rules.selection,
            fraction=fraction,
            threshold=rules.threshold,
            band=rules.band,
            seed=study.run.seed,
            round_index=round_,
        )

    fraction = settings.keep_fraction
    if settings.selection == "random" and len(pool):  # the control keeps as many as the rule it stands for would
        fraction = len(select(study.settings, fraction)) / len(pool)
    chosen = select(settings, fraction)
    lengths = np.array([[len(pair.item.responses[k]) for k in pair.pairs[0]] for pair in pool])
    record = {
        "margin_mean": float(margins.mean()),
        "margin_p10": float(np.percentile(margins, 10)),
        "margin_p90": float(np.percentile(margins, 90)),
        **irm.margin_summary(margins, lengths[:, 0], lengths[:, 1]),
        **irm.selection_summary(margins, chosen),
        **irm.ensemble_summary(current, previous, settings.ensemble_gamma),
    }
    return chosen, margins, record


def bootstrap(
    study: SeraStudy, settings: SeraGroup, policies: Sequence[Policy], round_: int
) -> tuple[list[PairItem], dict[str, Any]]:
    """Pairs that the policy sampled and ranked itself, those of the largest margin; SeRA's bootstrapping."""
    count = round(settings.bootstrap_fraction * len(study.pool))
    if count == 0:
        return [], {}
    run, now = study.run, policies[-1]
    prompts = study.prompts
    if 0 < settings.bootstrap_prompts < len(prompts):
        picked = rng_for(run.seed, Stream.SELECT, round_, 2).permutation(len(prompts))[: settings.bootstrap_prompts]
        prompts = [prompts[i] for i in sorted(picked)]
    candidates = run.sample(f"{now.name}/candidates", now, prompts, settings.num_samples, study.sampling, round_=round_)
    newest, before = (scored(study, candidates, now, policy) for policy in policies[-1:-3:-1])
    rewards = [
        irm.ensemble(study.ranking(new), study.ranking(old), settings.ensemble_gamma)
        for new, old in zip(newest, before, strict=True)
    ]
    pairings = pair_up(study, candidates, rewards, settings)
    flat = [(i, pair) for i, pairing in enumerate(pairings) for pair in pairing.pairs]
    kept = irm.filter_bootstrapped(
        np.array([pair.margin for _, pair in flat], np.float32),
        count=count,
        threshold=settings.min_margin,
        rule="random" if settings.selection == "random" else "top",
        seed=run.seed,
        round_index=round_,
    )
    chosen: dict[int, list[irm.CandidatePair]] = {}
    for index in kept:
        i, pair = flat[index]
        chosen.setdefault(i, []).append(pair)
    fresh = [
        item for i, pairs in chosen.items() for item in pair_items(newest[i], pairs, f"#round{round_}", run.layout)
    ]
    lengths, ended = [c.lengths for c in candidates], [c.finished for c in candidates]
    record: dict[str, Any] = irm.bootstrap_summary(pairings, lengths, ended)
    if study.gold is not None and fresh:
        record["agreement"] = agreement(study.gold, fresh)
    return fresh, record


def scored(study: SeraStudy, candidates: Sequence[Candidates], sampled_by: Policy, policy: Policy) -> list[Candidates]:
    """The candidates with their log-probs under `policy` and, where the loss has one, under the reference."""

    def logps(scorer: Policy) -> list[np.ndarray]:
        return study.run.score_candidates(scored_phase(sampled_by.name, scorer.name), scorer, candidates)

    reference = logps(study.sft) if study.loss.uses_reference else [None] * len(candidates)
    return [
        dataclasses.replace(c, logp=logp, ref_logp=ref)
        for c, logp, ref in zip(candidates, logps(policy), reference, strict=True)
    ]


def scored_phase(sampled_by: str, scorer: str) -> str:
    """The phase that scores the candidates of one policy by another."""
    return f"{sampled_by}/candidates_by_{scorer.replace('/', '-')}"


def pair_up(
    study: SeraStudy, candidates: Sequence[Candidates], rewards: Sequence[np.ndarray], settings: SeraGroup
) -> list[irm.Pairing]:
    """What `settings` makes of every prompt's candidates, ranked by their rewards f32[N]; what no row may be (an answer
    that says nothing, a pair that says the same) makes no pair."""
    return [
        irm.pair_candidates(
            reward,
            group.tokens,
            mode=settings.pairing,
            length_alpha=settings.length_alpha,
            finished=group.finished if settings.require_eos else None,
            stop_ids=study.run.stop_ids,
            texts=[study.text(tokens) for tokens in group.tokens],
        )
        for group, reward in zip(candidates, rewards, strict=True)
    ]


def pair_items(candidates: Candidates, pairs: Sequence[irm.CandidatePair], mark: str, layout: Layout) -> list[PairItem]:
    """Training entries of one prompt's pairs, with only the responses they use and their reference log-probs: one, or
    one for each pair where together they overflow a row. `mark` ends the ids."""
    used = sorted({k for pair in pairs for k in (pair.chosen, pair.rejected)})
    place = {k: i for i, k in enumerate(used)}
    cut = Item(f"{candidates.prompt.id}{mark}", candidates.prompt.prompt, tuple(candidates.tokens[k] for k in used))
    if len(pairs) > 1 and laid_tokens(cut, layout.share_prompt) > layout.row_tokens:
        return [pair_items(candidates, [pair], f"{mark}.{k}", layout)[0] for k, pair in enumerate(pairs)]
    ref_logp = None if candidates.ref_logp is None else candidates.ref_logp[used]
    return [PairItem(cut, tuple((place[p.chosen], place[p.rejected]) for p in pairs), ref_logp, source="bootstrap")]


def agreement(gold_reward: Gold, pairs: Sequence[PairItem]) -> dict[str, float]:
    """Shares of pairs whose chosen response the gold reward puts above, below, or level with the rejected one."""
    golds = [[gold_reward(p.item, p.item.responses[k]) for k in pair] for p in pairs for pair in p.pairs]
    return gold.agreement(*np.array(golds).T)
