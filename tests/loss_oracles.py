"""The losses again, from the papers, in float64 numpy, with their gradients worked out by hand.

Each takes (w, v, n_w, n_v, ref_w, ref_v): summed log-probs of the chosen (w) and the rejected (v) response, their
lengths and summed reference log-probs; and its hyper-parameters. It returns (loss, d loss / d w, d loss / d v). Nothing
here is shared with the package.
"""

from __future__ import annotations

import numpy as np


def sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0.0)


def dpo(w, v, n_w, n_v, ref_w, ref_v, *, beta, label_smoothing):
    h = beta * ((w - v) - (ref_w - ref_v))
    loss = (1 - label_smoothing) * softplus(-h) + label_smoothing * softplus(h)
    # d/dh: -(1-e) sigma(-h) + e sigma(h) = sigma(h) - (1 - e)
    slope = beta * (sigma(h) - (1 - label_smoothing))
    return loss, slope, -slope


def robust(w, v, n_w, n_v, ref_w, ref_v, *, beta, label_smoothing):
    # The unbiased estimator: the noisy loss is (1-e) L(h) + e L(-h) in expectation, solved for L.
    e = label_smoothing
    h = beta * ((w - v) - (ref_w - ref_v))
    loss = ((1 - e) * softplus(-h) - e * softplus(h)) / (1 - 2 * e)
    slope = beta * (-(1 - e) * (1 - sigma(h)) - e * sigma(h)) / (1 - 2 * e)
    return loss, slope, -slope


def ipo(w, v, n_w, n_v, ref_w, ref_v, *, tau, logp_reduction):
    a, b = (1 / n_w, 1 / n_v) if logp_reduction == "mean" else (np.ones_like(n_w), np.ones_like(n_v))
    h = a * (w - ref_w) - b * (v - ref_v)
    residual = h - 0.5 / tau
    return residual**2, 2 * residual * a, -2 * residual * b


def slic(w, v, n_w, n_v, ref_w, ref_v, *, beta):
    gap = 1 - beta * ((w - ref_w) - (v - ref_v))
    slope = np.where(gap > 0, -beta, 0.0)
    return np.maximum(gap, 0.0), slope, -slope


def slic_hf(w, v, n_w, n_v, ref_w, ref_v, *, delta):
    gap = delta - w + v
    slope = np.where(gap > 0, -1.0, 0.0)
    return np.maximum(gap, 0.0), slope, -slope


def simpo(w, v, n_w, n_v, ref_w, ref_v, *, beta, gamma_beta_ratio):
    # Meng et al., eq. 6: -log sigma(beta/|w| log pi(w) - beta/|l| log pi(l) - gamma)
    h = beta * w / n_w - beta * v / n_v - gamma_beta_ratio * beta
    slope = -sigma(-h)
    return softplus(-h), slope * beta / n_w, -slope * beta / n_v


def dpo_norm(w, v, n_w, n_v, ref_w, ref_v, *, beta):
    h = beta * (w - ref_w) / n_w - beta * (v - ref_v) / n_v
    slope = -sigma(-h)
    return softplus(-h), slope * beta / n_w, -slope * beta / n_v


def orpo(w, v, n_w, n_v, ref_w, ref_v, *, beta):
    p, q = np.exp(w / n_w), np.exp(v / n_v)
    h = np.log(p / (1 - p)) - np.log(q / (1 - q))
    # d log odds / d (mean log-prob) = 1 / (1 - p)
    slope = -beta * sigma(-h)
    return beta * softplus(-h), slope / (1 - p) / n_w, -slope / (1 - q) / n_v


def apo_zero(w, v, n_w, n_v, ref_w, ref_v, *, beta):
    p, q = sigma(beta * (w - ref_w)), sigma(beta * (v - ref_v))
    return 1 - p + q, -beta * p * (1 - p), beta * q * (1 - q)


def apo_down(w, v, n_w, n_v, ref_w, ref_v, *, beta):
    p, q = sigma(beta * (w - ref_w)), sigma(beta * ((w - ref_w) - (v - ref_v)))
    return p + 1 - q, beta * p * (1 - p) - beta * q * (1 - q), beta * q * (1 - q)


def nll(w, n_w):
    """(loss, d loss / d w) of the anchor, per token of the chosen response."""
    return -w / n_w, -1 / n_w
