"""SeRA (Ko et al., ICLR 2025): a direct alignment loss in rounds that review and bootstrap their own preference pairs.

    round 1:     train on all offline pairs                       (an untrained policy's margins are 0 everywhere)
    round 2..T:  kept  = review:    score the offline pairs, keep those with the largest implicit reward margin
                 fresh = bootstrap: sample N responses per prompt, pair best and worst by implicit reward, keep the
                                    pairs with the largest margin
                 policy = train on kept + fresh

The implicit reward is that of the loss, with the SFT model as the fixed reference, ensembled over two rounds (eq. 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sera_jax import irm
from sera_jax.config import SeraGroup
from sera_jax.data import stored
from sera_jax.data.stored import chosen_from, flipped, joined
from sera_jax.loops.brake import brake
from sera_jax.loops.log import write_round
from sera_jax.loops.review import bootstrap, bootstrap_phases, review
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sera_study import (
    Round,
    SeraStudy,
    pool_logps,
    save_pairs,
    train_round,
    updates_per_round,
    with_reference,
)


def sera(study: SeraStudy, arm: str, settings: SeraGroup) -> tuple[Policy, list[dict[str, Any]]]:
    """Run the rounds of one arm by its settings; returns its last policy and the facts of every round.

    Raises:
        ValueError: a round is left without any pair.
    """
    reviews = _reviews(settings)
    reference = pool_logps(study, study.sft)
    pool = stored.with_reference(study.pool, reference)
    policies, facts = [study.sft], []

    for round_ in range(1, settings.rounds + 1):
        kept, fresh, record = pool, [], {}
        place = Round(arm, round_, study.own_loss)
        if round_ > 1 and reviews:
            chosen, margins, record = review(study, settings, pool, policies, round_)
            if ended := brake(study, settings, policies, facts, record):
                return ended, facts
            fresh, found = bootstrap(study, settings, policies, round_)
            record |= found
            if ended := brake(study, settings, policies, facts, record):
                return ended, facts
            save_pairs(study, f"{arm}/pairs{round_}", chosen, margins, fresh)
            kept = chosen_from(pool, chosen[irm.order(margins[chosen], settings.curriculum)])
        ordered = kept is not pool and settings.curriculum != "none"
        pairs = irm.spread(kept, fresh) if ordered else joined(kept, fresh)
        pairs = with_reference(study, settings, policies, pairs, place)
        _refuse_nothing(pairs, settings, arm, round_)

        policies.append(train_round(study, settings, policies[-1], pairs, place, ordered=ordered))

        record |= {
            "arm": arm,
            "round": round_,
            "kept": len(kept),
            "added": sum(len(pair.pairs) for pair in fresh),
            "updates": updates_per_round(study),
            **study.evaluate(policies[-1], round_),
        }
        if kept and flipped(pool).any():  # without label noise, nobody knows which labels are wrong
            record["flipped_fraction_kept"] = float(np.mean(flipped(kept)))
        facts.append(record)
        write_round(study.run, {"iteration": round_, **record}, round_ * updates_per_round(study))
    return policies[-1], facts


def _reviews(settings: SeraGroup) -> bool:
    return settings.selection != "none" or settings.bootstrap_fraction > 0 or settings.curriculum != "none"


def phases(
    arm: str, settings: SeraGroup, *, bootstraps: bool, uses_reference: bool, own_loss: bool
) -> tuple[list[str], list[str]]:
    """The phases of an arm without those of evaluation, and the policies that are evaluated; all that there may be,
    since nobody knows before whether `brake` ends the rounds.

    Args:
        bootstraps: pairs are to be added and there are prompts for them. uses_reference: the loss does. own_loss: as in
            `SeraStudy`.
    """
    names, policies = ["sft/pool"], ["sft"]
    for round_ in (Round(arm, number, own_loss) for number in range(1, settings.rounds + 1)):
        later = round_.number > 1
        if later and _reviews(settings):
            names += [f"{policy}/pool" for policy in policies[-2:]]
            if bootstraps:
                names += bootstrap_phases(settings, policies, round_.number, uses_reference=uses_reference)
            names.append(f"{arm}/pairs{round_.number}")
        if later and settings.reference == "previous" and uses_reference:
            names.append(round_.reference_phase)
        names.append(round_.name)
        policies.append(round_.name)
    return names, policies[1:]


def _refuse_nothing(pairs: Sequence[Any], settings: SeraGroup, arm: str, round_: int) -> None:
    if not pairs:
        raise ValueError(
            f"{arm}, round {round_}: no pair is left to train on (selection={settings.selection!r}, "
            f"threshold={settings.threshold}, keep_fraction={settings.keep_fraction}, "
            f"min_margin={settings.min_margin}); keep more in config.sera, under another --config.workdir"
        )
