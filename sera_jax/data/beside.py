"""What stands in a row beside prompt and answers: it becomes part of the prompt, or the row is refused or left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sera_jax.data import form_parts, turns
from sera_jax.data.reasons import BadRow, LeftOut, shorten
from sera_jax.data.turns import Message, Prompt, Seen

SCORES = tuple(
    (pattern.format("chosen"), pattern.format("rejected"))
    for pattern in ("score_{}", "{}_score", "{}_rating", "rating_{}", "{}-rating")
)
_ASKED = (*form_parts.ASKED, "context")
_TOOLS = ("tools", "functions")
_THOUGHTS = ("reasoning_content", "thinking")
_NOTHING = ("", "[]", "{}", "null", "None")  # tools as JSON in a text


def in_context(prompt: Prompt, own: Mapping[str, Any], seen: Seen) -> Prompt:
    """The prompt after the row's system text and history; raises BadRow where the prompt has others already."""
    systems = [own[name] for name in ("system", "system_prompt") if name in own]
    for system in systems:
        turns.check_text(system, "system", seen)
    if len({system.strip() for system in systems}) > 1:
        raise BadRow("differing_sources", "system and system_prompt say different things")
    if not systems and "history" not in own:
        return prompt
    said = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    has = [turn["content"].strip() for turn in said if turn["role"] == "system"]
    if "history" in own:
        said = _after(own["history"], said, seen)
    if systems and has and has != [systems[0].strip()]:
        raise BadRow("differing_sources", f"system is {shorten(repr(systems[0]))}, the prompt's own is {has[0]!r:.80}")
    if systems and not has:
        said = [{"role": "system", "content": systems[0]}, *said]
    return turns.as_prompt(tuple(said), seen)


def _after(history: Any, said: list[Message], seen: Seen) -> list[Message]:
    """The turns after those of a history: [[question, answer], ...] or messages."""
    if isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history):
        history = [text for pair in history for text in pair]
    elif not isinstance(history, list):
        raise BadRow("differing_sources", f"history is {shorten(repr(history))}, not a list of earlier turns")
    earlier = list(turns.messages(history, "history", seen))
    opening = [turn for turn in said if turn["role"] == "system"]
    rest = [turn for turn in said if turn["role"] != "system"]
    if rest[: len(earlier)] == earlier and len(rest) > len(earlier):
        return said
    if len(rest) > 1:
        raise BadRow("differing_sources", "history and the prompt's own earlier turns say different things")
    return [*opening, *earlier, *rest]


def refuse_lost(left: Mapping[str, Any], prompt: Prompt, seen: Seen) -> None:
    """Refuse a row that has more to say to the model than what is read of it."""
    if not left:
        return
    said = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    for field in _TOOLS:
        part = left.get(field)
        if part is not None and not turns.is_empty(part) and not (isinstance(part, str) and part.strip() in _NOTHING):
            raise BadRow("tools", f"{field} is {shorten(repr(part))}")
    for field in turns.TOOL_FIELDS:
        if not turns.is_empty(part := left.get(field)):
            raise BadRow("tool_calls", f"{field} is {shorten(repr(part))}")
    for field in _THOUGHTS:
        if not turns.is_empty(part := left.get(field)):
            if not seen.drop_thoughts:
                raise BadRow("reasoning_content", f"{field} is {shorten(repr(part))}")
            seen.notes.add("thoughts_dropped")
    weight = left.get("weight")
    if isinstance(weight, int | float) and weight != 1:
        raise BadRow("weight", f"weight is {shorten(repr(weight))}")
    text = None
    for field in _ASKED:
        part = left.get(field)
        if not isinstance(part, str) or not part.strip():
            continue
        text = " ".join(" ".join(said).split()) if text is None else text
        if " ".join(part.split()) not in text:
            if turns.is_transcript(part) and turns.parse_transcript(part)[0]["content"] in said:
                continue
            raise BadRow(
                "differing_sources", f"{field} is {shorten(repr(part))}, which is not in the prompt that is read"
            )
    for field in ("messages", "conversations", "conversation"):
        if isinstance(part := left.get(field), list) and part:
            _refuse_other_talk(part, field, said if isinstance(prompt, str) else prompt)


def _refuse_other_talk(raw: list[Any], field: str, said: Any) -> None:
    """Refuse a conversation beside the prompt that opens with another question."""
    asked = next(
        (t if isinstance(t, str) else t["content"] for t in said if isinstance(t, str) or t["role"] == "user"), ""
    )
    if type(raw[0]) is dict and raw[0].get("role") == "user" and raw[0].get("content") == asked:
        return
    try:
        talk = turns.messages(raw[:2], field, Seen(True))
    except BadRow:
        return  # of another shape: nobody reads it
    first = next((turn["content"] for turn in talk if turn["role"] == "user"), None)
    if first is not None and " ".join(first.split()) != " ".join(asked.split()):
        raise BadRow("differing_sources", f"{field} begins with {shorten(repr(first))}, the prompt is another")


def heed_label(left: Mapping[str, Any], messages: bool) -> None:
    """Leave out a row that says that its answer is not to be imitated (KTO): `label` or `kto_tag` is false."""
    for field in ("label", "kto_tag"):
        given = left.get(field)
        plain = isinstance(given, int | float) and not isinstance(given, bool) and not messages
        if given is False or (isinstance(given, str) and given.strip().lower() == "false") or (plain and given == 0):
            raise LeftOut("undesirable", f"{field} is {given!r}")


def heed_scores(scores: Mapping[str, Any], seen: Seen) -> None:
    """Leave out a pair of equal scores, note one whose chosen response has the lower one."""
    for fields in SCORES:
        first, second = scores.get(fields[0]), scores.get(fields[1])
        if isinstance(first, int | float) and isinstance(second, int | float):
            if first == second:
                raise LeftOut("equal_scores", f"{fields[0]} and {fields[1]} are {first!r}")
            if first < second:
                seen.notes.add("lower_score_chosen")
