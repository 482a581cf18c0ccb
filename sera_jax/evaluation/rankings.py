"""Which ranking of a round's candidates does the gold reward agree with? Of each, the pairs of best against worst."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sera_jax import guards, irm
from sera_jax.evaluation import gold
from sera_jax.evaluation.report import aligned, number, plain, shares
from sera_jax.sampling import Candidates


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What orders candidates.

    Attributes:
        says: in words.
        of: from log pi, log pi_ref and tokens, f[N] each; larger is better.
        judge: another ranking, which has to put the chosen candidate of a pair no lower than the rejected one.
    """

    says: str
    of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    reads_reference: bool = False
    judge: str | None = None


_LOG_RATIO = Ranking("log pi - log pi_ref", lambda now, ref, n: now - ref, True)
RANKINGS = {
    "log_ratio_sum": _LOG_RATIO,
    "log_ratio_agreed": dataclasses.replace(
        _LOG_RATIO, says=f"{_LOG_RATIO.says}, where log pi a token agrees", judge="logp_mean"
    ),
    "log_ratio_mean": Ranking("log pi - log pi_ref, a token", lambda now, ref, n: (now - ref) / n, True),
    "tenth_mean": Ranking("log pi - 0.9 log pi_ref, a token", lambda now, ref, n: (now - 0.9 * ref) / n, True),
    "half_mean": Ranking("log pi - 0.5 log pi_ref, a token", lambda now, ref, n: (now - 0.5 * ref) / n, True),
    "logp_mean": Ranking("log pi, a token", lambda now, ref, n: now / n),
    "ref_logp_mean": Ranking("log pi_ref, a token", lambda now, ref, n: ref / n, True),
    "shortest": Ranking("shortest", lambda now, ref, n: -n),
}
COLUMNS = [
    ("candidates of", plain("arms")),
    ("round", plain("round")),
    ("ranked by", plain("ranking")),
    ("pairs", plain("pairs")),
    ("agree/not/tie", shares("agreement", ("agree", "disagree", "tie"))),
    ("gold gap", lambda facts: f"{facts['gold_gap']:+.3f}" + _half_width(facts)),
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
    for name, ranking in RANKINGS.items():
        if not candidates or (ranking.reads_reference and candidates[0].ref_logp is None):
            continue
        rewards = [reward_of(ranking, c) for c in candidates]
        pairings = pair(candidates, rewards)
        if ranking.judge is not None:
            judge = RANKINGS[ranking.judge]
            pairings = [guards.agreed(p, [reward_of(judge, c)]) for p, c in zip(pairings, candidates, strict=True)]
        pairs = [(i, made.chosen, made.rejected) for i, pairing in enumerate(pairings) for made in pairing.pairs]
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
            **({"gold_gap_se": float(gap.std(ddof=1) / np.sqrt(len(gap)))} if len(gap) > 1 else {}),
            "tokens_gap": float(np.mean(tokens)),
            **({} if corr is None else {"gold_corr": corr}),
        }
    return found


def _half_width(facts: dict[str, Any]) -> str:
    return f" ± {1.96 * facts['gold_gap_se']:.3f}" if "gold_gap_se" in facts else ""


def reward_of(ranking: Ranking, candidates: Candidates) -> np.ndarray:
    """f32[N], of candidates that are scored by what it reads."""
    assert candidates.logp is not None, "scored before it is ranked"
    ref = np.zeros(0) if candidates.ref_logp is None else candidates.ref_logp
    return np.float32(ranking.of(candidates.logp, ref, np.maximum(candidates.lengths, 1)))


def table(rounds: Sequence[dict[str, Any]]) -> str:
    """Of the rounds of a summary that have `rankings`; arms that had the same candidates share their lines."""
    lines: dict[str, dict[str, Any]] = {}
    for round_ in rounds:
        for name, found in round_.get("rankings", {}).items():
            line = {"round": round_["round"], "ranking": RANKINGS[name].says, **found}
            lines.setdefault(str(line), {**line, "of": []})["of"].append(round_["arm"])
    return aligned([{**line, "arms": ", ".join(line["of"])} for line in lines.values()], COLUMNS)
