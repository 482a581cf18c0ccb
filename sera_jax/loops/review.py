"""The two things a round of SeRA does before it trains: review the offline pairs, bootstrap new ones."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sera_jax import guards, irm
from sera_jax.config import SeraGroup
from sera_jax.core import Stream, rng_for
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import Layout, Scores, laid_tokens
from sera_jax.data.stored import Pairs, lengths_of_pairs
from sera_jax.evaluation import gold, rankings
from sera_jax.loops.rewards import Reward, implicit
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sera_study import Gold, SeraStudy, pool_logps, pool_margins
from sera_jax.sampling import Candidates

SUPPORT_PROMPTS = 1000  # whose answers say well enough where a quantile lies


def review(
    study: SeraStudy, settings: SeraGroup, pool: Sequence[PairItem], policies: Sequence[Policy], round_: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Which offline pairs to train on (ascending indices): those that the rule selects by their ensembled margin and
    those that replay takes back; and the margins of all."""

    def margins_of(logps: Scores) -> np.ndarray:
        return pool_margins(study.loss, pool, logps)

    newest, before = pool_logps(study, policies[-1]), pool_logps(study, policies[-2])
    current, previous = margins_of(newest), margins_of(before)
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

    fraction, fit = settings.keep_fraction, {}
    if settings.keep_rule == "mixture":
        fraction, fit = guards.clean_share(margins)
    if settings.selection == "random" and len(pool):  # the control keeps as many as the rule it stands for would
        fraction = len(select(study.settings, fraction)) / len(pool)
    chosen = select(settings, fraction)
    back = guards.replayed(
        chosen, len(pool), fraction=settings.replay_fraction, seed=study.run.seed, round_index=round_
    )
    lengths = lengths_of_pairs(pool)
    record = {
        "margin_mean": float(margins.mean()),
        "margin_p10": float(np.percentile(margins, 10)),
        "margin_p90": float(np.percentile(margins, 90)),
        **irm.margin_summary(margins, lengths[:, 0], lengths[:, 1]),
        "irm/chosen_logratio": _chosen_logratio(pool, newest),
        **irm.selection_summary(margins, chosen),
        **irm.ensemble_summary(current, previous, settings.ensemble_gamma),
        **fit,
    }
    if settings.replay_fraction > 0:
        record["replayed"] = len(back)
    return np.union1d(chosen, back), margins, record


def _chosen_logratio(pool: Sequence[PairItem], logps: Scores) -> float:
    """Mean of the chosen answers' summed log pi - log pi_sft, nats, whatever the loss reads."""
    if isinstance(pool, Pairs) and pool.ref_logp is not None:
        return float(np.mean(pool.first_choice(np.asarray(logps) - pool.ref_logp)[:, 0]))
    ratios = [(logp - np.asarray(p.ref_logp))[p.pairs[0][0]] for p, logp in zip(pool, logps, strict=True)]
    return float(np.mean(ratios))


def bootstrap(
    study: SeraStudy, settings: SeraGroup, policies: Sequence[Policy], round_: int
) -> tuple[list[PairItem], dict[str, Any]]:
    """Pairs that the policy sampled and ranked itself, those of the largest margin, in the order of the curriculum;
    SeRA's bootstrapping."""
    count = round(settings.bootstrap_fraction * len(study.pool))
    if count == 0:
        return [], {}
    made = sampled(study, settings, policies, round_)
    rewards = judged(study, settings, made, round_)
    pairings = guarded(study, settings, made, rewards)
    flat = [(i, pair) for i, pairing in enumerate(pairings) for pair in pairing.pairs]
    margins = np.array([pair.margin for _, pair in flat], np.float32)
    inside, refused = guards.admitted(margins, settings.min_margin, settings.bootstrap_band)
    kept = np.flatnonzero(inside)[irm.filter_bootstrapped(margins[inside], count=count)]
    if settings.selection == "random":  # the control keeps as many, with no regard to margins
        how: dict[str, Any] = dict(rule="random", seed=study.run.seed, round_index=round_)
        kept, refused = irm.filter_bootstrapped(margins, count=len(kept), **how), Counter[str]()
    chosen: dict[int, list[irm.CandidatePair]] = {}
    for index in kept[irm.order(margins[kept], settings.curriculum)]:
        i, pair = flat[index]
        chosen.setdefault(i, []).append(pair)
    fresh = [
        item
        for i, pairs in chosen.items()
        for item in pair_items(made.newest[i], pairs, f"#round{round_}", study.run.layout)
    ]
    record: dict[str, Any] = _summary(made, rewards, pairings, settings)
    record |= {f"bootstrap/refused_{reason}": float(number) for reason, number in refused.items()}
    if study.gold is not None:
        record["rankings"] = _rankings(study, settings, made, study.gold)
        if fresh and (shares := agreement(study.gold, fresh)):
            record["agreement"] = shares
    return fresh, record


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A round's candidates by prompt, scored under the newest policy and under the one before.

    Attributes:
        sft: their summed log-probs under the SFT model, f32[N]; None where nothing asks for them.
    """

    newest: list[Candidates]
    before: list[Candidates]
    sft: Sequence[np.ndarray] | None


def sampled(study: SeraStudy, settings: SeraGroup, policies: Sequence[Policy], round_: int) -> Sampled:
    """Candidates of the newest policy, or, with `bootstrap_from="sft"`, of the SFT model, which then judges alone."""
    run, prompts = study.run, study.prompts
    now, last = (study.sft, study.sft) if settings.bootstrap_from == "sft" else (policies[-1], policies[-2])
    name = candidates_phase(settings, now.name, round_)
    if 0 < settings.bootstrap_prompts < len(prompts):
        picked = rng_for(run.seed, Stream.SELECT, round_, 2).permutation(len(prompts))[: settings.bootstrap_prompts]
        prompts = [prompts[i] for i in sorted(picked)]
    candidates = run.sample(name, now, prompts, settings.num_samples, study.sampling, round_=round_)
    asked = _asks_sft(settings, uses_reference=study.loss.uses_reference)
    sft = _logps(study, candidates, name, study.sft) if asked else None
    reference = sft if study.loss.uses_reference and sft is not None else [None] * len(candidates)

    def scored(policy: Policy) -> list[Candidates]:
        logps = zip(candidates, _logps(study, candidates, name, policy), reference, strict=True)
        return [dataclasses.replace(c, logp=logp, ref_logp=ref) for c, logp, ref in logps]

    return Sampled(scored(now), scored(last), sft)


def _asks_sft(settings: SeraGroup, *, uses_reference: bool) -> bool:
    """Whether the SFT model scores the candidates."""
    return uses_reference or settings.support_quantile > 0 or settings.stop_kl is not None


def _logps(study: SeraStudy, candidates: Sequence[Candidates], name: str, scorer: Policy) -> list[np.ndarray]:
    return study.run.score_candidates(scored_phase(name, scorer.name), scorer, candidates)


def judged(study: SeraStudy, settings: SeraGroup, made: Sampled, round_: int) -> list[np.ndarray]:
    """The rewards f32[N] that rank each prompt's candidates: the policies' by equation 7, or those of a control."""
    if settings.judge == "chance":
        draws = (rng_for(study.run.seed, Stream.SELECT, round_, 3, i) for i in range(len(made.newest)))
        return [rng.random(len(c.samples)).astype(np.float32) for rng, c in zip(draws, made.newest)]
    if settings.judge == "gold":
        rule = study.gold
        assert rule is not None, "refused where there is no gold reward"
        return [np.array([rule(c.prompt, said) for said in c.tokens], np.float32) for c in made.newest]
    return _ensembled(settings, made, study.ranking)


def _ensembled(settings: SeraGroup, made: Sampled, ranking: Reward) -> list[np.ndarray]:
    both = zip(made.newest, made.before, strict=True)
    return [irm.ensemble(ranking(new), ranking(old), settings.ensemble_gamma) for new, old in both]


def guarded(study: SeraStudy, settings: SeraGroup, made: Sampled, rewards: Sequence[np.ndarray]) -> list[irm.Pairing]:
    """What `settings` makes of every prompt's candidates, within its guard rails on support and agreement."""
    supported = [np.ones(len(c.samples), bool) for c in made.newest]
    if settings.support_quantile > 0:
        assert made.sft is not None
        least = support(study, settings.support_quantile)
        supported = [_per_token(logp, c) >= least for logp, c in zip(made.sft, made.newest, strict=True)]

    def pair(i: int) -> irm.Pairing:
        def of(places: np.ndarray) -> irm.Pairing:
            few = made.newest[i].only(places)
            return pair_up(study, [few], [rewards[i][places]], settings)[0]

        return guards.among_supported(supported[i], of)

    pairings = [pair(i) for i in range(len(made.newest))]
    judges = _judges(study, settings, made)
    return [guards.agreed(pairing, [judge[i] for judge in judges]) for i, pairing in enumerate(pairings)]


def _judges(study: SeraStudy, settings: SeraGroup, made: Sampled) -> list[list[np.ndarray]]:
    """Each judge's rewards of every prompt's candidates, by `settings.agreement`."""
    if settings.agreement == "rewards":
        both = (implicit(study.loss), implicit(study.loss, likelihood_weight=1.0, reduction="mean"))
        return [_ensembled(settings, made, reward) for reward in both]
    if settings.agreement == "policies":
        return [[study.ranking(c) for c in group] for group in (made.newest, made.before)]
    return []


def support(study: SeraStudy, quantile: float) -> float:
    """The log-prob per token below which this share of the SFT model's own answers lies: one to each prompt, to at most
    `SUPPORT_PROMPTS` of them, sampled as candidates are."""
    run, sft = study.run, study.sft
    name = f"{sft.name}/support"
    own = run.sample(name, sft, study.prompts[:SUPPORT_PROMPTS], 1, study.sampling, round_=0)
    rates = [_per_token(logp, c) for logp, c in zip(_logps(study, own, name, sft), own, strict=True)]
    return float(np.quantile(np.concatenate(rates), quantile))


def _per_token(logp: np.ndarray, candidates: Candidates) -> np.ndarray:
    return logp / np.maximum(candidates.lengths, 1)


def _summary(
    made: Sampled, rewards: Sequence[np.ndarray], pairings: Sequence[irm.Pairing], settings: SeraGroup
) -> dict[str, float]:
    """`bootstrap/*` of a round before the filter on margins."""
    tokens, lengths, ended = ([getattr(c, name) for c in made.newest] for name in ("tokens", "lengths", "finished"))
    astray: dict[str, float] = {}  # what the brakes read
    if made.sft and settings.bootstrap_from == "policy":
        ratios = [c.logp - sft for c, sft in zip(made.newest, made.sft, strict=True)]
        astray["bootstrap/kl_to_sft"] = float(np.mean(np.concatenate(ratios)))
    if settings.support_quantile > 0:
        refused = sum(pairing.refused["unsupported"] for pairing in pairings)
        astray["bootstrap/unsupported_fraction"] = refused / max(1, sum(map(len, tokens)))
    return {
        **astray,
        **irm.bootstrap_summary(pairings, lengths, ended),
        **guards.candidate_summary(rewards, tokens, made.sft),
        **guards.margin_spread(pairings),
    }


def _rankings(study: SeraStudy, settings: SeraGroup, made: Sampled, rule: Gold) -> dict[str, dict[str, Any]]:
    """What `evaluation.rankings` says of the newest policy's candidates that may make pairs and have a gold reward."""
    settings = dataclasses.replace(settings, pairing="best_worst", length_alpha=0.0)
    usable = [c.only(np.flatnonzero(c.finished)) if settings.require_eos else c for c in made.newest]
    golds = [(c, np.array([rule(c.prompt, said) for said in c.tokens])) for c in usable if len(c.samples) > 1]
    golds = [(c, found) for c, found in golds if not np.isnan(found).any()]
    pair = lambda candidates, rewards: pair_up(study, candidates, rewards, settings)  # noqa: E731
    return rankings.facts([c for c, _ in golds], [found for _, found in golds], pair)


def bootstrap_phases(settings: SeraGroup, policies: Sequence[str], round_: int, *, uses_reference: bool) -> list[str]:
    """The phases of `bootstrap` after rounds that made `policies`."""
    both = ("sft", "sft") if settings.bootstrap_from == "sft" else tuple(policies[-2:])
    name = candidates_phase(settings, both[-1], round_)
    scorers = [*both, *(["sft"] if _asks_sft(settings, uses_reference=uses_reference) else [])]
    support = ["sft/support", scored_phase("sft/support", "sft")] if settings.support_quantile > 0 else []
    return [name, *(scored_phase(name, scorer) for scorer in scorers), *support]


def candidates_phase(settings: SeraGroup, sampled_by: str, round_: int) -> str:
    """The phase that samples candidates: the SFT model's own are drawn anew in every round."""
    return f"{sampled_by}/candidates" + (str(round_) if settings.bootstrap_from == "sft" else "")


def scored_phase(candidates: str, scorer: str) -> str:
    """The phase that scores the candidates of a phase by a policy."""
    return f"{candidates}_by_{scorer.replace('/', '-')}"


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
    return gold.agreement(*pair_golds(gold_reward, pairs).T)


def pair_golds(gold_reward: Gold, pairs: Sequence[PairItem]) -> np.ndarray:
    """Gold rewards of both sides of every pair, f[n, 2], the chosen first; NaN where there is none."""
    return np.array([[gold_reward(p.item, p.item.responses[k]) for k in pair] for p in pairs for pair in p.pairs])
