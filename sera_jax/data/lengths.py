"""Lengths in tokens before anything is cut: what they are, and how many are above a limit."""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np

from sera_jax.data.chat import Prompt
from sera_jax.data.loading import EncodesText

PERCENTILES = (10, 50, 90, 99)


def of(lengths: Sequence[int], limit: int) -> dict[str, float]:
    """`count`, the percentiles (lengths that occur), `max`, the `limit` and how many are `over` it; {} of none."""
    if not lengths:
        return {}
    values = np.asarray(lengths)
    shares = {f"p{p}": int(np.percentile(values, p, method="higher")) for p in PERCENTILES}
    over = int(np.sum(values > limit))
    return {"count": len(values), **shares, "max": int(values.max()), "limit": limit, "over": over}


@dataclasses.dataclass
class Measured:
    """A tokenizer that remembers how long the prompts and the answers are that it encodes.

    Attributes:
        prompts: lengths, without what was refused. sides: the same of answers: chosen and rejected, or one kind.
    """

    tokenizer: EncodesText
    prompts: list[int] = dataclasses.field(default_factory=list)
    sides: tuple[list[int], list[int]] = dataclasses.field(default_factory=lambda: ([], []))
    _side: int = 0  # that comes next: loading encodes the prompts of some rows, then one side of them, then the other

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode_prompts(
        self, prompts: Sequence[Prompt], refused: MutableMapping[int, str] | None = None
    ) -> list[np.ndarray]:
        found = self.tokenizer.encode_prompts(prompts, refused)
        self.prompts += filter(None, map(len, found))
        self._side = 0
        return found

    def encode_responses(self, *given: Any, **options: Any) -> list[np.ndarray]:
        found = self.tokenizer.encode_responses(*given, **options)
        self.sides[self._side].extend(filter(None, map(len, found)))
        self._side = 1
        return found

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self.tokenizer.encode_texts(texts)
        self.sides[0].extend(max(len(tokens) - 1, 0) for tokens in found)  # the first is the prompt
        return found

    def table(self, prompt: int, answer: int) -> dict[str, dict[str, float]]:
        """`of` the prompts and each kind of answer, where there are any, under the limits given."""
        first, second = self.sides
        named = {"chosen": first, "rejected": second} if second else {"response": first}
        found = {"prompt": of(self.prompts, prompt)} | {name: of(side, answer) for name, side in named.items()}
        return {name: facts for name, facts in found.items() if facts}
