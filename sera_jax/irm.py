"""Implicit reward margins: what SeRA does with them. Selection, pairing, ordering, and what is logged of them.

Everything here is numpy on the host: a pool has one number per pair, and what it decides is written to disk. Rewards
come from `ResolvedLoss.reward`, so every rule below works for any loss. A margin is the chosen reward minus the
rejected one, over beta (nats).

Ranks break ties by index, so the same margins always select the same pairs. In the summaries a quantity that is not
defined (a mean of nothing, a correlation with a constant) has no key.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from sera_jax.core import Stream, rng_for

Entry = TypeVar("Entry")
# Which draw of a round a random rule makes; the control arm draws both.
_SELECT_DRAW, _FILTER_DRAW = 0, 1
# Why candidates make no pair; the loader's names (data.reasons.BAD_REASONS) where it refuses the same in rows.
REFUSALS = ("empty_response", "truncated", "too_few", "identical_pair", "identical_after_strip", "tie")


def margin(reward_w: np.ndarray, reward_l: np.ndarray, *, beta: float = 1.0) -> np.ndarray:
    """Implicit reward margin f32[n]: (reward of the chosen - reward of the rejected) / beta.

    Args:
        reward_w, reward_l: f32[n] implicit rewards.
        beta: what the rewards were scaled with (`ResolvedLoss.scale`).

    Source: Ko et al. 2024 (SeRA), the definition of the IRM.
    """
    return ((np.asarray(reward_w, np.float32) - np.asarray(reward_l, np.float32)) / np.float32(beta)).astype(np.float32)


def ensemble(current: np.ndarray, previous: np.ndarray | None, gamma: float) -> np.ndarray:
    """(1 - gamma) * current + gamma * previous, f32[n]; of rewards or, being linear, of margins.

    Args:
        current: f32[n] under the newest policy.
        previous: f32[n] under the policy of the round before; None where there is none, and current is returned.
        gamma: weight of the previous policy, in [0, 1].

    Source: Ko et al. 2024 (SeRA), eq. 7; both policies are scored against the same fixed reference.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"ensemble weight gamma is {gamma!r}; it must be in [0, 1]")
    current = np.asarray(current, np.float32)
    if previous is None:
        return current
    previous = np.asarray(previous, np.float32)
    if previous.shape != current.shape:
        raise ValueError(f"rewards of two rounds must be of the same responses; got {current.shape}, {previous.shape}")
    return np.float32(1.0 - gamma) * current + np.float32(gamma) * previous


def length_controlled(rewards: np.ndarray, lengths: np.ndarray, alpha: float) -> np.ndarray:
    """reward - alpha * length, f32[n]; alpha in units of reward per token.

    Source: Chen et al. 2024 (DICE), with tokens where DICE counts characters.
    """
    return np.asarray(rewards, np.float32) - np.float32(alpha) * np.asarray(lengths, np.float32)


def _checked_margins(margins: np.ndarray) -> np.ndarray:
    margins = np.asarray(margins, np.float32)
    assert margins.ndim == 1, f"one number per pair, not shape {margins.shape}"
    bad = np.flatnonzero(~np.isfinite(margins))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(margins)} margins are not finite (first: pair {bad[0]} is {margins[bad[0]]}); "
            "a policy that scores nan has diverged: go back to an earlier checkpoint or lower the learning rate"
        )
    return margins


def _ascending(margins: np.ndarray) -> np.ndarray:
    return np.argsort(margins, kind="stable")


def _descending(margins: np.ndarray) -> np.ndarray:
    return np.argsort(-margins, kind="stable")


def keep_count(fraction: float, n: int) -> int:
    """round(fraction * n): how many of n pairs a fraction keeps; fraction in [0, 1]."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"the fraction of pairs to keep is {fraction!r}; it must be in [0, 1]")
    return round(fraction * n)


def _top(margins: np.ndarray, *, fraction: float) -> np.ndarray:
    return _descending(margins)[: keep_count(fraction, len(margins))]


def _bottom(margins: np.ndarray, *, fraction: float) -> np.ndarray:
    return _ascending(margins)[: keep_count(fraction, len(margins))]


def _middle(margins: np.ndarray, *, fraction: float | None, band: tuple[float, float] | None) -> np.ndarray:
    n = len(margins)
    if band is None:
        if fraction is None:
            raise ValueError("selection rule 'middle' needs a fraction (a centred band) or a band of ranks (low, high)")
        count = keep_count(fraction, n)
        start = (n - count) // 2
        return _ascending(margins)[start : start + count]
    low, high = band
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"band of ranks is {band!r}; it must be (low, high) with 0 <= low < high <= 1, 0 = smallest")
    return _ascending(margins)[round(low * n) : round(high * n)]


def _threshold(margins: np.ndarray, *, threshold: float) -> np.ndarray:
    return np.flatnonzero(margins >= np.float32(threshold))


def _random(margins: np.ndarray, *, fraction: float, rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(len(margins))[: keep_count(fraction, len(margins))]


def _none(margins: np.ndarray) -> np.ndarray:
    return np.arange(len(margins))


# rule -> (function, the arguments of `select` it cannot do without, those it also reads)
SELECT: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...], tuple[str, ...]]] = {
    "top": (_top, ("fraction",), ()),
    "bottom": (_bottom, ("fraction",), ()),
    "middle": (_middle, (), ("fraction", "band")),
    "threshold": (_threshold, ("threshold",), ()),
    "random": (_random, ("fraction",), ("rng",)),
    "none": (_none, (), ()),
}


def select(
    margins: np.ndarray,
    rule: str,
    *,
    fraction: float | None = None,
    threshold: float | None = None,
    band: tuple[float, float] | None = None,
    seed: int = 0,
    round_index: int = 0,
) -> np.ndarray:
    """Indices of the pairs to keep, i64[k], ascending.

    Args:
        margins: f32[n].
        rule: a name in `SELECT`. `top` keeps the largest margins (SeRA), `bottom` the smallest, `middle` a band of
            ranks, `threshold` the margins of at least `threshold`, `random` any (the control arm), `none` all.
        fraction: share of pairs to keep; exactly round(fraction * n) are kept.
        threshold: nats; for `threshold`.
        band: (low, high) shares of the ranks from the smallest margin up, for `middle` instead of `fraction`.
        seed, round_index: name the draw of `random`.

    Raises:
        ValueError: an unknown rule, an argument that the rule needs and was not given, a margin that is not finite.
    """
    if rule not in SELECT:
        raise ValueError(f"unknown selection rule {rule!r}; choices: {', '.join(SELECT)}")
    margins = _checked_margins(margins)
    available = {"fraction": fraction, "threshold": threshold, "band": band}
    fn, needs, reads = SELECT[rule]
    missing = [name for name in needs if available[name] is None]
    if missing:
        raise ValueError(f"selection rule {rule!r} needs {missing[0]}, which is unset")
    available["rng"] = rng_for(seed, Stream.SELECT, round_index, _SELECT_DRAW)
    kept = fn(margins, **{name: available[name] for name in needs + reads})
    return np.sort(kept).astype(np.int64)


def filter_bootstrapped(
    margins: np.ndarray, *, count: int, rule: str = "top", seed: int = 0, round_index: int = 0
) -> np.ndarray:
    """Indices of the bootstrapped pairs to train on, i64[k], ascending, k <= count; k may be 0.

    Args:
        margins: f32[n] of the self-made pairs.
        count: at most so many are kept.
        rule: `top` keeps the largest margins; `random` keeps as many as `top` would, but any of the n (control arm).
        seed, round_index: name the draw of `random`.
    """
    if rule not in ("top", "random"):
        raise ValueError(f"unknown filter of bootstrapped pairs {rule!r}; choices: top, random")
    if count < 0:
        raise ValueError(f"the number of bootstrapped pairs to keep is {count}; it must be >= 0")
    margins = _checked_margins(margins)
    kept = _descending(margins)[:count]
    if rule == "random":
        kept = rng_for(seed, Stream.SELECT, round_index, _FILTER_DRAW).permutation(len(margins))[: len(kept)]
    return np.sort(kept).astype(np.int64)


ORDER: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "easy_to_hard": _descending,
    "hard_to_easy": _ascending,
    "none": _none,
}


def order(margins: np.ndarray, rule: str) -> np.ndarray:
    """Curriculum: the order in which to train on the pairs, a permutation i64[n].

    Args:
        margins: f32[n]; a pair is the easier the larger its margin.
        rule: a name in `ORDER`.

    Source: Pattnaik et al. 2024 (Curry-DPO).
    """
    if rule not in ORDER:
        raise ValueError(f"unknown curriculum {rule!r}; choices: {', '.join(ORDER)}")
    return ORDER[rule](_checked_margins(margins)).astype(np.int64)


def spread(first: Sequence[Entry], second: Sequence[Entry]) -> list[Entry]:
    """Both in their own order, each spread evenly over the whole; `first` goes first where they meet."""
    places = [(i + 0.5) / len(part) for part in (first, second) for i in range(len(part))]
    both = [*first, *second]
    return [both[i] for i in np.argsort(places, kind="stable")]


@dataclasses.dataclass(frozen=True)
class CandidatePair:
    """Chosen and rejected index into a prompt's candidates, and by how much reward the chosen one is ahead."""

    chosen: int
    rejected: int
    margin: float


@dataclasses.dataclass(frozen=True)
class Pairing:
    """What became of a prompt's candidates.

    Attributes:
        pairs: the pairs, largest chosen reward first; with `best_worst` at most one.
        refused: reason (of `REFUSALS`) -> count. `empty_response` and `truncated` count candidates, `too_few` prompts
            of which fewer than two were left, the rest pairs. With `best_worst` every prompt is in exactly one of: a
            pair, `too_few`, a reason that counts pairs.
    """

    pairs: tuple[CandidatePair, ...]
    refused: Counter[str]


def pair_candidates(
    rewards: np.ndarray,
    tokens: Sequence[np.ndarray],
    *,
    mode: str = "best_worst",
    length_alpha: float = 0.0,
    finished: Sequence[bool] | None = None,
    stop_ids: Sequence[int] = (),
    texts: Sequence[str] | None = None,
) -> Pairing:
    """Make preference pairs of the N candidates of one prompt.

    Args:
        rewards: f32[N] implicit rewards (or scores; the margins come out in the same unit).
        tokens: N arrays of token ids.
        mode: `best_worst` (SeRA: highest against lowest reward) or `all` N (N - 1) / 2 pairs.
        length_alpha: reward taken off per token before ranking (see `length_controlled`).
        finished: whether each candidate ended by itself; those that did not are refused. None refuses none.
        stop_ids: a candidate that is nothing but one of these tokens counts as empty.
        texts: what the candidates say, control tokens left out. One that says nothing counts as empty, and two that say
            the same, up to the white space around it, make no pair. None: only tokens are compared.

    Raises:
        ValueError: fewer than two candidates, lengths that disagree, a reward that is not finite.
    """
    if mode not in ("best_worst", "all"):
        raise ValueError(f"unknown pairing {mode!r}; choices: best_worst, all")
    n = len(tokens)
    if n < 2 or np.shape(rewards) != (n,) or any(len(given) != n for given in (finished, texts) if given is not None):
        raise ValueError(f"a pair needs two or more candidates, each with a reward; got {n}, {np.shape(rewards)}")
    scores = length_controlled(rewards, np.array([len(t) for t in tokens]), length_alpha)
    refused: Counter[str] = Counter()
    usable = []
    for i, candidate in enumerate(tokens):
        says_nothing = texts is not None and not texts[i].strip()
        if len(candidate) == 0 or (len(candidate) == 1 and candidate[0] in stop_ids) or says_nothing:
            refused["empty_response"] += 1
        elif finished is not None and not finished[i]:
            refused["truncated"] += 1
        else:
            usable.append(i)
    if len(usable) < 2:
        refused["too_few"] += 1
        return Pairing((), refused)
    ranked: list[int] = [usable[i] for i in _descending(_checked_margins(scores[usable]))]
    wanted = [(ranked[0], ranked[-1])] if mode == "best_worst" else itertools.combinations(ranked, 2)
    pairs = []
    for chosen, rejected in wanted:
        ahead = float(scores[chosen]) - float(scores[rejected])
        # Identical first: equal tokens may differ in the last bits of their rewards.
        if np.array_equal(tokens[chosen], tokens[rejected]):
            refused["identical_pair"] += 1
        elif texts is not None and texts[chosen].strip() == texts[rejected].strip():
            refused["identical_after_strip"] += 1
        elif ahead <= 0.0:
            refused["tie"] += 1
        else:
            pairs.append(CandidatePair(chosen, rejected, ahead))
    return Pairing(tuple(pairs), refused)


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson correlation of a and b; None where either is constant or there are fewer than two."""
    if len(a) < 2 or np.all(a == a[0]) or np.all(b == b[0]):
        return None
    value = float(np.corrcoef(np.asarray(a, np.float64), np.asarray(b, np.float64))[0, 1])
    return value if math.isfinite(value) else None


def margin_summary(
    margins: np.ndarray, chosen_lengths: np.ndarray | None = None, rejected_lengths: np.ndarray | None = None
) -> dict[str, float]:
    """Metrics of a pool's margins, `irm/*`, and with lengths (tokens) also `length/*`.

    `irm/negative_fraction` is the share of pairs on which policy and label disagree.
    """
    margins = _checked_margins(margins).astype(np.float64)
    if not len(margins):
        return {}
    out = {"irm/mean": float(margins.mean()), "irm/std": float(margins.std())}
    out |= dict(zip(("irm/p10", "irm/p50", "irm/p90"), map(float, np.percentile(margins, (10, 50, 90)))))
    out["irm/negative_fraction"] = float(np.mean(margins < 0))
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen, rejected = np.asarray(chosen_lengths, np.float64), np.asarray(rejected_lengths, np.float64)
        for name, values in (("chosen", chosen), ("rejected", rejected), ("diff", chosen - rejected)):
            out[f"length/{name}"] = float(values.mean())
        corr = correlation(margins, chosen - rejected)
        if corr is not None:
            out["length/margin_corr"] = corr
    return out


def selection_summary(margins: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """`select/kept_fraction` and `select/threshold`, the smallest margin kept (nats)."""
    out = {"select/kept_fraction": len(kept) / len(margins)} if len(margins) else {}
    if len(kept):
        out["select/threshold"] = float(np.min(np.asarray(margins)[kept]))
    return out


def overlap(first: Sequence, second: Sequence) -> float | None:
    """Jaccard overlap of two sets of kept pairs (ids or indices), in [0, 1]; None where both are empty."""
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a | b else None


def ensemble_summary(current: np.ndarray, previous: np.ndarray | None, gamma: float) -> dict[str, float]:
    """`ensemble/weight_0` (newest policy), `ensemble/weight_1`, and `ensemble/disagreement`: the share of pairs whose
    margins under the two policies differ in sign."""
    if previous is None:
        return {"ensemble/weight_0": 1.0}
    out = {"ensemble/weight_0": 1.0 - gamma, "ensemble/weight_1": gamma}
    if len(current):
        out["ensemble/disagreement"] = float(np.mean(np.sign(current) != np.sign(previous)))
    return out


def bootstrap_summary(
    pairings: Sequence[Pairing], lengths: Sequence[Sequence[int]], finished: Sequence[Sequence[bool]] | None = None
) -> dict[str, float]:
    """Metrics of one round's self-made pairs over its prompts, before the margin filter: `bootstrap/*`.

    Args:
        pairings: one per prompt.
        lengths: tokens of every candidate of every prompt.
        finished: whether every candidate of every prompt ended by itself, for `bootstrap/eos_fraction`.

    `tie_fraction` counts ties and identical pairs among the pairs that were looked at; `refused_*` are the counts of
    `Pairing.refused`.
    """
    refused: Counter[str] = sum((p.refused for p in pairings), Counter())
    pairs = [(pair, lengths[i]) for i, pairing in enumerate(pairings) for pair in pairing.pairs]
    out = {"bootstrap/pairs": float(len(pairs))}
    out |= {f"bootstrap/refused_{reason}": float(count) for reason, count in sorted(refused.items())}
    ties = sum(refused[reason] for reason in ("tie", "identical_pair", "identical_after_strip"))
    if pairs:
        out["bootstrap/margin_mean"] = float(np.mean([pair.margin for pair, _ in pairs]))
        out["bootstrap/len_diff"] = float(np.mean([size[pair.chosen] - size[pair.rejected] for pair, size in pairs]))
    if pairs or ties:
        out["bootstrap/tie_fraction"] = ties / (len(pairs) + ties)
    flags = [flag for prompt in finished or () for flag in prompt]
    if flags:
        out["bootstrap/eos_fraction"] = float(np.mean(flags))
    return out
