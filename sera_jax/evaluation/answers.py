"""Held-out demonstrations and answers as numbers: likelihood, coherent reward, distance from the SFT model, pattern."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sera_jax.evaluation.gold import ci95


def likelihood_facts(logps: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """`heldout_nll`: negative log-likelihood of the held-out responses, nats per token; empty where there are none.

    Args:
        logps: summed log-probs f[n]. lengths: tokens of the responses, int[n].
    """
    logps, lengths = _alike(logps, lengths)
    return {"heldout_nll": -float(logps.sum()) / float(lengths.sum())} if len(logps) else {}


def coherent_facts(
    sft_logp: np.ndarray, base_logp: np.ndarray, lengths: np.ndarray, *, seed: int = 0
) -> dict[str, float | list[float]]:
    """The coherent reward log pi_sft - log pi_base of answers, summed over tokens (Zhang et al., COLM 2025). All f[n].

    Returns:
        Empty where n is 0, else
        coherent_reward_mean: nats per answer; coherent_reward_ci95: its interval over prompts (see gold.ci95).
        coherent_reward_length_corr: correlation (Pearson) of an answer's reward with its length; absent where it is not
            defined, since one of them is the same for all answers.
    """
    sft_logp, base_logp, lengths = _alike(sft_logp, base_logp, lengths)
    if not len(lengths):
        return {}
    reward = sft_logp - base_logp
    out: dict[str, float | list[float]] = {
        "coherent_reward_mean": float(reward.mean()),
        "coherent_reward_ci95": list(ci95(reward, seed=seed)),
    }
    if np.ptp(reward) > 0 and np.ptp(lengths) > 0:
        out["coherent_reward_length_corr"] = float(np.corrcoef(reward, lengths)[0, 1])
    return out


def kl_facts(own_logp: np.ndarray, sft_logp: np.ndarray) -> dict[str, float]:
    """`kl_to_sft`: KL(policy || SFT), nats per answer, estimated on answers drawn from the policy at temperature 1.

    Args:
        own_logp, sft_logp: summed log-probs f[n] of the same answers under the policy and the SFT model.
    """
    own_logp, sft_logp = _alike(own_logp, sft_logp)
    return {"kl_to_sft": float((own_logp - sft_logp).mean())} if len(own_logp) else {}


def pattern_facts(pattern: str, answers: Sequence[str], references: Sequence[str | None]) -> dict[str, float]:
    """How often answers have a form, and the right content in it.

    Args:
        pattern: a regular expression with one group. Its last match counts; commas are not part of what it says.
        answers: one text per prompt. references: the held-out response to each prompt, None where there is none.

    Returns:
        Empty where there are no answers, else
        wellformed_fraction: share of the answers in which the pattern is found.
        answer_accuracy: share of all answers that say what the reference says; absent where no reference says anything.
    """
    if len(answers) != len(references):
        raise ValueError(f"{len(answers)} answers, {len(references)} references; give one of each per prompt")
    if not answers:
        return {}
    said = [last_match(pattern, text) for text in answers]
    wanted = [None if text is None else last_match(pattern, text) for text in references]
    out = {"wellformed_fraction": float(np.mean([value is not None for value in said]))}
    if any(value is not None for value in wanted):
        right = [value is not None and value == want for value, want in zip(said, wanted)]
        out["answer_accuracy"] = float(np.mean(right))
    return out


def last_match(pattern: str, text: str) -> str | None:
    """What the pattern's group holds at its last match, without commas and surrounding space; None without a match."""
    found = None
    for match in re.finditer(pattern, text):
        found = match
    said = None if found is None else found.group(1)
    return None if said is None else said.replace(",", "").strip()


def _alike(*arrays: np.ndarray) -> list[np.ndarray]:
    """As float64; ValueError where they are not of one length."""
    out = [np.asarray(array, np.float64) for array in arrays]
    if len({array.shape for array in out}) != 1 or out[0].ndim != 1:
        raise ValueError(f"arrays of shapes {[array.shape for array in out]}; give one value of each per response")
    return out
