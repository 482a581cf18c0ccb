"""Self-Rewarding PPO's equations again, from the papers: plain loops in float64 over single responses.

A row is a list of responses, a response a list of numbers, one per token; `lay` and `slots` put rows into the layout
that the package reads. Nothing of the arithmetic is shared with it.
"""

from __future__ import annotations

import math

import numpy as np


def lay(rows, width, fill=0.0, gap=0):
    """f64[R, width]: the responses of each row one after another, `gap` unused columns after each; `fill` if unused."""
    out = np.full((len(rows), width), fill, np.float64)
    for r, row in enumerate(rows):
        column = 0
        for response in row:
            out[r, column : column + len(response)] = response
            column += len(response) + gap
    return out


def slots(rows, width, num_slots, gap=0):
    """i32[R, width]: which response of its row a column belongs to."""
    numbered = [[[k] * len(response) for k, response in enumerate(row)] for row in rows]
    return lay(numbered, width, num_slots, gap).astype(np.int32)


def of_slots(rows, num_slots, fill=0.0):
    """f64[R, K] of one number per response; `fill` at empty slots."""
    return np.array([[*row, *[fill] * (num_slots - len(row))] for row in rows], np.float64)


def k_step_advantage(rewards, values, t, k, gamma):
    """Schulman et al. 2016, eq. 11 to 13: k rewards, then the value of the state reached (0 after the last token)."""
    seen = range(t, min(t + k, len(rewards)))
    reached = values[t + k] if t + k < len(rewards) else 0.0
    return sum(gamma ** (s - t) * rewards[s] for s in seen) + gamma**k * reached - values[t]


def gae(rewards, values, gamma, lam):
    """Schulman et al. 2016, the definition above eq. 16: the k-step advantages, weighted by (1 - lam) lam^(k-1).

    Once k reaches the end of the response the k-step advantage changes no more, and the weights left sum to
    lam^(n-1).
    """
    out = []
    for t in range(len(rewards)):
        n = len(rewards) - t
        mixed = sum((1 - lam) * lam ** (k - 1) * k_step_advantage(rewards, values, t, k, gamma) for k in range(1, n))
        out.append(mixed + lam ** (n - 1) * k_step_advantage(rewards, values, t, n, gamma))
    return out


def rewards_to_go(rewards, gamma):
    return [sum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards))) for t in range(len(rewards))]


def policy_loss(ratio, advantage, cliprange):
    """Schulman et al. 2017, eq. 7, negated, and its derivative by the log-prob (d ratio / d logp = ratio)."""
    clipped = min(max(ratio, 1 - cliprange), 1 + cliprange)
    loss = -min(ratio * advantage, clipped * advantage)
    pushed_too_far = ratio > 1 + cliprange if advantage > 0 else ratio < 1 - cliprange
    return loss, 0.0 if pushed_too_far and advantage != 0 else -advantage * ratio


def value_loss(value, old_value, returns, cliprange):
    """Half the larger squared error, and its derivative by the value."""
    near = old_value + max(-cliprange, min(cliprange, value - old_value))
    plain, clipped = (value - returns) ** 2, (near - returns) ** 2
    # A value that is not cut is its own near value, so a larger clipped error comes from one that is: slope 0.
    return 0.5 * max(plain, clipped), 0.0 if clipped > plain else value - returns


def coherent_shares(logratios, finished, *, count_eos, length_normalize, missing_eos, missing_eos_penalty):
    """What each token adds to the response's score."""
    kept = list(logratios)
    if finished and not count_eos:
        kept[-1] = 0.0
    if not finished and missing_eos == "penalty":
        kept = [0.0] * len(kept)
    if length_normalize:
        kept = [x / len(logratios) for x in kept]
    if not finished and missing_eos != "keep":
        kept[-1] -= missing_eos_penalty
    return kept


def coherent_score(logratios, finished, **options):
    """Zhang et al. 2025: log pi_sft(y|x) - log pi_base(y|x), with the rules for its end."""
    return math.fsum(coherent_shares(logratios, finished, **options))


def paid(logratios, finished, *, placement, mean, std, clip, **options):
    """What each token of a response is paid."""

    def cut(x):
        return x if clip is None else max(-clip, min(clip, x))

    if placement == "eos":
        score = coherent_score(logratios, finished, **options)
        return [0.0] * (len(logratios) - 1) + [cut((score - mean) / std)]
    return [cut(x / std) for x in coherent_shares(logratios, finished, **options)]
