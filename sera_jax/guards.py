"""Guard rails on pairs, each an option that is off by default, and what can be said of candidates without a
gold reward. Numpy on the host, as in `irm`, whose pairings they narrow; all are ours unless a source is named.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from sera_jax import irm
from sera_jax.core import Stream, rng_for

# Why a guard refuses: `unsupported` counts candidates, the others pairs.
REASONS = ("unsupported", "disagreement", "below_min_margin", "outside_band")
NGRAM = 3
EM_STEPS = 200
FIT = (
    "mixture/clean_share",
    *("mixture/weight_0", "mixture/weight_1", "mixture/mean_0", "mixture/mean_1", "mixture/std_0", "mixture/std_1"),
)
APART = 2.0  # of two means, in units of the root mean square of the standard deviations
LEAST_CLEAN = 0.5  # of labels that say anything
_REPLAY_DRAW = 4  # of a round; those before are of `irm` and `loops.review`


def among_supported(supported: np.ndarray, pair: Callable[[np.ndarray], irm.Pairing]) -> irm.Pairing:
    """The pairing of those candidates alone that the SFT model supports; the others are counted.

    Args:
        supported: bool[N].
        pair: from the indices of two or more candidates to their pairing, whose indices are places among these.
    """
    places = np.flatnonzero(supported)
    refused = Counter({"unsupported": len(supported) - len(places)}) if len(places) < len(supported) else Counter()
    if len(places) < 2:
        return irm.Pairing((), refused + Counter({"too_few": 1}))
    made = pair(places)
    pairs = tuple(irm.CandidatePair(int(places[p.chosen]), int(places[p.rejected]), p.margin) for p in made.pairs)
    return irm.Pairing(pairs, made.refused + refused)


def agreed(pairing: irm.Pairing, judges: Sequence[np.ndarray]) -> irm.Pairing:
    """The pairs whose chosen candidate no judge puts below the rejected one; the others are counted.

    Args:
        judges: f32[N] rewards of the same candidates.
    """
    kept = tuple(p for p in pairing.pairs if all(rewards[p.chosen] >= rewards[p.rejected] for rewards in judges))
    against = len(pairing.pairs) - len(kept)
    return dataclasses.replace(pairing, pairs=kept, refused=pairing.refused + Counter({"disagreement": against}))


def above(pairing: irm.Pairing, least: float | None) -> irm.Pairing:
    """The pairs of at least that margin, all where it is None; the others are counted."""
    kept = tuple(p for p in pairing.pairs if least is None or p.margin >= least)
    below = len(pairing.pairs) - len(kept)
    return dataclasses.replace(pairing, pairs=kept, refused=pairing.refused + Counter({"below_min_margin": below}))


def admitted(
    margins: np.ndarray, min_margin: float | None, band: tuple[float, float] | None
) -> tuple[np.ndarray, Counter[str]]:
    """Which pairs their margin lets through, bool[n], and how many it refuses, by reason.

    Args:
        margins: f32[n] of one round's pairs.
        min_margin: smaller ones are refused; None refuses none.
        band: (low, high) shares of all n ranks from the smallest margin up; ranks outside are refused. None refuses
            none.
    """
    enough = np.ones(len(margins), bool) if min_margin is None else margins >= np.float32(min_margin)
    inside = np.ones(len(margins), bool)
    if band is not None:
        inside[:] = False
        inside[irm.select(margins, "middle", band=band)] = True
    refused = Counter({"below_min_margin": int(np.sum(~enough)), "outside_band": int(np.sum(enough & ~inside))})
    return enough & inside, +refused


def replayed(kept: np.ndarray, n: int, *, fraction: float, seed: int = 0, round_index: int = 2) -> np.ndarray:
    """Indices of pairs that selection left out and that are trained on all the same, i64[k], ascending.

    Any round(fraction / 2^(round_index - 2) * left out) of them: the share halves from round to round.

    Args:
        kept: indices that were selected, of 0 .. n - 1.
        fraction: share of round 2, in [0, 1].
        seed, round_index: name the draw; round_index is 2 or more.
    """
    left_out = np.setdiff1d(np.arange(n), kept)
    count = irm.keep_count(fraction / 2 ** (round_index - 2), len(left_out))
    drawn = rng_for(seed, Stream.SELECT, round_index, _REPLAY_DRAW).permutation(left_out)[:count]
    return np.sort(drawn).astype(np.int64)


def clean_share(margins: np.ndarray) -> tuple[float, dict[str, float]]:
    """Share of the pairs whose label the policy has come to agree with, and the fit that it is read off.

    It is the weight of the upper of two normal distributions fitted to the margins f32[n], but never below
    `LEAST_CLEAN`; and 1 where these are not two kinds of labels: where a single one fits as well by BIC, where the
    lower mean is not negative or the upper not positive, or where they are not clearly apart, as two that follow a
    skewed shape are (`APART`); also where there are few pairs, which are not fitted.

    Returns:
        The share; and `mixture/{weight, mean, std}_{0, 1}`, the lower first, and `mixture/clean_share`.

    Source: Arazo et al. 2019 fit two components to losses, to find noisy labels; to margins, by EM, is ours. The
    distance is Ashman et al.'s (1994).
    """
    x = np.asarray(margins, np.float64)
    if len(x) < 10 or np.ptp(x) == 0:
        return 1.0, {}
    floor = 1e-3 * x.var()  # a component may not shrink to a point
    weight, mean, var = np.array([0.5, 0.5]), np.quantile(x, (0.1, 0.9)), np.full(2, x.var())
    for _ in range(EM_STEPS):
        logs = _log_density(x, mean, var) + np.log(weight)
        share = np.exp(logs - np.logaddexp(*logs.T)[:, None])
        count = np.maximum(share.sum(axis=0), 1e-9)
        weight, mean = count / count.sum(), share.T @ x / count
        var = np.maximum((share * (x[:, None] - mean) ** 2).sum(axis=0) / count, floor)
    two = np.logaddexp(*(_log_density(x, mean, var) + np.log(weight)).T).sum()
    one = _log_density(x, np.array([x.mean()]), np.array([x.var()])).sum()
    extra = 3 * np.log(len(x)) / 2  # five parameters against two
    order = np.argsort(mean)
    weight, mean, std = weight[order], mean[order], np.sqrt(var[order])
    apart = mean[1] - mean[0] > APART * np.sqrt(var.mean())
    share = max(float(weight[1]), LEAST_CLEAN) if two - one > extra and mean[0] < 0 < mean[1] and apart else 1.0
    return share, dict(zip(FIT, map(float, (share, *weight, *mean, *std)), strict=True))


def _log_density(x: np.ndarray, mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """Of each normal distribution k at each x, f64[n, k]."""
    return -0.5 * ((x[:, None] - mean) ** 2 / var + np.log(2 * np.pi * var))


def within_correlation(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float | None:
    """Pearson correlation within a prompt, pooled: of the deviations from each prompt's own mean.

    Args:
        first, second: one array for each prompt, f[N], of the same candidates.

    Returns:
        None where it is not defined.
    """
    if not first:
        return None
    a, b = (np.concatenate([np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in values])
            for values in (first, second))  # fmt: skip
    return irm.correlation(a, b)


def repeated_share(answers: Sequence[np.ndarray], n: int = NGRAM) -> float | None:
    """Share of the answers' n-grams that the same answer said before; None where no answer has n tokens.

    Source: Welleck et al. 2020 (rep-n), pooled over answers.
    """
    grams = [[tuple(tokens[i : i + n].tolist()) for i in range(len(tokens) - n + 1)] for tokens in answers]
    total = sum(map(len, grams))
    return 1 - sum(len(set(said)) for said in grams) / total if total else None


def margin_spread(pairings: Sequence[irm.Pairing]) -> dict[str, float]:
    """`bootstrap/margin_std`: standard deviation of the pairs' margins, which grows as a policy runs away."""
    margins = [pair.margin for pairing in pairings for pair in pairing.pairs]
    return {"bootstrap/margin_std": float(np.std(margins))} if margins else {}


def candidate_summary(
    rewards: Sequence[np.ndarray], tokens: Sequence[Sequence[np.ndarray]], ref_logps: Sequence[np.ndarray] | None
) -> dict[str, float]:
    """Warnings that need no gold reward, of all candidates of a round; what is not defined has no key.

    Args:
        rewards: what ranked each prompt's candidates, f32[N].
        tokens: what they say.
        ref_logps: their summed log-probs under the SFT model, f32[N]; None where nobody scored them.
    """
    lengths = [np.array([len(said) for said in prompt]) for prompt in tokens]
    found = {
        "bootstrap/reward_length_corr": within_correlation(rewards, lengths),
        "bootstrap/reward_ref_corr": within_correlation(rewards, ref_logps) if ref_logps is not None else None,
        "bootstrap/repeated_ngrams": repeated_share([said for prompt in tokens for said in prompt]),
    }
    return {name: value for name, value in found.items() if value is not None}
