"""What arms cost, counted in one way: tokens times passes through a model, whatever the machine.

A forward pass of a token counts 1, so sampling one and scoring one count 1 each; a backward pass counts 2. A prompt
counts with its answers as it lies in a row with them: once, where they share it.

Every phase is noted whether it is worked out or found on disk, from what it was given and what it left, so that a run
that was stopped has the same costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sera_jax.data.items import Item, lengths_of
from sera_jax.data.packing import Layout
from sera_jax.training.ppo_steps import TRAIN_PASSES

KINDS = ("training", "sampling", "scoring")
Cost = Mapping[str, float]  # by kind


class Ledger:
    """The costs of phases, by account: a phase belongs to the innermost account that is open when it is asked for."""

    def __init__(self) -> None:
        self._open: list[dict[str, Cost]] = [{}]

    def note(self, phase: str, cost: Cost) -> None:
        """What a phase cost; once, however often it is asked for."""
        self._open[-1][phase] = cost

    def of(self, *phases: str) -> list[Cost]:
        """What these phases of the innermost account cost, those that were noted."""
        return [cost for phase, cost in self._open[-1].items() if phase in phases]

    @contextlib.contextmanager
    def account(self) -> Iterator[dict[str, Cost]]:
        """What is noted meanwhile, by phase."""
        self._open.append({})
        try:
            yield self._open[-1]
        finally:
            self._open.pop()


def facts(costs: Iterable[Cost]) -> dict[str, float]:
    """`cost/passes_tokens` and its parts; nothing where nothing was noted."""
    costs = list(costs)
    parts = {f"cost/{kind}": float(sum(cost.get(kind, 0) for cost in costs)) for kind in KINDS}
    return {"cost/passes_tokens": sum(parts.values()), **parts} if costs else {}


def laid(items: Sequence[Item], layout: Layout) -> int:
    """Tokens of items in rows, without padding."""
    return int(lengths_of(items).laid(layout.share_prompt).sum())


def of_lines(lines: Iterable[Mapping[str, Any]]) -> Cost:
    """Of a training's lines in the log: those of updates say `num_tokens`, those of PPO `cost/...`."""
    total = dict.fromkeys(KINDS, 0.0)
    for line in lines:
        total["training"] += TRAIN_PASSES * line.get("num_tokens", 0)
        for kind in KINDS:
            total[kind] += line.get(f"cost/{kind}", 0)
    return total
