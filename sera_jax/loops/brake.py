"""What ends the rounds of SeRA early: signs that a policy runs away, each with a limit, off by default (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sera_jax.config import SeraGroup
from sera_jax.loops.log import write_round
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sera_study import SeraStudy, updates_per_round

# A limit of `sera` -> the fact that it is of, its sign (-1: the fact is to stay above minus the limit), and in words.
LIMITS = {
    "stop_margin_std": ("irm/std", 1, "the margins' standard deviation is {:.2f} nats"),
    "stop_chosen_logratio": ("irm/chosen_logratio", -1, "the chosen answers' mean log-ratio is {:.2f} nats"),
    "stop_kl": ("bootstrap/kl_to_sft", 1, "the candidates' KL to the SFT model is {:.2f} nats"),
    "stop_unsupported": ("bootstrap/unsupported_fraction", 1, "the share of candidates below support is {:.3f}"),
}


def brake(
    study: SeraStudy,
    settings: SeraGroup,
    policies: Sequence[Policy],
    facts: Sequence[dict[str, Any]],
    found: dict[str, Any],
) -> Policy | None:
    """The policy that an arm ends with where a fact is beyond its limit; None where it may go on.

    It is that of the round with the highest held-out accuracy, the later of equals, which is said, and noted in the
    facts of that round. What was found, which no round followed, is a line of the log.

    Args:
        policies: the SFT model, and that of each finished round. facts: of each finished round.
        found: by the review of the offline pairs, and by the bootstrapping where that is done.
    """
    beyond = [
        f"{words.format(found[fact])} (config.sera.{field}={limit})"
        for field, (fact, sign, words) in LIMITS.items()
        if (limit := getattr(settings, field)) is not None and fact in found and sign * found[fact] > limit
    ]
    if not beyond:
        return None
    arm, round_ = facts[0]["arm"], len(facts) + 1
    best = max(facts, key=lambda fact: (fact.get("heldout_accuracy", 0.0), fact["round"]))
    best["kept_as_result"] = True
    step = len(facts) * updates_per_round(study)
    write_round(study.run, {"arm": arm, "round": round_, **found}, step, phase="review")
    study.run.writer.announce(f"{arm}: no round {round_}: {', '.join(beyond)}; round {best['round']} is the result")
    return policies[best["round"]]
