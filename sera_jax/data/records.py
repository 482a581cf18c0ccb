"""Rows -> records: which fields a row may have, and every reason why a row is refused or accepted with a remark.

Preference rows
    prompt, chosen, rejected            three strings; a prompt that is a dialogue transcript becomes messages
    [prompt,] chosen, rejected          message lists; without a prompt all messages but the last must be the same
    chosen, rejected                    transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..." that differ in the last turn
    prompt, output_1, output_2, preference (1 or 2);  prompt, response_0, response_1, preferred (0 or 1)
Demonstrations
    prompt, response (or completion)    strings, or a prompt of messages; or `messages` that end in the answer (the
                                        only turn that is trained on)
Prompts
    prompt                              string, transcript or messages; of a fuller row only the prompt is used

Plain strings are kept to the letter; turns of a transcript lose the white space around them. Consecutive turns of
one role are joined with a blank line, since many chat templates refuse them. Every other field goes to `extra`.

How malformed rows seen in public data sets are treated (on the left, the names under which they were collected):

    empty_chosen, empty_rejected, empty_response      refused under the same names
    identical_pair, identical_after_strip             refused under the same names
    prompt_prefix_mismatch                            refused under the same name
    rejected_ends_with_human_turn                     refused: ends_with_user_turn
    chosen_/rejected_stray_role_marker                refused: stray_role_marker (it would teach to speak for the user)
    null_preference, missing_preference_label         refused: missing_preference_label
    tie_preference_0                                  refused: tie
    score_chosen and score_rejected are equal         left out and counted: equal_scores
    stray_role_marker_in_prompt, empty_earlier_turn   accepted and noted: the model reads them, it is not taught them
    consecutive_same_role_in_prompt                   accepted and noted: joined
    control_char, replacement_char_U+FFFD             accepted and noted as control_char, replacement_char
    duplicate_row                                     accepted and noted; the second gets an id of its own
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from sera_jax.data.reasons import BAD_REASONS

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]
ROLES = ("system", "user", "assistant")
PREPARED = "sera_prompt_format"  # marks rows that sera_jax.data.tfds_builders wrote, which are well formed

_MARKER = re.compile(r"\n\n(Human|Assistant):")
# A marker that the transcript's own splitting does not see: inside a line, in the plural, or cut off at the end.
_STRAY = re.compile(r"(?:^|\n|[.!?\"'”’)\]*]\s*|  )(?:Human|Assistant)s?:|\n\s*(?:Human|Assistant)s?:?(?=\s*(?:\n|$))")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
_LABELLED = (("output_1", "output_2", "preference", (1, 2)), ("response_0", "response_1", "preferred", (0, 1)))


class NoPreference(Exception):
    """Two responses whose scores in the row are equal, so that neither is preferred, whatever they are called."""


class BadRow(ValueError):
    """A row that cannot be used: `reason` is a key of reasons.BAD_REASONS, `detail` says what was seen."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in BAD_REASONS, reason
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class PreferenceRecord:
    """A prompt, the response that was preferred and the one that was not. `notes` are keys of reasons.NOTES."""

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DemonstrationRecord:
    """A prompt and the response to imitate."""

    id: str
    prompt: Prompt
    response: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """A prompt alone."""

    id: str
    prompt: Prompt
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


Record = PreferenceRecord | DemonstrationRecord | PromptRecord


def parse_preference(value: Mapping[str, Any]) -> PreferenceRecord:
    """The preference record of a row; raises BadRow, or NoPreference."""
    notes: set[str] = set()
    value = _by_label(value)
    _require(value, "chosen", "rejected")
    prompt, chosen, rejected = _split_pair(value, notes)
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow(f"empty_{side}")
    if chosen == rejected:
        raise BadRow("identical_pair", _shorten(chosen))
    if chosen.strip() == rejected.strip():
        raise BadRow("identical_after_strip", _shorten(chosen))
    _refuse_equal_scores(value)
    extra = _extra(value, "prompt", "chosen", "rejected")
    name = _identity(value, prompt, chosen, rejected)
    return PreferenceRecord(name, prompt, chosen, rejected, extra, tuple(sorted(notes)))


def parse_demonstration(value: Mapping[str, Any]) -> DemonstrationRecord:
    """The demonstration record of a row; raises BadRow."""
    notes: set[str] = set()
    field = "completion" if value.get("response") is None and value.get("completion") is not None else "response"
    if value.get(field) is None and value.get("messages") is not None:
        field = "messages"
        turns, response = _last_answer(_messages(value["messages"], "messages", notes), "messages")
        prompt = _as_prompt(turns, notes)
    else:
        _require(value, "prompt", field)
        prompt, transcript = _given_prompt(value, notes)
        turns, response = _response(value[field], field, notes)
        if turns and turns != prompt:
            raise BadRow("prompt_prefix_mismatch", f"{field} repeats a prompt that is not the row's prompt")
        response = _of_transcript(value["prompt"], response, "response") if transcript else response
    if not response.strip():
        raise BadRow("empty_response")
    extra = _extra(value, "prompt", field)
    return DemonstrationRecord(_identity(value, prompt, response), prompt, response, extra, tuple(sorted(notes)))


def parse_prompt(value: Mapping[str, Any]) -> PromptRecord:
    """The prompt record of a row, whatever else the row holds; raises BadRow."""
    notes: set[str] = set()
    if value.get("prompt") is not None:
        prompt, _ = _given_prompt(value, notes)
    elif value.get("messages") is not None:
        turns = _messages(value["messages"], "messages", notes)
        prompt = _as_prompt(turns[:-1] if turns[-1]["role"] == "assistant" else turns, notes)
    else:
        _require(value, *(("chosen", "rejected") if value.get("chosen") is not None else ("prompt",)))
        prompt, _, _ = _split_pair(value, notes)
    extra = _extra(value, "prompt", "messages")
    return PromptRecord(_identity(value, prompt), prompt, extra, tuple(sorted(notes)))


PARSERS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "preference": parse_preference,
    "demonstration": parse_demonstration,
    "prompt": parse_prompt,
}


def is_transcript(text: str) -> bool:
    """Whether the text is a dialogue transcript: it opens with a Human turn and holds an Assistant turn."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def parse_transcript(text: str) -> tuple[Message, ...]:
    """Turns of a transcript as messages, stripped of surrounding white space; the last may be empty (still open)."""
    parts = _MARKER.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple({"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True))


def prompt_key(prompt: Prompt) -> str:
    """One text per prompt, for hashes: equal prompts have equal keys."""
    return prompt if isinstance(prompt, str) else json.dumps([[m["role"], m["content"]] for m in prompt])


def _split_pair(value: Mapping[str, Any], notes: set[str]) -> tuple[Prompt, str, str]:
    """(prompt, chosen, rejected) of a row in any of the preference shapes."""
    if value.get("prompt") is None and isinstance(value["chosen"], str) and isinstance(value["rejected"], str):
        return _split_transcripts(value, notes)
    chosen_turns, chosen = _response(value["chosen"], "chosen", notes)
    rejected_turns, rejected = _response(value["rejected"], "rejected", notes)
    if chosen_turns != rejected_turns:
        raise BadRow("prompt_prefix_mismatch", "the messages before the last differ")
    if value.get("prompt") is None:
        if not chosen_turns:
            _require(value, "prompt")
        return _as_prompt(chosen_turns, notes), chosen, rejected
    prompt, transcript = _given_prompt(value, notes)
    if chosen_turns:  # a prompt field beside full conversations: they must tell the same
        repeated = _as_prompt(chosen_turns, notes)
        if (repeated[-1]["content"].strip() != prompt.strip()) if isinstance(prompt, str) else repeated != prompt:
            raise BadRow("prompt_prefix_mismatch", "the messages before the last are not the row's prompt")
        return repeated, chosen, rejected
    if transcript:
        chosen = _of_transcript(value["prompt"], chosen, "chosen")
        rejected = _of_transcript(value["prompt"], rejected, "rejected")
    return prompt, chosen, rejected


def _split_transcripts(value: Mapping[str, Any], notes: set[str]) -> tuple[Prompt, str, str]:
    texts = {side: _text(value[side], side, notes) for side in ("chosen", "rejected")}
    if not all(map(is_transcript, texts.values())):
        raise BadRow("missing_field", "no prompt, and chosen and rejected are not transcripts or message lists")
    (prompt, chosen), (other, rejected) = [_last_answer(parse_transcript(text), side) for side, text in texts.items()]
    if prompt != other:
        raise BadRow("prompt_prefix_mismatch", f"chosen has {len(prompt)} earlier turns, rejected {len(other)}")
    _refuse_stray(chosen, "chosen")
    _refuse_stray(rejected, "rejected")
    return _as_prompt(prompt, notes), chosen, rejected


def _given_prompt(value: Mapping[str, Any], notes: set[str]) -> tuple[Prompt, bool]:
    """The row's own prompt, and whether it was a transcript."""
    raw = value["prompt"]
    if value.get(PREPARED) == "messages":
        raw = _stored(value, "prompt", list)
    if not isinstance(raw, str):
        return _as_prompt(_messages(raw, "prompt", notes), notes), False
    text = _text(raw, "prompt", notes)
    if not text.strip():
        raise BadRow("empty_prompt")
    if not is_transcript(text):
        return text, False
    turns = parse_transcript(text)
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns = turns[:-1]
    return _as_prompt(turns, notes), True


def _as_prompt(turns: tuple[Message, ...], notes: set[str]) -> tuple[Message, ...]:
    """Checks turns that are to be a prompt, and joins neighbours of one role."""
    if not any(turn["content"].strip() for turn in turns):
        raise BadRow("empty_prompt")
    if turns[-1]["role"] != "user":
        raise BadRow("prompt_ends_with_answer", f"its last turn is of the {turns[-1]['role']}")
    joined: list[Message] = []
    for turn in turns:
        if not turn["content"].strip():
            notes.add("empty_earlier_turn")
        if _STRAY.search(turn["content"]):
            notes.add("stray_role_marker_in_prompt")
        if joined and joined[-1]["role"] == turn["role"]:
            notes.add("consecutive_same_role_in_prompt")
            turn = {"role": turn["role"], "content": f"{joined.pop()['content']}\n\n{turn['content']}".strip()}
        joined.append(turn)
    return tuple(joined)


def _response(raw: Any, field: str, notes: set[str]) -> tuple[tuple[Message, ...], str]:
    """(earlier turns, answer) of a response field: a string, one message, or a conversation."""
    if isinstance(raw, str):
        return (), _text(raw, field, notes)
    return _last_answer(_messages(raw, field, notes), field)


def _last_answer(turns: tuple[Message, ...], field: str) -> tuple[tuple[Message, ...], str]:
    if turns[-1]["role"] != "assistant":
        raise BadRow("ends_with_user_turn", f"the last turn of {field} is of the {turns[-1]['role']}")
    return turns[:-1], turns[-1]["content"]


def _of_transcript(prompt: str, response: str, field: str) -> str:
    """The answer to a transcript prompt, from a response that may repeat the whole transcript."""
    answer = response[len(prompt) :] if response.startswith(prompt) else response
    _refuse_stray(answer, field)
    return answer.strip()


def _refuse_stray(text: str, field: str) -> None:
    if found := _STRAY.search(text):
        raise BadRow("stray_role_marker", f"{field}: ...{text[max(0, found.start() - 20) : found.end() + 20]!r}")


def _messages(raw: Any, field: str, notes: set[str]) -> tuple[Message, ...]:
    """Messages from a list, from one message, or from a dict of lists (as some columnar formats give them)."""
    if isinstance(raw, Mapping):
        roles, contents = raw.get("role"), raw.get("content")
        columns = isinstance(roles, list) and isinstance(contents, list) and len(roles) == len(contents)
        raw = [{"role": r, "content": c} for r, c in zip(roles, contents)] if columns else [raw]
    if not isinstance(raw, list | tuple):
        raise BadRow("wrong_type", f"{field} is a {type(raw).__name__}, not a string or a list of messages")
    if not raw:
        raise BadRow("missing_field", f"{field} is an empty list")
    turns = []
    for turn in raw:
        if not isinstance(turn, Mapping) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise BadRow("bad_message", f"{field}: {_shorten(repr(turn))}")
        turns.append({"role": turn["role"], "content": _text(turn["content"], field, notes)})
    return tuple(turns)


def _text(raw: Any, field: str, notes: set[str]) -> str:
    if not isinstance(raw, str):
        raise BadRow("wrong_type", f"{field} is a {type(raw).__name__}: {_shorten(repr(raw))}")
    try:
        raw.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("invalid_unicode", f"{field}: {raw[error.start]!r} at character {error.start + 1}") from None
    if "\ufffd" in raw:
        notes.add("replacement_char")
    if _CONTROL.search(raw):
        notes.add("control_char")
    return raw


def _by_label(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of two responses and a label, as prompt/chosen/rejected; other rows unchanged."""
    for first, second, label, choices in _LABELLED:
        if "chosen" in value or first not in value or second not in value:
            continue
        given = value.get(label)
        if given is None or given == "":
            raise BadRow("missing_preference_label", f"{label} is {given!r}")
        try:
            number = float(given)
        except (TypeError, ValueError, OverflowError):
            raise BadRow("wrong_type", f"{label} is {_shorten(repr(given))}, not one of {choices}") from None
        if number not in choices:
            raise BadRow("tie", f"{label} is {_shorten(repr(given))}, not one of {choices}")
        sides = (first, second) if number == choices[0] else (second, first)
        return {**_extra(value, first, second), "chosen": value[sides[0]], "rejected": value[sides[1]]}
    return value


def _refuse_equal_scores(value: Mapping[str, Any]) -> None:
    scores = _extra(value)
    for fields in _SCORES:
        first, second = (scores.get(field) for field in fields)
        if isinstance(first, int | float) and first == second:
            raise NoPreference(f"{fields[0]} and {fields[1]} are {first!r}")


def _require(value: Mapping[str, Any], *fields: str) -> None:
    for field in fields:
        if value.get(field) is None:
            raise BadRow("missing_field", f"no {field}; the row has {', '.join(map(str, value)) or 'no field'}")


def _extra(value: Mapping[str, Any], *used: str) -> dict[str, Any]:
    if PREPARED in value:
        return _stored(value, "extra", dict)
    return {key: part for key, part in value.items() if key not in used}


def _stored(value: Mapping[str, Any], field: str, kind: type) -> Any:
    """What a prepared row holds as JSON."""
    try:
        found = json.loads(value.get(field, ""))
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise BadRow("wrong_type", f"{field} is not the JSON of a {kind.__name__}, which {PREPARED} says it is")
    return found


def _identity(value: Mapping[str, Any], prompt: Prompt, *texts: str) -> str:
    """The row's own id, else a hash of its content and its `source` field (never of a path, which may move)."""
    given = value.get("id")
    if isinstance(given, str | int) and not isinstance(given, bool) and str(given):
        return _text(str(given), "id", set())
    content = json.dumps([prompt_key(prompt), *texts, value.get("source")], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
