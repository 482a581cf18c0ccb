"""What the packer packs: one prompt with its responses, as token ids."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

KEY_BYTES = 16  # of the digest of a prompt's tokens


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and one or more responses.

    Attributes:
        id: stable id of the record (unique in its pool).
        prompt: i32[P], P >= 1, exactly the tokens that generation is given.
        responses: i32[n_k] each, n_k >= 1; a complete response ends in EOS.
        content: the prompt's `content_key`, whatever the tokenizer and the limits made of it; "" where it is not known.
        openings: the `content_key`s of the shorter prompts that the prompt begins with, see `openings_of`.
    """

    id: str
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    content: str = ""
    openings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a row that the item fills when its responses share the prompt."""
        return len(self.prompt) + sum(len(r) for r in self.responses)


@dataclasses.dataclass(frozen=True)
class PairItem:
    """An item and the preference pairs among its responses.

    Attributes:
        item: the prompt and its responses.
        pairs: (chosen, rejected) indices into `item.responses`.
        ref_logp: f32[len(responses)] summed reference log-probs, or None before they are known.
        weight: weight of each of the pairs in the loss.
        flipped: the label-noise knob exchanged chosen and rejected.
        source: `offline` or `bootstrap`.
    """

    item: Item
    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    ref_logp: np.ndarray | None = None
    weight: float = 1.0
    flipped: bool = False
    source: str = "offline"


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of many items: prompt i64[n], how many responses each has i64[n], and those of all responses, i64[m]."""

    prompt: np.ndarray
    counts: np.ndarray
    responses: np.ndarray

    @property
    def scored(self) -> np.ndarray:
        """i64[n]: those of all responses of each item."""
        ends, sums = np.cumsum(self.counts), np.concatenate([np.zeros(1, np.int64), np.cumsum(self.responses)])
        return sums[ends] - sums[ends - self.counts]

    def laid(self, share_prompt: bool) -> np.ndarray:
        """i64[n]: tokens of a row that each item fills."""
        return self.scored + self.prompt * (1 if share_prompt else self.counts)


def lengths_of(items: Sequence[Item]) -> Lengths:
    """The tokens of items; of stored ones without making them."""
    if (known := getattr(items, "lengths", None)) is not None:
        return known()
    prompt = np.array([len(item.prompt) for item in items], np.int64)
    counts = np.array([len(item.responses) for item in items], np.int64)
    return Lengths(prompt, counts, np.array([len(r) for item in items for r in item.responses], np.int64))


def unique_prompts(items: Iterable[Item]) -> Sequence[Item]:
    """The prompts of the items, each once, without responses, in order."""
    if (known := getattr(items, "unique_prompts", None)) is not None:
        return known()
    seen: dict[bytes, Item] = {}
    for item in items:
        seen.setdefault(item.prompt.tobytes(), dataclasses.replace(item, responses=()))
    return list(seen.values())


def content_key(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """Hex digest of a prompt's normalised content: prompts that say the same have the same key.

    Text is one user message; turns without text do not count; runs of white space count as one space, and composed
    characters as the same characters decomposed.
    """
    turns = [("user", prompt)] if isinstance(prompt, str) else [(turn["role"], turn["content"]) for turn in prompt]
    said = [(role, " ".join(_composed(text).split())) for role, text in turns]
    return hashlib.sha256(json.dumps([turn for turn in said if turn[1]]).encode()).hexdigest()


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def openings_of(prompt: str | Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Keys of the prompts that a conversation begins with: up to each user turn, with and without system turns."""
    if isinstance(prompt, str) or (len(prompt) == 1 and prompt[0]["role"] == "user"):
        return ()  # which begins with nothing shorter
    turns = list(prompt)
    ends = [k + 1 for k, turn in enumerate(turns) if turn["role"] == "user"]
    begun = [turns[:end] for end in ends]
    begun += [[turn for turn in some if turn["role"] != "system"] for some in begun]
    keys, whole = dict.fromkeys(map(content_key, begun)), content_key(turns)
    return tuple(key for key in keys if key != whole)


def prompt_keys(item: Item) -> set[str | bytes]:
    """What a prompt is known by: two are the same where they share one, their content or what is left of it as tokens
    (of long prompts the same end may be left)."""
    tokens = prompt_key(item.prompt)
    return {tokens, item.content or tokens}


def prompt_key(tokens: np.ndarray) -> bytes:
    """A digest of a prompt's tokens, i32[P]."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, np.int32), digest_size=KEY_BYTES).digest()


def stable_id(text: str) -> int:
    """A 64-bit number for a record id, the same in every process. (Of a million ids, two share 32 bits about 116 times,
    and 64 bits practically never.)"""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def items_digest(items: Sequence[Item]) -> str:
    """Digest of ids and tokens; of what a score depends on."""
    if (known := getattr(items, "digest", None)) is not None:
        return known()
    total = hashlib.sha256()
    for item in items:
        total.update(item.id.encode() + b"\0")
        for part in (item.prompt, *item.responses):
            total.update(len(part).to_bytes(4, "little") + np.ascontiguousarray(part, np.int32).tobytes())
    return total.hexdigest()
