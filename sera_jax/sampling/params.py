"""What a caller asks of the sampler and what comes back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sera_jax.data.items import Item, stable_id


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a sample ends. Hashable: the compiled decoder is made for it.

    Attributes:
        temperature: divides the logits; 0 is greedy (argmax, no random draw). Tiny ones, too, draw the likeliest token
            (one of them where several tie), huge ones any: below 1e-30 and above 1e30 all are alike.
        top_p: keep the smallest set of most likely tokens whose mass reaches this share, in (0, 1]; 1 keeps all. The
            most likely one is always kept.
        top_k: keep the k most likely tokens; 0 keeps all. Applied before `top_p`, as the users' present tools do.
            Both filters keep every token that ties with the last one kept.
        max_new_tokens: a sample without a stop token ends here, with `finished=False`.
        min_new_tokens: stop tokens cannot be chosen before this many tokens stand.
        stop_ids: a sample ends with (and includes) the first of these; at least one, usually EOS.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_ids", tuple(int(i) for i in self.stop_ids))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be a finite number >= 0; 0 is greedy decoding")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; 1 switches it off")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be >= 0; 0 switches it off")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must lie between 0 and max_new_tokens={self.max_new_tokens}"
            )
        if not self.stop_ids or min(self.stop_ids) < 0:
            raise ValueError(f"stop_ids={self.stop_ids} must name at least one token id >= 0; pass the tokenizer's EOS")


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is drawn: `num_samples` answers to each prompt, each by the random key of (seed, round, prompt id, sample).

    Attributes:
        prompts: i32[P] each, P >= 1.
        ids: one integer in [0, 2**64) for each prompt.
        drawn: answers that an earlier call has drawn; they are not drawn again, and come back among the others.
    """

    prompts: Sequence[np.ndarray]
    ids: Sequence[int]
    num_samples: int = 1
    seed: int = 0
    round: int = 0
    drawn: Sequence[Sample] = ()

    @classmethod
    def of_items(
        cls, items: Sequence[Item], num_samples: int, *, seed: int, round: int, drawn: Sequence[Sample] = ()
    ) -> Draws:
        """Of the items' prompts, by the ids of their records."""
        ids = [stable_id(item.id) for item in items]
        return cls([item.prompt for item in items], ids, num_samples, seed, round, drawn)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer to one prompt.

    Attributes:
        prompt: index into the prompts that `generate` was given.
        sample: 0 .. num_samples - 1.
        tokens: i32[n], n >= 1; the last one is a stop id iff `finished`.
        logps: f32[n] the policy's log-probabilities of `tokens` at temperature 1 and without filters, so that they
            compare with the scorer's whatever the tokens were drawn from. Empty in answers that `Runtime.sample` reads
            back from its phase, which keeps none: `Runtime.score` has the policy's.
        finished: a stop id was chosen; False when max_new_tokens ended the sample.
    """

    prompt: int
    sample: int
    tokens: np.ndarray
    logps: np.ndarray
    finished: bool
