"""Which ranking of a round's candidates does the gold reward agree with? Of each, the pairs of best against worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax import guards, irm
from sera_jax.evaluation import gold
from sera_jax.evaluation.report import aligned, number, plain, shares
from sera_jax.sampling import Candidates

Ranking = Callable[[Candidates], np.ndarray]  # f[N], larger is better
RANKINGS: dict[str, tuple[str, Ranking]] = {
    "log_ratio_sum": ("log pi - log pi_ref", lambda c: c.logp - c.ref_logp),
    "log_ratio_mean": ("log pi - log pi_ref, a token", lambda c: (c.logp - c.ref_logp) / np.maximum(c.lengths, 1)),
    "logp_mean": ("log pi, a token", lambda c: c.logp / np.maximum(c.lengths, 1)),
    "ref_logp_mean": ("log pi_ref, a token", lambda c: c.ref_logp / np.maximum(c.lengths, 1)),
    "shortest": ("shortest", lambda c: -c.lengths),
}
COLUMNS = [
    ("candidates of", plain("arms")),
    ("round", plain("round")),
    ("ranked by", plain("ranking")),
    ("pairs", plain("pairs")),
    ("agree/not/tie", shares("agreement", ("agree", "disagree", "tie"))),
    ("gold gap", lambda facts: f"{facts['gold_gap']:+.3f} ± {1.96 * facts['gold_gap_se']:.3f}"),
    ("tokens gap", lambda facts: f"{facts['tokens_gap']:+.1f}"),
    ("corr.", number("gold_corr", 2)),
]
LEGEND = """\
agree/not/tie  does the gold agree with the pairs of a prompt's best against its worst candidate, %
     gold gap  gold of the best less that of the worst, with a 95 % interval over prompts
   tokens gap  the same of their lengths
        corr.  correlation within a prompt of the ranking with the gold"""


def facts(
    candidates: Sequence[Candidates],
    golds: Sequence[np.ndarray],
    pair: Callable[[Sequence[Candidates], Sequence[np.ndarray]], list[irm.Pairing]],
) -> dict[str, dict[str, Any]]:
    """By the name of each ranking that makes pairs: `pairs`, `agreement`, `gold_gap` and its standard error over
    prompts, `tokens_gap`, `gold_corr`.

    Args:
        candidates: of each prompt two at least, scored by the policy; without a reference its rankings are left out.
        golds: f[N] of each prompt's candidates.
        pair: from candidates and their rewards to at most one pair of each prompt, best and worst.
    """
    found = {}
    for name, (_, ranking) in RANKINGS.items():
        if not candidates or (("ratio" in name or "ref" in name) and candidates[0].ref_logp is None):
            continue
        rewards = [np.float32(ranking(c)) for c in candidates]
        pairs = [(i, pair.chosen, pair.rejected) for i, p in enumerate(pair(candidates, rewards)) for pair in p.pairs]
        if not pairs:
            continue
        both = np.array([[golds[i][chosen], golds[i][rejected]] for i, chosen, rejected in pairs])
        tokens = [candidates[i].lengths[chosen] - candidates[i].lengths[rejected] for i, chosen, rejected in pairs]
        gap = both[:, 0] - both[:, 1]
        corr = guards.within_correlation(rewards, golds)
        found[name] = {
            "pairs": len(pairs),
            "agreement": gold.agreement(*both.T),
            "gold_gap": float(gap.mean()),
            "gold_gap_se": float(gap.std() / np.sqrt(len(gap))),
            "tokens_gap": float(np.mean(tokens)),
            **({} if corr is None else {"gold_corr": corr}),
        }
    return found


def table(rounds: Sequence[dict[str, Any]]) -> str:
    """Of the rounds of a summary that have `rankings`; arms that had the same candidates share their lines."""
    lines: dict[str, dict[str, Any]] = {}
    for round_ in rounds:
        for name, found in round_.get("rankings", {}).items():
            line = {"round": round_["round"], "ranking": RANKINGS[name][0], **found}
            lines.setdefault(str(line), {**line, "of": []})["of"].append(round_["arm"])
    return aligned([{**line, "arms": ", ".join(line["of"])} for line in lines.values()], COLUMNS)
