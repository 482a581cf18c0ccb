"""The answers of one policy to one prompt, and what is known of them: what is ranked, paired, paid and shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sera_jax.data.items import Item
from sera_jax.sampling.params import Sample


@dataclasses.dataclass(frozen=True)
class Candidates:
    """One prompt and the N answers that a policy sampled to it.

    Attributes:
        prompt: an item without responses.
        samples: the answers, in the order of their sample index.
        logp: f32[N] summed log-probs under the policy that judges them; None before they are scored.
        ref_logp: f32[N] the same under the reference (the SFT model; for a coherent reward, the base).
    """

    prompt: Item
    samples: tuple[Sample, ...]
    logp: np.ndarray | None = None
    ref_logp: np.ndarray | None = None

    @property
    def tokens(self) -> tuple[np.ndarray, ...]:
        """i32[n] each."""
        return tuple(sample.tokens for sample in self.samples)

    @property
    def lengths(self) -> np.ndarray:
        """i64[N]"""
        return np.array([len(sample.tokens) for sample in self.samples])

    @property
    def finished(self) -> np.ndarray:
        """bool[N]: the answer ended by itself."""
        return np.array([sample.finished for sample in self.samples], bool)

    def only(self, places: Sequence[int] | np.ndarray) -> Candidates:
        """Those of the answers, in this order."""
        logps = [None if values is None else values[places] for values in (self.logp, self.ref_logp)]
        return Candidates(self.prompt, tuple(self.samples[k] for k in places), *logps)

    @property
    def item(self) -> Item:
        """The prompt with the answers as its responses: what the packer packs."""
        return dataclasses.replace(self.prompt, responses=self.tokens)


def grouped(prompts: Sequence[Item], samples: Sequence[Sample]) -> list[Candidates]:
    """The samples of `generate` by prompt; every prompt has its Candidates, in order."""
    groups: list[list[Sample]] = [[] for _ in prompts]
    for sample in samples:
        groups[sample.prompt].append(sample)
    return [
        Candidates(dataclasses.replace(prompt, responses=()), tuple(sorted(group, key=lambda s: s.sample)))
        for prompt, group in zip(prompts, groups, strict=True)
    ]
