"""What the loops say of a round: its facts as a line of the log, and, where it came to nothing, a warning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sera_jax.loops.restartable import Span
from sera_jax.loops.runtime import Runtime
from sera_jax.losses.preference import ResolvedLoss

# Margins below these in every line are of a policy that stayed where it was: nats (a token, for a loss that averages).
STILL_MARGIN = {"sum": 1e-2, "mean": 1e-3}
# Lines are of the policy before an update, which the first may leave as it is (the rate warms up from 0).
LEAST_UPDATES = 3


def write_round(run: Runtime, facts: Mapping[str, Any], global_step: int, phase: str = "round") -> None:
    """The numbers among the facts of a round (or, `phase` says it, of a part of one), as the line of its arm after
    `global_step` updates."""
    arm, round_ = facts["arm"], facts["round"]
    numbers = {k: v for k, v in facts.items() if isinstance(v, int | float) and k not in ("arm", "round")}
    run.writer.write(phase=phase, arm=arm, round=round_, step=1, metrics=numbers, global_step=global_step)


def warn_of_still_margins(run: Runtime, span: Span, loss: ResolvedLoss, learning_rate: float) -> None:
    """Says so where training left the policy at its reference: no line of the span has a margin."""
    lines = run.writer.lines(span.key) if loss.uses_reference else []
    margins = [abs(line["rewards/margins"] or 0) / loss.scale for line in lines]
    updates = max((line["step"] for line in lines), default=0)
    if updates >= LEAST_UPDATES and max(margins) < STILL_MARGIN[loss.logp]:
        run.writer.announce(
            f"warning: {updates} updates at {learning_rate:g}: the margins stayed at 0 (the mean was "
            f"never above {max(margins):.1g} nats), so nothing was learnt; raise config.train.learning_rate or "
            "config.train.max_steps"
        )
