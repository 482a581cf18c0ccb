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
from sera_jax.data import stored
from sera_jax.data.items import Item, PairItem, content_key

T = TypeVar("T")


def split_heldout(entries: Sequence[T], fraction: float, seed: int) -> tuple[Sequence[T], Sequence[T]]:
    """(training, held-out): entries of one prompt stay together, whatever their order or company.

    A prompt is held out if its hash with the seed falls into the first `fraction` of all hashes, so the share is met in
    the mean only. Its content is hashed (`content_key`), so neither a tokenizer nor the prompt's form decides; of items
    whose content is not known, the tokens.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must be at least 0 and below 1, got {fraction}")
    keys = stored.content_texts(entries) or map(_prompt_bytes, entries)
    held = np.array([_uniform("heldout", seed, key) < fraction for key in keys], bool)
    return stored.chosen_from(entries, np.flatnonzero(~held)), stored.chosen_from(entries, np.flatnonzero(held))


def flip_labels(pairs: Sequence[PairItem], fraction: float, seed: int) -> Sequence[PairItem]:
    """Exchange chosen and rejected of exactly round(fraction * n) entries, marked `flipped`.

    Those with the smallest hash of (seed, id): the choice does not depend on the order, and a larger fraction flips
    the same ones and more.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"data.label_noise must lie between 0 and 1, got {fraction}")
    if not fraction:
        return pairs
    items = stored.items_of(pairs)
    drawn = np.array([_uniform("flip", seed, stored.id_of(items, i).encode()) for i in range(len(items))])
    flipped = np.zeros(len(pairs), bool)
    flipped[np.argsort(drawn, kind="stable")[: round(fraction * len(pairs))]] = True
    if isinstance(pairs, stored.Pairs):
        return pairs.flip(flipped)
    return [_flip(pair) if flips else pair for pair, flips in zip(pairs, flipped, strict=True)]


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
