"""Gold rewards of generated responses: mean with an interval, and win rate of one policy against another; and two gold
rewards for real text, likeness to preferred answers and sentiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sera_jax.core import Stream, rng_for

TIE = 1e-9  # gold rewards are sums of a few decimals; closer than this is the same reward
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class OfText:
    """A gold reward of real text, from 0 to 1.

    Attributes:
        of: the reward of a text, given the preferred answers of its prompt.
        compares: it is of the nearest of these, so that a prompt without one has no gold reward.
    """

    of: Callable[[str, Sequence[str]], float]
    compares: bool


def chrf() -> OfText:
    """chrF (Popovic 2015), from 0 to 1, as sacrebleu computes it of a sentence by default.

    Raises:
        ValueError: sacrebleu is not installed.
    """
    try:
        import sacrebleu  # no run needs it that does not ask for it
    except ImportError as error:
        raise _missing("chrf", "sacrebleu") from error
    return OfText(lambda said, references: sacrebleu.sentence_chrf(said, references).score / 100, compares=True)


def sentiment() -> OfText:
    """How positive a text is, by the lexicon and rules of VADER (Hutto and Gilbert 2014): its compound score of -1 to
    1, moved to 0 to 1. 0.5 is neutral, and long texts saturate.

    Raises:
        ValueError: vaderSentiment is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise _missing("sentiment", "vaderSentiment") from error
    scores = SentimentIntensityAnalyzer().polarity_scores
    return OfText(lambda said, references: (1 + scores(said)["compound"]) / 2, compares=False)


def _missing(name: str, package: str) -> ValueError:
    return ValueError(
        f"config.eval.gold={name!r} needs the package {package}, which is not installed: pip install {package}; or "
        "leave eval.gold empty"
    )


OF_TEXT = {"chrf": chrf, "sentiment": sentiment}  # by eval.gold


def facts(golds: Sequence[float] | np.ndarray, *, seed: int = 0) -> dict[str, float | list[float]]:
    """`gold_mean` and `gold_ci95` of gold rewards f[n], one per held-out prompt; empty where n is 0."""
    golds = np.asarray(golds, np.float64)
    if not len(golds):
        return {}
    return {"gold_mean": float(golds.mean()), "gold_ci95": list(ci95(golds, seed=seed))}


def by_task(golds: np.ndarray, tasks: Sequence[str]) -> dict[str, float]:
    """Mean gold reward of the prompts of each task, by its name; golds f[n], one per held-out prompt."""
    return {task: float(golds[np.array(tasks) == task].mean()) for task in sorted(set(tasks))}


def by_domain(golds: np.ndarray, tasks: Sequence[str], heldout_tasks: Sequence[str]) -> dict[str, float]:
    """`gold_in_domain` and `gold_out_of_domain`: means over the prompts of the tasks that were trained on, and of those
    that were held out; nothing where no task was, and no mean of no prompt."""
    if not heldout_tasks:
        return {}
    out = np.isin(np.array(tasks), np.array(heldout_tasks))
    parts = {"gold_in_domain": golds[~out], "gold_out_of_domain": golds[out]}
    return {name: float(part.mean()) for name, part in parts.items() if len(part)}


def ci95(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values f[n] over prompts, by the percentile bootstrap.

    2000 resamples of the n prompts with replacement; the limits are the 2.5 and 97.5 percentiles of their means. It
    holds the policy fixed: it says what other prompts would change, nothing of other seeds of training.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no values; an interval needs at least one")
    rng = rng_for(seed, Stream.BOOTSTRAP_CI)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def win_rate(golds: np.ndarray, other: np.ndarray) -> float:
    """Share of prompts on which `golds` beats `other`, both f[n] in the same order of prompts; a tie counts half."""
    golds, other = np.asarray(golds, np.float64), np.asarray(other, np.float64)
    if golds.shape != other.shape or not len(golds):
        raise ValueError(
            f"{len(golds)} gold rewards against {len(other)}: a win rate is paired by prompt, at least one"
        )
    gap = golds - other
    return float(np.mean(np.where(np.abs(gap) < TIE, 0.5, gap > 0)))


def agreement(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """Shares of pairs whose chosen response the gold puts above (`agree`), below (`disagree`) or level with (`tie`) the
    rejected one; gold rewards f[n] of both sides. Pairs without one (NaN) do not count; empty where none counts."""
    gap = np.asarray(chosen, np.float64) - np.asarray(rejected, np.float64)
    gap = gap[~np.isnan(gap)]
    if not len(gap):
        return {}
    tie = np.abs(gap) < TIE
    return {
        "agree": float(np.mean((gap > 0) & ~tie)),
        "disagree": float(np.mean((gap < 0) & ~tie)),
        "tie": float(np.mean(tie)),
    }
