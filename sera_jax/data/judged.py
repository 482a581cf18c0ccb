"""Two answers and a label, and lists of answers with scores or ranks: which is chosen, which rejected."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sera_jax.data.reasons import BadRow, LeftOut, shorten

Pair = dict[str, Any]  # chosen, rejected, and of a list OTHERS
OTHERS = "other pairs"  # the further (chosen, rejected) of a list; no name of a field


def number(given: Any, field: str) -> float:
    """A label as a number; raises BadRow where there is none."""
    if given is None or (isinstance(given, str) and not given.strip()):
        raise BadRow("missing_preference_label", f"{field} is {given!r}")
    try:
        found = float(given)
    except (TypeError, ValueError, OverflowError):
        raise BadRow("wrong_type", f"{field} is {shorten(repr(given))}, not a number") from None
    if math.isnan(found):
        raise BadRow("missing_preference_label", f"{field} is {given!r}")
    return found


def by_choice(first: Any, second: Any, given: Any, field: str, choices: Sequence[float]) -> Pair:
    """The label is `choices[0]` for the first answer, `choices[1]` for the second; raises BadRow."""
    found = number(given, field)
    if found not in choices:
        raise BadRow("tie", f"{field} is {shorten(repr(given))}, not one of {tuple(choices)}")
    return _pair(first, second, found == choices[0])


def by_grade(first: Any, second: Any, given: Any, field: str, low: float, high: float) -> Pair:
    """The label is graded from `low` (the first answer) to `high` (the second); the middle, or outside, is a tie."""
    found, middle = number(given, field), (low + high) / 2
    if found == middle or not low <= found <= high:
        raise BadRow("tie", f"{field} is {shorten(repr(given))}, on neither side of {middle:g} in {low:g}..{high:g}")
    return _pair(first, second, found < middle)


def by_scores(first: Any, second: Any, scores: tuple[Any, Any], fields: tuple[str, str]) -> Pair:
    """The higher score is preferred; raises BadRow."""
    a, b = (number(score, field) for score, field in zip(scores, fields, strict=True))
    if a == b:
        raise BadRow("tie", f"{fields[0]} and {fields[1]} are {a:g}")
    return _pair(first, second, a > b)


def by_winner(first: Any, second: Any, given: Any, field: str) -> Pair:
    """The label names the winner: model_a, model_b, A, B, or a tie; raises BadRow."""
    if given is None or given == "":
        raise BadRow("missing_preference_label", f"{field} is {given!r}")
    name = str(given).strip().lower().removeprefix("model_")
    if name in ("a", "b"):
        return _pair(first, second, name == "a")
    if "tie" in name or "both" in name:
        raise BadRow("tie", f"{field} is {shorten(repr(given))}")
    raise BadRow("wrong_type", f"{field} is {shorten(repr(given))}, neither model_a nor model_b nor a tie")


def by_flags(first: Any, second: Any, flags: tuple[Any, Any], fields: tuple[str, str]) -> Pair:
    """One of two fields is 1; raises BadRow."""
    a, b = (number(flag, field) for flag, field in zip(flags, fields, strict=True))
    if {a, b} != {0.0, 1.0}:
        raise BadRow("tie", f"{fields[0]} is {a:g}, {fields[1]} is {b:g}")
    return _pair(first, second, a == 1)


def of_list(
    entries: Any, field: str, text: Callable[[Any], Any], score: Callable[[Any], float | None], what: str
) -> Pair:
    """The best entry of a list against the worst, equal scores in the list's order; and all its other pairs, from the
    best entry to the worst: entries that are scored alike, or say the same, make none.

    Args:
        text, score: of an entry; a greater score is better. what: the score's name.

    Raises:
        BadRow: no list of two scored answers. LeftOut: all are scored alike.
    """
    if not isinstance(entries, list) or not entries:
        raise BadRow("wrong_type", f"{field} is {shorten(repr(entries))}, not a list of answers")
    scored = [(value, text(entry)) for entry in entries if (value := score(entry)) is not None]
    scored = [(value, said) for value, said in scored if isinstance(said, str) and said.strip()]
    if len(scored) < 2:
        raise BadRow("missing_preference_label", f"{field} holds {len(scored)} answers with {what}, not two")
    best, worst = max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        raise LeftOut("equal_scores", f"all answers of {field} have {what} {best[0]:g}")
    ranked = sorted(scored, key=lambda pair: -pair[0])
    pairs = [(a, b) for k, a in enumerate(ranked) for b in ranked[k + 1 :]]
    others = [(a[1], b[1]) for a, b in pairs if a[0] > b[0] and a[1].strip() != b[1].strip()]
    first = (best[1], worst[1])
    return {"chosen": best[1], "rejected": worst[1], OTHERS: [sides for sides in others if sides != first]}


def finite(value: Any) -> float | None:
    """A score as a number, None where it is none."""
    try:
        found = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def mean_rating(annotations: Any) -> float | None:
    """The mean of UltraFeedback's ratings, {aspect: {"Rating": "4"}}."""
    parts = annotations.values() if isinstance(annotations, Mapping) else ()
    found = [finite(part.get("Rating")) for part in parts if isinstance(part, Mapping)]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def inner_list(raw: Any, field: str) -> list[Any]:
    """The list that stands as JSON in a text (Arena's prompts and answers); raises BadRow."""
    try:
        found = json.loads(raw) if isinstance(raw, str) else raw
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(part, str) for part in found):
        raise BadRow("wrong_type", f"{field} is {shorten(repr(raw))}, not the JSON of a list of texts")
    return found


def _pair(first: Any, second: Any, first_is_better: bool) -> Pair:
    chosen, rejected = (first, second) if first_is_better else (second, first)
    return {"chosen": chosen, "rejected": rejected}
