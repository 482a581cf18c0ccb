"""Rows -> records: a row of any form (sera_jax.data.forms) as prompt and answers, or the reason why it is refused.

Plain strings are kept to the letter; turns of a transcript lose the white space around them. Consecutive turns of
one role are joined with a blank line, since many chat templates refuse them. `system` (or `system_prompt`) and
`history` beside a prompt become turns; two fields that tell different prompts are refused. Every field that is not
read goes to `extra`, and is named in the report.

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
from collections.abc import Callable, Mapping
from typing import Any

from sera_jax.data import beside, forms, judged, turns
from sera_jax.data.columns import Reading
from sera_jax.data.reasons import BadRow, shorten
from sera_jax.data.turns import Message, Prompt, Seen

PREPARED = "sera_prompt_format"  # marks rows that sera_jax.data.tfds_builders wrote, which are well formed
AS_WRITTEN = Reading()
_READ = {"id", "source", "label", "kto_tag", *(field for fields in beside.SCORES for field in fields)}
_ANSWERS = {"response", "completion", "chosen", "rejected", "output", "answer"}  # of a row of which the prompt is taken


@dataclasses.dataclass(frozen=True)
class PreferenceRecord:
    """A prompt, the response that was preferred and the one that was not.

    Attributes:
        id: the row's own, or a hash of its content.
        extra: the row's other fields.
        notes: keys of reasons.NOTES.
        form: what the row was read as. unread: names of fields that nobody reads.
        more: further pairs of the row's answers (data.pairs), or why one is none.
    """

    id: str
    prompt: Prompt
    chosen: str
    rejected: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    form: str = ""
    unread: tuple[str, ...] = ()
    more: tuple[PreferenceRecord | BadRow, ...] = ()


@dataclasses.dataclass(frozen=True)
class DemonstrationRecord:
    """A prompt and the response to imitate."""

    id: str
    prompt: Prompt
    response: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    form: str = ""
    unread: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """A prompt alone."""

    id: str
    prompt: Prompt
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    form: str = ""
    unread: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TextRecord(PromptRecord):
    """A text for pretraining, which is its `prompt`."""


Record = PreferenceRecord | DemonstrationRecord | PromptRecord


@dataclasses.dataclass(frozen=True)
class _Read:
    """A row under way: the project's `own` fields, its other ones, and what was seen."""

    value: Mapping[str, Any]
    own: dict[str, Any]
    left: dict[str, Any]
    form: str
    seen: Seen

    def record(self, kind: Callable[..., Any], prompt: Prompt, *texts: str) -> Any:
        beside.refuse_lost(self.left, prompt, self.seen)
        name = _identity(self.value, prompt, *texts)
        unread = {key for key, part in self.left.items() if key not in _READ and not turns.is_empty(part)}
        unread -= _ANSWERS if kind is PromptRecord else set()
        extra = _stored(self.value, "extra", dict) if PREPARED in self.value else self.left
        unread = set() if PREPARED in self.value else unread | self.seen.unread
        notes, unread = tuple(sorted(self.seen.notes)), tuple(sorted(unread))
        return kind(name, prompt, *texts, extra, notes, self.form, unread)


def parse_preference(value: Mapping[str, Any], reading: Reading = AS_WRITTEN) -> PreferenceRecord:
    """The preference record of a row; raises BadRow, or LeftOut where it prefers neither."""
    row = _read(value, "preference", reading)
    others = row.own.pop(judged.OTHERS, ())
    record = _preference(row, reading)
    more = [_other_pair(row, sides, reading) for sides in others] if reading.pairs == "all" else ()
    return dataclasses.replace(record, more=tuple(more)) if more else record


def _other_pair(row: _Read, sides: tuple[str, str], reading: Reading) -> PreferenceRecord | BadRow:
    """A further pair of the answers of a row."""
    own = row.own | dict(zip(("chosen", "rejected"), sides, strict=True))
    seen = dataclasses.replace(row.seen, notes=set(), unread=set(row.seen.unread))
    try:
        return _preference(dataclasses.replace(row, own=own, seen=seen), reading)
    except BadRow as bad:
        return bad


def _preference(row: _Read, reading: Reading) -> PreferenceRecord:
    prompt, chosen, rejected = _split_pair(row)
    chosen, rejected = (_thoughts(text, reading, row.seen) for text in (chosen, rejected))
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise BadRow(f"empty_{side}")
    if chosen == rejected:
        raise BadRow("identical_pair", shorten(chosen))
    if chosen.strip() == rejected.strip():
        raise BadRow("identical_after_strip", shorten(chosen))
    scores = _stored(row.value, "extra", dict) if PREPARED in row.value else row.left
    beside.heed_scores(scores, row.seen)
    return row.record(PreferenceRecord, prompt, chosen, rejected)


def parse_demonstration(value: Mapping[str, Any], reading: Reading = AS_WRITTEN) -> DemonstrationRecord:
    """The demonstration record of a row; raises BadRow, or LeftOut where it is marked as not to be imitated."""
    return _demonstration(_read(value, "demonstration", reading), reading)


def _demonstration(row: _Read, reading: Reading) -> DemonstrationRecord:
    beside.heed_label(row.left, "messages" in row.own)
    if "messages" in row.own:
        turns.refuse_weight(row.own["messages"], "messages")
        said, response = turns.last_answer(turns.messages(row.own["messages"], "messages", row.seen), "messages")
        prompt = beside.in_context(turns.as_prompt(_without_nothing(said), row.seen), row.own, row.seen)
    else:
        given, transcript = _given_prompt(row)
        earlier, response = turns.response(row.own["response"], "response", row.seen)
        if earlier and not _same(turns.as_prompt(earlier, row.seen), given):
            what = "the messages before the last of the response are not the row's prompt"
            raise BadRow("prompt_prefix_mismatch", what)
        if transcript:
            response = turns.of_transcript(row.own["prompt"], response, "response")
        prompt = beside.in_context(given, row.own, row.seen)
    response = _thoughts(response, reading, row.seen)
    if not response.strip():
        raise BadRow("empty_response")
    return row.record(DemonstrationRecord, prompt, response)


def parse_prompt(value: Mapping[str, Any], reading: Reading = AS_WRITTEN) -> PromptRecord:
    """The prompt of a row of any form: the one that it has as a pair or a demonstration; raises BadRow."""
    row = _read(value, "prompt", reading)
    if "chosen" in row.own:
        prompt, _, _ = _split_pair(row, answers=False)
    elif "messages" in row.own:
        said = turns.messages(row.own["messages"], "messages", row.seen)
        said = said[:-1] if said[-1]["role"] == "assistant" else said
        prompt = beside.in_context(turns.as_prompt(_without_nothing(said), row.seen), row.own, row.seen)
    else:
        prompt = beside.in_context(_given_prompt(row)[0], row.own, row.seen)
    return row.record(PromptRecord, prompt)


def parse_pretrain(value: Mapping[str, Any], reading: Reading = AS_WRITTEN) -> DemonstrationRecord | TextRecord:
    """A text as it is, of a row that is nothing but a text, else a demonstration; raises BadRow or LeftOut."""
    try:
        answered = _read(value, "demonstration", reading)
        if not answered.form.startswith(forms.GUANACO):
            return _demonstration(answered, reading)
        row = _read(value, "text", reading)
    except BadRow as bad:
        if bad.reason != "missing_field":
            raise
        try:
            row = _read(value, "text", reading)
        except BadRow:
            raise bad from None
    text = turns.check_text(row.own["text"], "text", row.seen)
    row.seen.notes.discard("carries_template")  # a text is taken as it is
    if not text.strip():
        raise BadRow("empty_response", "the text is empty")
    return row.record(TextRecord, text)


PARSERS: dict[str, Callable[..., Record]] = {
    "preference": parse_preference,
    "demonstration": parse_demonstration,
    "prompt": parse_prompt,
}


def prompt_key(prompt: Prompt) -> str:
    """One text per prompt, for hashes: equal prompts have equal keys."""
    return prompt if isinstance(prompt, str) else json.dumps([[m["role"], m["content"]] for m in prompt])


def _read(value: Mapping[str, Any], kind: str, reading: Reading) -> _Read:
    seen = Seen(reading.thoughts == "drop")
    if PREPARED in value:
        own = {key: value[key] for key in ("prompt", "chosen", "rejected", "response") if value.get(key) is not None}
        need = {"preference": ("prompt", "chosen", "rejected"), "demonstration": ("prompt", "response")}
        for field in need.get(kind, ("prompt",)):
            if field not in own:
                raise BadRow("missing_field", f"no {field}; the row has {', '.join(map(str, value))}")
        if kind == "prompt":
            own = {"prompt": own["prompt"]}
        return _Read(value, own, {}, "prepared", seen)
    value, columns = reading.renamed(value)
    form, own, left = forms.recognise(value, kind)
    return _Read(value, own, left, f"{form} (data.columns={columns})" if columns else form, seen)


def _split_pair(row: _Read, answers: bool = True) -> tuple[Prompt, str, str]:
    """(prompt, chosen, rejected) of a pair; without `answers` only the prompt must be sound."""
    own, seen = row.own, row.seen
    if "prompt" not in own and isinstance(own["chosen"], str) and turns.is_transcript(own["chosen"]):
        return _split_transcripts(row, answers)
    if (
        not answers
        and "prompt" in own
        and all(isinstance(turns.decoded(own[s], s), str) for s in ("chosen", "rejected"))
    ):
        return beside.in_context(_given_prompt(row)[0], row.own, row.seen), "", ""
    chosen_turns, chosen = turns.response(own["chosen"], "chosen", seen)
    rejected_turns, rejected = turns.response(own["rejected"], "rejected", seen)
    if chosen_turns != rejected_turns:
        what = f"chosen has {len(chosen_turns)} earlier turns, rejected {len(rejected_turns)}"
        raise BadRow("prompt_prefix_mismatch", f"{what}, and they are not the same")
    if "prompt" not in own:
        if not chosen_turns:
            raise BadRow("missing_field", f"no prompt; the row has {', '.join(map(str, row.value))}")
        return (
            beside.in_context(turns.as_prompt(_without_nothing(chosen_turns), seen), row.own, row.seen),
            chosen,
            rejected,
        )
    prompt, transcript = _given_prompt(row)
    if chosen_turns:  # a prompt field beside full conversations: they must tell the same
        repeated = turns.as_prompt(_without_nothing(chosen_turns), seen)
        if not _same(repeated, prompt):
            raise BadRow("prompt_prefix_mismatch", "the row's prompt is not what stands before the last messages")
        return beside.in_context(repeated, row.own, row.seen), chosen, rejected
    if transcript and answers:
        chosen = turns.of_transcript(own["prompt"], chosen, "chosen")
        rejected = turns.of_transcript(own["prompt"], rejected, "rejected")
    return beside.in_context(prompt, row.own, row.seen), chosen, rejected


def _split_transcripts(row: _Read, answers: bool) -> tuple[Prompt, str, str]:
    texts = {side: turns.check_text(row.own[side], side, row.seen) for side in ("chosen", "rejected")}
    if not answers:  # a marker in an answer is no fault of the prompt
        shared = _shared(turns.parse_transcript(texts["chosen"]), turns.parse_transcript(texts["rejected"]))
        return beside.in_context(turns.as_prompt(shared, row.seen), row.own, row.seen), "", ""
    (prompt, chosen), (other, rejected) = [
        turns.last_answer(turns.parse_transcript(text), side) for side, text in texts.items()
    ]
    if prompt != other:
        raise BadRow("prompt_prefix_mismatch", f"chosen has {len(prompt)} earlier turns, rejected {len(other)}")
    turns.refuse_stray(chosen, "chosen")
    turns.refuse_stray(rejected, "rejected")
    return beside.in_context(turns.as_prompt(prompt, row.seen), row.own, row.seen), chosen, rejected


def _shared(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns before the last answers of two transcripts; raises BadRow where they are not the same."""
    sides = [turns.last_answer(said, side)[0] for said, side in ((first, "chosen"), (second, "rejected"))]
    if sides[0] != sides[1]:
        raise BadRow("prompt_prefix_mismatch", f"chosen has {len(sides[0])} earlier turns, rejected {len(sides[1])}")
    return sides[0]


def _same(conversation: tuple[Message, ...], prompt: Prompt) -> bool:
    """Whether a prompt field tells what a conversation does: all of it, or its first or last user turn as text."""
    if not isinstance(prompt, str):
        return conversation == prompt
    said = [turn["content"].strip() for turn in conversation if turn["role"] == "user"]
    return prompt.strip() in (said[0], said[-1])


def _given_prompt(row: _Read) -> tuple[Prompt, bool]:
    """The row's own prompt, and whether it was a transcript."""
    raw = row.own["prompt"]
    if row.value.get(PREPARED) == "messages":
        raw = _stored(row.value, "prompt", list)
    if PREPARED not in row.value:
        raw = turns.decoded(raw, "prompt")
    if raw is None:
        raise BadRow("missing_field", f"no prompt; the row has {', '.join(map(str, row.value))}")
    if not isinstance(raw, str):
        said = turns.messages(raw, "prompt", row.seen)
        return turns.as_prompt(_without_nothing(said), row.seen), False
    text = turns.check_text(raw, "prompt", row.seen)
    if not text.strip():
        raise BadRow("empty_prompt")
    if not turns.is_transcript(text):
        if PREPARED not in row.value:
            turns.check_prompt_text(text, row.seen)
        return text, False
    said = turns.parse_transcript(text)
    if said[-1] == {"role": "assistant", "content": ""}:
        said = said[:-1]
    return turns.as_prompt(said, row.seen), True


def _without_nothing(said: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns without an empty system turn, which says nothing."""
    return tuple(turn for turn in said if turn["role"] != "system" or turn["content"].strip()) or said


def _thoughts(text: str, reading: Reading, seen: Seen) -> str:
    """The answer with its thoughts as data.thoughts says; raises BadRow."""
    if reading.thoughts == "keep" or not (found := turns.THOUGHT.match(text)):
        return text
    if reading.thoughts == "refuse":
        raise BadRow("thoughts", shorten(repr(text)))
    seen.notes.add("thoughts_dropped")
    return text[found.end() :]


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
        return turns.check_text(str(given), "id", Seen())
    content = json.dumps([prompt_key(prompt), *texts, value.get("source")], default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
