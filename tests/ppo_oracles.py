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


def value_loss(value, old_value, returns, cliprange, scale=1.0):
    """Half the larger squared error in units of the scale, and its derivative by the value; None never cuts."""
    if scale != 1.0:
        loss, slope = value_loss(value / scale, old_value / scale, returns / scale, cliprange)
        return loss, slope / scale
    if cliprange is None:
        return 0.5 * (value - returns) ** 2, value - returns
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


def kl_estimate(logp, ref_logp, estimator):
    """Schulman 2020: k1, k2, k3 of KL(pi || ref) at one token."""
    d = logp - ref_logp
    return {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]


def experience(
    responses, reward, ppo, *, kl_coef, earlier=(), earlier_returns=(), baseline="critic", random_reward=False
):
    """What an iteration makes of its responses, whatever their layout.

    Args:
        responses: each a dict of `logp`, `sft`, `base`, `sampled`, `value` (numbers per token), `finished`, `noise`.
        reward, ppo: settings, with the names of the groups of the config.
        kl_coef: of this iteration; earlier, earlier_returns: scores and tokens' returns of the iterations before it.

    Returns:
        For each response its `score`, `paid`, `advantage`, `value` and `returns`; the metrics; the next kl_coef.
    """
    rules = dict(
        count_eos=reward.count_eos,
        length_normalize=reward.length_normalize,
        missing_eos=reward.missing_eos,
        missing_eos_penalty=reward.missing_eos_penalty,
    )
    scores = [coherent_score(_difference(x["sft"], x["base"]), x["finished"], **rules) for x in responses]
    all_scores = [*earlier, *scores]
    whiten = dict(mean=np.mean(all_scores), std=np.std(all_scores)) if reward.whiten else dict(mean=0.0, std=1.0)
    out = []
    for x, score in zip(responses, scores):
        how = dict(placement=reward.placement, clip=reward.clip, **whiten)
        if random_reward:
            drawn = np.mean(scores) + np.std(scores) * x["noise"]
            # a response of one counted token, whose log-ratio is the noise, is paid it as any score
            only = rules | dict(missing_eos="keep", count_eos=True, length_normalize=False)
            end = paid([drawn], True, **how | dict(placement="eos"), **only)
            paid_ = [0.0] * (len(x["sft"]) - 1) + end
        else:
            paid_ = paid(_difference(x["sft"], x["base"]), x["finished"], **how, **rules)
        kl = [kl_estimate(a, b, ppo.kl_estimator) for a, b in zip(x["logp"], x["sft"])]
        penalty = [kl_coef * k if ppo.kl_in == "reward" else 0.0 for k in kl]
        net = [a - b for a, b in zip(paid_, penalty)]
        if baseline == "critic":
            advantage = gae(net, x["value"], ppo.gamma, ppo.lam)
            value = list(x["value"])
            returns = [a + v for a, v in zip(advantage, value)]
        else:
            returns = advantage = rewards_to_go(net, ppo.gamma)
            value = [0.0] * len(net)
        out.append(dict(score=score, paid=paid_, penalty=penalty, advantage=advantage, value=value, returns=returns))
    if baseline == "batch_mean":
        mean = np.mean([x["returns"][0] for x in out])
        for x in out:
            x["advantage"] = [r - mean for r in x["returns"]]
    if ppo.whiten_advantages:
        flat = np.concatenate([x["advantage"] for x in out])
        for x in out:
            x["advantage"] = [(a - flat.mean()) / math.sqrt(flat.var() + 1e-8) for a in x["advantage"]]
    metrics = _metrics(responses, out)
    if baseline == "critic":
        returns, values = (np.concatenate([x[name] for x in out]) for name in ("returns", "value"))
        metrics["critic/vf_explained_var"] = 1 - np.var(returns - values) / np.var(returns)
        all_returns = np.concatenate([[*earlier_returns], returns])
        metrics["critic/value_scale"] = math.sqrt(np.mean(all_returns**2)) if ppo.value_scale == "returns" else 1.0
    if not random_reward:
        metrics["objective/finished_scores"] = np.mean([s for s, x in zip(scores, responses) if x["finished"]])
    metrics["ppo/kl_coef"] = kl_coef
    error = max(-0.2, min(0.2, metrics["objective/kl"] / ppo.kl_target - 1)) if ppo.kl_controller == "adaptive" else 0.0
    return out, metrics, kl_coef * (1 + error * len(responses) / ppo.kl_horizon)


def _difference(x, y):
    return [a - b for a, b in zip(x, y)]


def _metrics(responses, out):
    """The log's names and, for each, its number: means over responses unless the name says otherwise."""
    lengths = np.array([len(x["logp"]) for x in responses], np.float64)
    ended = np.array([x["finished"] for x in responses])
    ratios = [_difference(x["sft"], x["base"]) for x in responses]
    total = np.array([math.fsum(r) for r in ratios])
    logratios = [_difference(x["logp"], x["sft"]) for x in responses]
    gaps = np.abs(np.concatenate([_difference(x["sampled"], x["logp"]) for x in responses]))
    paid_ = np.array([sum(x["paid"]) for x in out])
    penalty = np.array([sum(x["penalty"]) for x in out])
    return {
        "coherent_reward/mean": total.mean(),
        "coherent_reward/std": total.std(),
        "coherent_reward/per_token": total.sum() / lengths.sum(),
        "coherent_reward/length_corr": np.corrcoef(total, lengths)[0, 1],
        "coherent_reward/largest": np.abs(np.concatenate(ratios)).max(),
        "objective/kl": np.mean([sum(d) for d in logratios]),
        "objective/kl_k3": np.mean([sum(kl_estimate(x, 0.0, "k3") for x in d) for d in logratios]),
        "objective/entropy": np.mean([-sum(x["logp"]) for x in responses]),
        "objective/scores": paid_.mean(),
        "objective/non_score_reward": -penalty.mean(),
        "objective/rlhf_reward": (paid_ - penalty).mean(),
        "val/num_eos_tokens": ended.sum(),
        "val/contain_eos_token": ended.mean(),
        "ppo/missing_eos": (~ended).sum(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (~ended).mean(),
        "completions/mean_terminated_length": lengths[ended].mean(),
        "rollout/decode_score_gap": gaps.mean(),
        "rollout/decode_score_gap_max": gaps.max(),
        "rollout/responses": len(responses),
        "rollout/tokens": lengths.sum(),
    }
