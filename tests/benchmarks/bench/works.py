"""What is timed: one definition of every piece of work, of its inputs and of its goal, which all workers read.

No jax and no torch here: a worker has one of them.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

SHAPE = dict(  # of W1 to W5: a Llama of random weights, float32, untied
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    rope_theta=1e6,  # Tunix 0.1.7's Llama turns by this base whatever its config says
)
MODEL, REFERENCE = "model", "reference"  # folders of the inputs, in Hugging Face's format
SMOLLM2 = "SERA_JAX_SMOLLM2"  # names the folder of SmolLM2-135M-Instruct
SHARED = "SERA_JAX_SHARED_DATA"  # names the folder of real data


@dataclasses.dataclass(frozen=True)
class Bench:
    """A row of the table.

    Attributes:
        what: in words. goal: of the ratio to the best peer; stretch: a further one.
        unit: `tokens/s`, higher is better, a prompt counted once per response; or `s`, lower is better.
        needs: environment variables without which it is left out.
    """

    what: str
    goal: float
    stretch: float | None = None
    unit: str = "tokens/s"
    needs: tuple[str, ...] = ()


BENCHES = {
    "W1": Bench("DPO steps of 8 pairs, prompt 64, responses of 48 to 192 tokens, reference in the step", 2.2, 2.5),
    "W1c": Bench("the same with cached reference log-probs", 2.0, 2.5),
    "W2": Bench("scoring of 256 pairs, policy and reference", 2.0),
    "W3": Bench("sampling, 64 prompts of 64 tokens, 128 new tokens each, top-p 1", 2.2),
    "W3p": Bench("the same with top-p 0.9", 3.3),
    "W4": Bench(
        "a PPO iteration, 16 prompts of 64 tokens, 64 new tokens each, one epoch, one minibatch", 1.5, 2.0, "s"
    ),
    "W5": Bench("DPO on 256 real HH pairs, tokens modulo the vocabulary", 5.0, None, "s", (SHARED,)),
    "W6": Bench("a DPO step of 16 real pairs with SmolLM2-135M, cached reference", 4.0, None, "s", (SHARED, SMOLLM2)),
}


class Work(Protocol):
    """One piece of work of one worker, its model loaded."""

    def check(self) -> list[float]:
        """Numbers that all workers must agree on; does what compiles, too."""
        ...

    def round(self) -> dict[str, float]:
        """Do it once: tokens, a prompt once per response; `repeats` where it is a mean of several; and, of our own
        side, `flops`, of the matmuls that real tokens need."""
        ...


@dataclasses.dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and its two responses."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def tokens(self) -> int:
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


BATCH, STEPS, PAIRS = 8, 4, 256  # pairs of an update of W1, updates of a round, pairs that are scored
SHORTEST, LONGEST = 48, 192  # tokens of their responses
CHECKED = 8  # pairs whose log-probs are compared
STOP_ID = 2  # ends an answer of W3 and W4: among 8192 tokens about as likely as any, so one in 128 or so ends early
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 64, 128  # of W3
PPO_PROMPTS, PPO_NEW_TOKENS, PPO_ROW = 16, 64, 128  # of W4; its prompts have PROMPT_TOKENS, a row is ours alone
REAL_BATCH = 16  # of W5 and W6
REAL_ROW = 1536  # no pair takes more tokens, its prompt counted twice
TEMPERATURE = 0.7
RANDOM_A_TOKEN, SMOLLM2_A_TOKEN = -math.log(SHAPE["vocab_size"]), -1.6  # log-prob of a token: random weights, SmolLM2's


def random_pairs(count: int = PAIRS, seed: int = 0) -> list[Pair]:
    """Of W1 and W2."""
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(3, SHAPE["vocab_size"], length).astype(np.int32)

    return [
        Pair(tokens(64), tokens(rng.integers(SHORTEST, LONGEST + 1)), tokens(rng.integers(SHORTEST, LONGEST + 1)))
        for _ in range(count)
    ]


def padded(answers: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and what of them is an answer, i32[n, LONGEST] both: for peers that compile for one shape."""
    ids, mask = np.zeros((2, len(answers), LONGEST), np.int32)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)], mask[row, : len(answer)] = answer, 1
    return ids, mask


def reference_logps(pairs: list[Pair], a_token: float = RANDOM_A_TOKEN) -> np.ndarray:
    """f32[n, 2], made up: what a cache would hold, for a step that does not ask how it was made.

    Near those of the policy: far from them some gradients are so small (denormal) that torch, on some processors,
    multiplies by them several times slower; XLA takes them for 0.
    """
    lengths = np.array([(len(pair.chosen), len(pair.rejected)) for pair in pairs])
    return (a_token * lengths + np.random.default_rng(7).normal(0, 5, lengths.shape)).astype(np.float32)


def random_prompts(count: int, seed: int = 3) -> list[np.ndarray]:
    """Of W3 and W4."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, SHAPE["vocab_size"], PROMPT_TOKENS).astype(np.int32) for _ in range(count)]


def dpo_round(
    at: int, pairs: list[Pair], logps: np.ndarray | None, update: Callable[[list[Pair], np.ndarray | None], Any]
) -> dict[str, float]:
    """A round of W1 or W1c from update `at` on: `update` takes pairs with their reference log-probs f32[n, 2], where
    they are cached, and gives the loss."""
    tokens = 0
    for number in range(at, at + STEPS):
        start = number * BATCH % len(pairs)
        these = slice(start, start + BATCH)
        assert np.isfinite(update(pairs[these], None if logps is None else logps[these]))
        tokens += sum(pair.tokens for pair in pairs[these])
    return {"tokens": tokens, "repeats": STEPS}


def hh_pairs() -> list[Pair]:
    """Of W5: rejection-sampled pairs after their transcript, ids modulo the vocabulary."""
    import tokenizers

    folder = pathlib.Path(os.environ[SHARED])
    with gzip.open(folder / "tokenizers" / "mistral_7b_v01_tokenizer.json.gz", "rt", encoding="utf-8") as file:
        tokenizer = tokenizers.Tokenizer.from_str(file.read())

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32) % SHAPE["vocab_size"]

    def pair(row: dict[str, Any]) -> Pair:
        return Pair(*(ids(row[side]) for side in ("prompt", "chosen", "rejected")))

    return _fitting(map(pair, _rows(folder / "preference" / "hh_helpful_rejection_sampled_test.jsonl.gz")))[:PAIRS]


def polite_pairs() -> list[Pair]:
    """Of W6: polite pairs with the model's own chat template."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(os.environ[SMOLLM2])

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def pair(row: dict[str, Any]) -> Pair:
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return Pair(ids(prompt), *(ids(row[side] + tokenizer.eos_token) for side in ("chosen", "rejected")))

    return _fitting(map(pair, _rows(pathlib.Path(os.environ[SHARED]) / "preference" / "rasbt_polite_pairs.jsonl.gz")))


def _rows(file: pathlib.Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _fitting(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs that fit a row of ours, which is the same work for all."""
    return [pair for pair in pairs if pair.tokens <= REAL_ROW and len(pair.chosen) and len(pair.rejected)]
