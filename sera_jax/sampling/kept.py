"""Answers as a phase keeps them, without log-probs: rows of its samples.jsonl, and arrays of a piece of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sera_jax.sampling.params import Sample


def as_row(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "sample": sample.sample,
        "finished": sample.finished,
        "tokens": sample.tokens.tolist(),
    }


def of_row(row: Mapping[str, Any]) -> Sample:
    return _sample(row["prompt"], row["sample"], np.asarray(row["tokens"], np.int32), row["finished"])


def as_arrays(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Rows of arrays, which may be laid one after the other with those of other samples."""
    return {
        "place": np.array([(s.prompt, s.sample) for s in samples], np.int32).reshape(-1, 2),
        "finished": np.array([s.finished for s in samples], bool),
        "length": np.array([len(s.tokens) for s in samples], np.int32),
        "tokens": np.concatenate([np.zeros(0, np.int32), *(s.tokens for s in samples)]),
    }


def of_arrays(arrays: Mapping[str, np.ndarray]) -> list[Sample]:
    """The samples of `as_arrays`; none of {}."""
    if not arrays:
        return []
    tokens = np.split(arrays["tokens"], np.cumsum(arrays["length"])[:-1])
    rows = zip(arrays["place"].tolist(), tokens, arrays["finished"].tolist(), strict=True)
    return [_sample(prompt, sample, own, finished) for (prompt, sample), own, finished in rows]


def _sample(prompt: int, sample: int, tokens: np.ndarray, finished: bool) -> Sample:
    return Sample(prompt, sample, tokens, np.zeros(0, np.float32), finished)
