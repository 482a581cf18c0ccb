"""Held-out preference pairs: how often the implicit reward agrees with the label, beside what length alone says."""

from __future__ import annotations

import numpy as np


def facts(
    chosen_reward: np.ndarray,
    rejected_reward: np.ndarray,
    chosen_tokens: np.ndarray,
    rejected_tokens: np.ndarray,
    *,
    scale: float = 1.0,
    weight: np.ndarray | None = None,
) -> dict[str, float]:
    """Reward accuracy and margin of held-out pairs and the length-only baseline. All arrays are of one shape, [n].

    Args:
        chosen_reward, rejected_reward: implicit rewards of the two sides.
        chosen_tokens, rejected_tokens: lengths of the two sides.
        scale: what multiplies a score into the implicit reward (beta); the margin is reported without it, in nats,
            or nats a token where the score is a mean over tokens.
        weight: of each pair; None: all the same.

    Returns:
        Empty where no pair has weight, else
        heldout_accuracy: share of pairs whose chosen side has the larger reward; a tie counts half.
        heldout_margin: mean of (chosen - rejected) / scale.
        length_baseline_accuracy: accuracy of preferring the longer side; equal lengths count half.
        heldout_accuracy_shorter, heldout_accuracy_longer: heldout_accuracy on the pairs whose chosen side is the
            shorter / the longer one, where length alone scores 0 / 1; absent where there is no such pair.
        heldout_shorter_fraction: share of the pairs whose chosen side is the shorter one.
    """
    margin = (np.asarray(chosen_reward, np.float64) - np.asarray(rejected_reward, np.float64)) / scale
    longer = np.asarray(chosen_tokens, np.float64) - np.asarray(rejected_tokens, np.float64)
    weight = np.ones_like(margin) if weight is None else np.asarray(weight, np.float64)
    if not margin.shape == longer.shape == weight.shape:
        raise ValueError(
            f"rewards {margin.shape}, lengths {longer.shape}, weights {weight.shape} differ; give one of each per pair"
        )
    if not weight.sum() > 0:
        return {}
    out = {
        "heldout_accuracy": accuracy(margin, weight),
        "heldout_margin": float(np.average(margin, weights=weight)),
        "length_baseline_accuracy": accuracy(longer, weight),
        "heldout_shorter_fraction": float(np.average(longer < 0, weights=weight)),
    }
    for name, subset in (("shorter", longer < 0), ("longer", longer > 0)):
        if weight[subset].sum() > 0:
            out[f"heldout_accuracy_{name}"] = accuracy(margin[subset], weight[subset])
    return out


def accuracy(margin: np.ndarray, weight: np.ndarray) -> float:
    """Weighted share of positive margins f[n]; a zero counts half."""
    return float(np.average((np.sign(margin) + 1) / 2, weights=weight))
