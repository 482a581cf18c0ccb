"""Which rows, prompts and labels: shares of a source, what is held out, label noise. By hashes, so reproducible."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from sera_jax.core import Stream, rng_for
from sera_jax.data.items import Item, PairItem, content_key

T = TypeVar("T")


def split_heldout(entries: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """(training, held-out): entries of one prompt stay together, whatever their order or company.

    A prompt is held out if its hash with the seed falls into the first `fraction` of all hashes, so the share is met in
    the mean only. Its content is hashed (`content_key`), so neither a tokenizer nor the prompt's form decides; of items
    whose content is not known, the tokens.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be at least 0 and below 1, got {fraction}")
    train, heldout = [], []
    for entry in entries:
        (heldout if _uniform("heldout", seed, _prompt_bytes(entry)) < fraction else train).append(entry)
    return train, heldout


def flip_labels(pairs: Sequence[PairItem], fraction: float, seed: int) -> list[PairItem]:
    """Exchange chosen and rejected of exactly round(fraction * n) entries, marked `flipped`.

    Those with the smallest hash of (seed, id): the choice does not depend on the order, and a larger fraction flips
    the same ones and more.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"data.label_noise must lie between 0 and 1, got {fraction}")
    ranks = sorted(range(len(pairs)), key=lambda i: (_uniform("flip", seed, pairs[i].item.id.encode()), i))
    flipped = set(ranks[: round(fraction * len(pairs))])
    return [_flip(pair) if index in flipped else pair for index, pair in enumerate(pairs)]


def weighted_rows(rows: int, weight: float, seed: int, spec: str) -> np.ndarray:
    """Sorted row indices of a source, each floor(weight) times and a share of them once more."""
    times = np.full(rows, int(weight))
    extra = round((weight - int(weight)) * rows)
    if weight < 1 and rows:
        extra = max(extra, 1)  # a source that was named is never left out by rounding
    stream = rng_for(seed, Stream.SPLIT, zlib.crc32(pathlib.PurePath(spec).name.encode()))
    times[stream.permutation(rows)[:extra]] += 1
    return np.repeat(np.arange(rows), times)


def _uniform(purpose: str, seed: int, key: bytes) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.sha256(f"{purpose}:{seed}:".encode() + key).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _prompt_bytes(entry: Any) -> bytes:
    entry = entry.item if isinstance(entry, PairItem) else entry
    if not isinstance(entry, Item):
        return content_key(entry.prompt).encode()
    return entry.content.encode() or np.ascontiguousarray(entry.prompt, "<i4").tobytes()


def _flip(pair: PairItem) -> PairItem:
    exchanged = tuple((rejected, chosen) for chosen, rejected in pair.pairs)
    return dataclasses.replace(pair, pairs=exchanged, flipped=not pair.flipped)
