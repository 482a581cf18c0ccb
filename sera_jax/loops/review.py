"""The two things a round of SeRA does before it trains: review the offline pairs, bootstrap new ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax import irm
from sera_jax.config import SeraGroup
from sera_jax.core import Stream, rng_for
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import laid_tokens, split_items
from sera_jax.evaluation import gold
from sera_jax.loops.runtime import Policy
from sera_jax.loops.study import Study, pair_margins, pool_logps


def review(
    study: Study, settings: SeraGroup, pool: Sequence[PairItem], policies: Sequence[Policy], round_: int
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
    study: Study, settings: SeraGroup, policies: Sequence[Policy], round_: int
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
    groups = run.sample(f"{now.name}/candidates", now, prompts, settings.num_samples, study.sampling, round_=round_)
    candidates = [
        dataclasses.replace(prompt, responses=tuple(s.tokens for s in group)) for prompt, group in zip(prompts, groups)
    ]
    reference = (
        candidate_logps(study, study.sft, candidates, now) if study.loss.uses_reference else [None] * len(prompts)
    )
    newest, before = (
        [study.loss.score(logp, np.array([len(r) for r in item.responses]), ref) for item, logp, ref in rows]
        for rows in (zip(candidates, candidate_logps(study, p, candidates, now), reference) for p in policies[-1:-3:-1])
    )
    rewards = [irm.ensemble(new, old, settings.ensemble_gamma) for new, old in zip(newest, before, strict=True)]
    pairings = [
        irm.pair_candidates(
            reward,
            item.responses,
            mode=settings.pairing,
            length_alpha=settings.length_alpha,
            finished=[s.finished for s in group] if settings.require_eos else None,
            stop_ids=run.stop_ids,
        )
        for item, reward, group in zip(candidates, rewards, groups, strict=True)
    ]
    flat = [(i, pair) for i, pairing in enumerate(pairings) for pair in pairing.pairs]
    kept = irm.filter_bootstrapped(
        np.array([pair.margin for _, pair in flat], np.float32),
        count=count,
        threshold=settings.min_margin,
        rule="random" if settings.selection == "random" else "top",
        seed=run.seed,
        round_index=round_,
    )
    grouped: dict[int, list[tuple[int, int]]] = {}
    for index in kept:
        i, pair = flat[index]
        grouped.setdefault(i, []).append((pair.chosen, pair.rejected))
    fresh = [
        pair
        for i, pairs in grouped.items()
        for pair in _fresh_pairs(candidates[i], reference[i], pairs, round_, run.row_tokens, run.share_prompt)
    ]
    lengths = [[len(r) for r in item.responses] for item in candidates]
    record: dict[str, Any] = irm.bootstrap_summary(pairings, lengths, [[s.finished for s in g] for g in groups])
    if study.judge is not None and fresh:
        record["agreement"] = agreement(study.judge, fresh)
    return fresh, record


def candidate_logps(study: Study, scorer: Policy, items: Sequence[Item], sampled_by: Policy) -> list[np.ndarray]:
    """Summed log-prob of every candidate under `scorer`: f32[N] for each prompt."""
    name = f"{sampled_by.name}/candidates_by_{scorer.name.replace('/', '-')}"
    pieces = split_items(items, study.run.row_tokens, study.run.share_prompt)
    flat = np.concatenate(study.run.score(name, scorer, pieces))
    return np.split(flat, np.cumsum([len(item.responses) for item in items])[:-1])


def agreement(judge: Callable[[Item, np.ndarray], float], pairs: Sequence[PairItem]) -> dict[str, float]:
    """Shares of pairs whose chosen response the gold reward puts above, below, or level with the rejected one."""
    golds = [[judge(p.item, p.item.responses[k]) for k in pair] for p in pairs for pair in p.pairs]
    return gold.agreement(*np.array(golds).T)


def _fresh_pairs(
    item: Item,
    ref_logp: np.ndarray | None,
    pairs: list[tuple[int, int]],
    round_: int,
    row_tokens: int,
    share_prompt: bool,
) -> list[PairItem]:
    """A PairItem with only the responses that its pairs use; one for each pair where together they overflow a row."""
    used = sorted({k for pair in pairs for k in pair})
    place = {k: i for i, k in enumerate(used)}
    cut = Item(f"{item.id}#round{round_}", item.prompt, tuple(item.responses[k] for k in used))
    if len(pairs) > 1 and laid_tokens(cut, share_prompt) > row_tokens:
        single = [_fresh_pairs(item, ref_logp, [pair], round_, row_tokens, share_prompt)[0] for pair in pairs]
        return [
            dataclasses.replace(p, item=dataclasses.replace(p.item, id=f"{p.item.id}.{k}"))
            for k, p in enumerate(single)
        ]
    ref_logp = None if ref_logp is None else ref_logp[used]
    return [PairItem(cut, tuple((place[a], place[b]) for a, b in pairs), ref_logp, source="bootstrap")]
