"""What ends the rounds of SeRA early: the spread of the offline margins, which grows as a policy runs away (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sera_jax.config import SeraGroup
from sera_jax.loops.log import write_round
from sera_jax.loops.runtime import Policy
from sera_jax.loops.sera_study import SeraStudy, updates_per_round


def brake(
    study: SeraStudy,
    settings: SeraGroup,
    policies: Sequence[Policy],
    facts: Sequence[dict[str, Any]],
    review: dict[str, Any],
) -> Policy | None:
    """The policy that an arm ends with where a review finds too wide a spread; None where it may go on.

    It is that of the round with the highest held-out accuracy, the later of equals, which is said, and noted in the
    facts of that round. The review that no round followed is a line of the log.

    Args:
        policies: the SFT model, and that of each finished round. facts: of each finished round.
    """
    limit, spread = settings.stop_margin_std, review.get("irm/std", 0.0)
    if limit is None or spread <= limit:
        return None
    arm, round_ = facts[0]["arm"], len(facts) + 1
    best = max(facts, key=lambda fact: (fact.get("heldout_accuracy", 0.0), fact["round"]))
    best["kept_as_result"] = True
    step = len(facts) * updates_per_round(study)
    write_round(study.run, {"arm": arm, "round": round_, **review}, step, phase="review")
    study.run.writer.announce(
        f"{arm}: no round {round_}: the margins' standard deviation is {spread:.2f} nats "
        f"(config.sera.stop_margin_std={limit}); round {best['round']} is the result"
    )
    return policies[best["round"]]
