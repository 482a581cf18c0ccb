"""SeRA (Ko et al., ICLR 2025): a direct alignment loss in rounds that review and bootstrap their own preference pairs.

    round 1:     train on all offline pairs                       (an untrained policy's margins are 0 everywhere)
    round 2..T:  kept  = review:    score the offline pairs, keep those with the largest implicit reward margin
                 fresh = bootstrap: sample N responses per prompt, pair best and worst by implicit reward, keep the
                                    pairs with the largest margin
                 policy = train on kept + fresh

The implicit reward is that of the loss, with the SFT model as the fixed reference, ensembled over two rounds (eq. 7).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax import irm
from sera_jax.checkpoint.phases import digest_of, write_jsonl
from sera_jax.config import SamplingGroup, SeraGroup, TrainGroup
from sera_jax.core import Stream, rng_for
from sera_jax.data.batches import PairLoader
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import laid_tokens, window_for
from sera_jax.evaluation import gold
from sera_jax.loops.optimise import Task, optimise
from sera_jax.loops.runtime import Policy, Runtime, items_digest
from sera_jax.losses.preference import ResolvedLoss
from sera_jax.mesh import row_shards
from sera_jax.training.objectives import align_objective


@dataclasses.dataclass(frozen=True)
class Study:
    """What the rounds of every arm share.

    Attributes:
        pool: the offline pairs, after label noise.
        prompts: what bootstrapping samples on (items without responses).
        judge: gold reward of (prompt item, response tokens), where a world has one; only reported.
        evaluate: held-out facts of a policy, for the report; round 0 is the SFT model.
    """

    run: Runtime
    sft: Policy
    loss: ResolvedLoss
    settings: SeraGroup
    train: TrainGroup
    sampling: SamplingGroup
    pool: Sequence[PairItem]
    prompts: Sequence[Item]
    evaluate: Callable[[Policy, int], dict[str, Any]]
    judge: Callable[[Item, np.ndarray], float] | None
    max_row_shapes: int
    logging_steps: int


def settings_of_arm(settings: SeraGroup, arm: str) -> SeraGroup:
    """The settings of an arm: `sera` itself, or a control that differs from it in one thing."""
    changes: dict[str, dict[str, Any]] = {
        "sera": {},
        "daa": {"selection": "none", "bootstrap_fraction": 0.0, "threshold": None},
        "random": {"selection": "random", "threshold": None},
        "selection_only": {"bootstrap_fraction": 0.0},
        "bootstrap_only": {"selection": "none", "threshold": None},
    }
    return dataclasses.replace(settings, **changes[arm])


def sera(study: Study, arm: str) -> tuple[Policy, list[dict[str, Any]]]:
    """Run the rounds of one arm; returns its last policy and the facts of every round."""
    settings = settings_of_arm(study.settings, arm)
    offline = [pair.item for pair in study.pool]
    reference = study.run.score("sft/pool", study.sft, offline)
    pool = [dataclasses.replace(pair, ref_logp=logp) for pair, logp in zip(study.pool, reference, strict=True)]
    policies, scores, facts = [study.sft], [reference], []

    for round_ in range(1, settings.rounds + 1):
        now = policies[-1]
        kept, fresh, record = pool, [], {}
        reviewed = round_ > 1 and (settings.selection != "none" or settings.bootstrap_fraction > 0)
        if reviewed:
            scores.append(study.run.score(f"{now.name}/pool", now, offline))
            chosen, margins, record = review(study, settings, pool, scores, round_)
            fresh, more = bootstrap(study, settings, policies, round_)
            record |= more
            save_pairs(study, f"{arm}/pairs{round_}", chosen, margins, fresh)
            kept = [pool[i] for i in chosen[irm.order(margins[chosen], settings.curriculum)]]
        pairs = with_reference(study, settings, policies, [*kept, *fresh], round_)
        if not pairs:
            raise ValueError(
                f"{arm}, round {round_}: no pair is left to train on (selection={settings.selection!r}, "
                f"threshold={settings.threshold}, keep_fraction={settings.keep_fraction}, "
                f"min_margin={settings.min_margin}); keep more in config.sera, under another --config.workdir"
            )
        ordered = reviewed and settings.curriculum != "none"
        name = "round1" if round_ == 1 else f"{arm}/round{round_}"  # round 1 is the same in every arm
        policy = train_round(study, settings, policies, pairs, name, arm, round_, ordered)
        policies.append(policy)
        flipped = [pair.flipped for pair in kept]
        record |= {
            "arm": arm,
            "round": round_,
            "kept": len(kept),
            "added": sum(len(pair.pairs) for pair in fresh),
            "flipped_fraction_kept": float(np.mean(flipped)) if flipped else 0.0,
            "updates": updates_per_round(study),
            **study.evaluate(policy, round_),
        }
        facts.append(record)
        study.run.writer.write(
            phase="round", arm=arm, round=round_, step=1, metrics={"iteration": round_, **_numbers(record)}
        )
    return policies[-1], facts


def review(
    study: Study, settings: SeraGroup, pool: Sequence[PairItem], scores: Sequence[list[np.ndarray]], round_: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Which offline pairs the rule selects by their ensembled margin (ascending indices), and the margins of all."""

    def margins_under(logps: list[np.ndarray]) -> np.ndarray:
        return np.array([pair_margins(study.loss, pair, logp)[0] for pair, logp in zip(pool, logps, strict=True)])

    current, previous = margins_under(scores[-1]), margins_under(scores[-2])
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


def save_pairs(study: Study, name: str, kept: np.ndarray, margins: np.ndarray, fresh: Sequence[PairItem]) -> None:
    """What a round decided, for readers and as a check on restarts: every offline pair's margin and whether it is kept,
    and the tokens of the sampled pairs."""

    def produce(folder: pathlib.Path) -> None:
        keep = set(kept.tolist())
        offline = zip(study.pool, margins.tolist(), strict=True)
        write_jsonl(
            folder / "offline.jsonl",
            ({"id": p.item.id, "margin": m, "kept": i in keep} for i, (p, m) in enumerate(offline)),
        )
        write_jsonl(
            folder / "sampled.jsonl",
            (
                {
                    "id": p.item.id,
                    "prompt": p.item.prompt.tolist(),
                    "chosen": p.item.responses[w].tolist(),
                    "rejected": p.item.responses[l].tolist(),
                }
                for p in fresh
                for w, l in p.pairs
            ),
        )

    inputs = {"margins": margins.tobytes().hex(), "kept": kept.tolist(), "sampled": pairs_digest(fresh)}
    study.run.workdir.phase(name, {"digest": digest_of(inputs)}, produce)


def train_round(
    study: Study,
    settings: SeraGroup,
    policies: Sequence[Policy],
    pairs: Sequence[PairItem],
    name: str,
    arm: str,
    round_: int,
    ordered: bool,
) -> Policy:
    """DAA updates on `pairs`, as many in every round and every arm; `ordered` pairs are trained on as they stand."""
    run, group = study.run, study.train
    updates = updates_per_round(study)
    continues = round_ > 1 and not settings.reset_optimizer
    loader = PairLoader(
        pairs,
        batch_size=group.batch_size,
        row_tokens=run.row_tokens,
        seed=run.seed,
        stream_indices=(Stream.SHUFFLE, round_),
        row_multiple=group.gradient_accumulation_steps * row_shards(run.mesh),
        max_row_shapes=study.max_row_shapes,
        microbatches=group.gradient_accumulation_steps,
        share_prompt=run.share_prompt,
        known_sizes=run.row_shapes.sizes,
        spec=run.row_shapes.spec,
        order="given" if ordered else "shuffle",
    )
    run.row_shapes.note(loader, window_for([pair.item for pair in pairs], run.row_tokens, run.share_prompt))
    shards = row_shards(run.mesh)
    task = Task(
        name=name,
        start=policies[-1],
        loader=loader,
        window=run.row_shapes.window,
        objective=lambda window: align_objective(
            run.cfg, study.loss, window=window, chunk_tokens=run.chunk_tokens, shards=shards
        ),
        computes=(str(study.loss), run.chunk_tokens),
        group=group,
        updates=updates,
        schedule_updates=updates if settings.reset_optimizer else updates * settings.rounds,
        depends={"pairs": pairs_digest(pairs), "seed": run.seed, "row_tokens": run.row_tokens},
        continue_from=policies[-1] if continues else None,
        updates_before=updates * (round_ - 1) if continues else 0,
        log=("train", "" if round_ == 1 else arm, round_),
        logging_steps=study.logging_steps,
    )
    return optimise(run, task)


def with_reference(
    study: Study, settings: SeraGroup, policies: Sequence[Policy], pairs: Sequence[PairItem], round_: int
) -> list[PairItem]:
    """The pairs with the reference log-probs that training uses: of the SFT model (they carry those already), or, with
    reference="previous", of the last round's policy."""
    if settings.reference == "fixed" or not study.loss.uses_reference or round_ == 1:
        return list(pairs)
    items = [pair.item for pair in pairs]
    name = f"{policies[-1].name}/pairs_{pairs_digest(pairs)[:12]}"
    logps = study.run.score(name, policies[-1], items)
    return [dataclasses.replace(pair, ref_logp=logp) for pair, logp in zip(pairs, logps, strict=True)]


def candidate_logps(study: Study, scorer: Policy, items: Sequence[Item], sampled_by: Policy) -> list[np.ndarray]:
    """Summed log-prob of every candidate under `scorer`: f32[N] for each prompt."""
    name = f"{sampled_by.name}/candidates_by_{scorer.name.replace('/', '-')}"
    pieces = _pieces(items, study.run.row_tokens, study.run.share_prompt)
    flat = np.concatenate(study.run.score(name, scorer, pieces))
    return np.split(flat, np.cumsum([len(item.responses) for item in items])[:-1])


def pair_margins(loss: ResolvedLoss, pair: PairItem, logp: np.ndarray) -> np.ndarray:
    """Implicit reward margin (nats, no beta) of each pair of the item, f32[len(pairs)]."""
    lengths = np.array([len(r) for r in pair.item.responses])
    reward = loss.score(logp, lengths, pair.ref_logp if loss.uses_reference else None)
    return np.array([irm.margin(reward[[w]], reward[[l]])[0] for w, l in pair.pairs], np.float32)


def agreement(judge: Callable[[Item, np.ndarray], float], pairs: Sequence[PairItem]) -> dict[str, float]:
    """Shares of pairs whose chosen response the gold reward puts above, below, or level with the rejected one."""
    golds = [[judge(p.item, p.item.responses[k]) for k in pair] for p in pairs for pair in p.pairs]
    return gold.agreement(*np.array(golds).T)


def updates_per_round(study: Study) -> int:
    """The same in every round and arm: `max_steps`, or the epochs over the offline pairs."""
    per_epoch = -(-sum(len(pair.pairs) for pair in study.pool) // study.train.batch_size)
    return study.train.max_steps or study.train.num_train_epochs * per_epoch


def pairs_digest(pairs: Sequence[PairItem]) -> str:
    """Digest of what training on the pairs depends on, their order included."""
    rest = [[p.pairs, p.weight, None if p.ref_logp is None else np.asarray(p.ref_logp).tolist()] for p in pairs]
    return digest_of([items_digest([p.item for p in pairs]), rest])


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


def _pieces(items: Sequence[Item], row_tokens: int, share_prompt: bool) -> list[Item]:
    """The same responses in items that fit a row; most items are one piece."""
    pieces: list[Item] = []
    for item in items:
        part: tuple[np.ndarray, ...] = ()
        for response in item.responses:
            if part and laid_tokens(Item("", item.prompt, (*part, response)), share_prompt) > row_tokens:
                pieces.append(Item(f"{item.id}@{len(pieces)}", item.prompt, part))
                part = ()
            part = (*part, response)
        pieces.append(Item(f"{item.id}@{len(pieces)}", item.prompt, part))
    return pieces


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("arm", "round")}
