"""What a row says, turn by turn: texts, message lists, transcripts; and what a message holds besides role and content.

A field of a message that a chat template could read is used, or the row is refused under a reason of its own; one that
is null or empty is nothing; any other is named in the report (`Seen.unread`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from sera_jax.data.rawrows import NotText
from sera_jax.data.reasons import BadRow, LeftOut, shorten

Message = Mapping[str, str]
Prompt = str | tuple[Message, ...]
ROLES = ("system", "user", "assistant")
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id")
THOUGHT = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)  # at the start of an answer

_ROLE_OF = {role: role for role in ROLES} | {"developer": "system"}
_ROLE_OF |= dict.fromkeys(("human", "prompter"), "user") | dict.fromkeys(
    ("gpt", "chatgpt", "bot", "model"), "assistant"
)
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_ROLE_NAMES, _CONTENT_NAMES = ("role", "from"), ("content", "value", "text")
_MARKER = re.compile(r"\n\n(Human|Assistant):")
# A marker that the transcript's own splitting does not see: inside a line, in the plural, or cut off at the end.
STRAY = re.compile(r"(?:^|\n|[.!?\"'”’)\]*]\s*|  )(?:Human|Assistant)s?:|\n\s*(?:Human|Assistant)s?:?(?=\s*(?:\n|$))")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_CONTROL_BYTES = bytes(code for code in range(0x80) if _CONTROL.match(chr(code)))
# Marks of the field's chat templates, whatever the tokenizer: control tokens, and role markers at the start of a line.
_TEMPLATE = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|user|assistant|system|end|end_of_turn|begin_of_text)\|>"
    r"|<start_of_turn>|<end_of_turn>|\[/?INST\]|<</?SYS>>|<extra_id_1>"
)
_ROLE_MARKS = re.compile(
    r"\n\nHuman:.*\n\nAssistant:|^#{2,3} ?(?:Instruction|Response|Human|User|Assistant)s?:|^USER:.*\bASSISTANT:",
    re.DOTALL | re.MULTILINE,
)
_WRITTEN_OUT = re.compile(r"\s*\[\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:")


@dataclasses.dataclass
class Seen:
    """What was noticed in a row: `notes` are keys of reasons.NOTES, `unread` fields that nobody reads.

    drop_thoughts: fields of thoughts are left out and noted, not refused.
    """

    drop_thoughts: bool = False
    notes: set[str] = dataclasses.field(default_factory=set)
    unread: set[str] = dataclasses.field(default_factory=set)


def is_empty(value: Any) -> bool:
    """Null, "" or white space, [] or {}: nothing that a model could see."""
    return value is None or (
        not value.strip() if isinstance(value, str) else isinstance(value, list | dict) and not value
    )


def check_text(raw: Any, field: str, seen: Seen) -> str:
    """The text, to the letter; raises BadRow."""
    if not isinstance(raw, str):
        meant = "" if not isinstance(raw, list | Mapping) else ", which is no text here"
        raise BadRow("wrong_type", f"{field} is a {type(raw).__name__}{meant}: {shorten(repr(raw))}")
    if isinstance(raw, NotText):
        raise BadRow("non_utf8", f"{field}: {raw}")
    if raw.isascii():
        if len(written := raw.encode()) != len(written.translate(None, _CONTROL_BYTES)):
            seen.notes.add("control_char")
    else:
        try:
            raw.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("invalid_unicode", f"{field}: {raw[error.start]!r} at character {error.start + 1}") from None
        if "\ufffd" in raw:
            seen.notes.add("replacement_char")
        if _CONTROL.search(raw):
            seen.notes.add("control_char")
    if (("<" in raw and ("|>" in raw or "_" in raw or "SYS" in raw)) or "INST]" in raw) and _TEMPLATE.search(raw):
        seen.notes.add("carries_template")
    return raw


def decoded(raw: Any, field: str) -> Any:
    """A message list that stands as JSON in a text, as a list; everything else unchanged.

    Raises:
        BadRow: it shows a list, but is not JSON, so that its contents cannot be had to the letter.
    """
    if not isinstance(raw, str) or not _WRITTEN_OUT.match(raw):
        return raw
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise BadRow("serialised_messages", f"{field}: {shorten(repr(raw))}")
    return found


def messages(raw: Any, field: str, seen: Seen) -> tuple[Message, ...]:
    """Messages from a list, from one message, from a dict of lists (as some columnar formats give them), or from texts
    that alternate, the user's first; raises BadRow."""
    raw = decoded(raw, field)
    if type(raw) is list and raw and type(raw[0]) is dict and "role" in raw[0] and "input" not in raw[0]:
        return tuple([_message(turn, field, seen) for turn in raw])
    if isinstance(raw, dict | Mapping):
        lists = {key: part for key, part in raw.items() if isinstance(part, list)}
        columns = len(lists) == len(raw) > 0 and len({len(part) for part in lists.values()}) == 1
        columns = columns and any(name in lists for name in _ROLE_NAMES)
        raw = [dict(zip(lists, parts)) for parts in zip(*lists.values())] if columns else [raw]
    if not isinstance(raw, list | tuple):
        raise BadRow("wrong_type", f"{field} is a {type(raw).__name__}, where a list of messages is read")
    if not raw:
        raise BadRow("missing_field", f"{field} is an empty list")
    if type(raw[0]) is str and all(isinstance(turn, str) for turn in raw):
        return tuple(
            {"role": ROLES[1 + index % 2], "content": check_text(turn, field, seen)} for index, turn in enumerate(raw)
        )
    if all(isinstance(turn, dict | Mapping) and {"input", "output"} <= turn.keys() for turn in raw):
        pairs = [(turn["input"], turn["output"]) for turn in raw]
        raw = [{"role": ROLES[1 + k], "content": pair[k]} for pair in pairs for k in (0, 1)]
    return tuple(_message(turn, field, seen) for turn in raw)


def _message(turn: Any, field: str, seen: Seen) -> Message:
    if type(turn) is dict and len(turn) == 2:  # as nearly all are
        role, content = turn.get("role"), turn.get("content")
        if type(role) is str and type(content) is str and role in ROLES:
            return {"role": role, "content": check_text(content, field, seen)}
    if not isinstance(turn, Mapping):
        raise BadRow("bad_message", f"{field}: {shorten(repr(turn))}")
    named = next((name for name in _ROLE_NAMES if turn.get(name) is not None), "role")
    said = turn.get(named)
    role = said.lower() if isinstance(said, str) else ""
    if role in _TOOL_ROLES:
        raise BadRow("tool_calls", f"{field}: a message of the role {said!r}")
    written = next((name for name in _CONTENT_NAMES if turn.get(name) is not None), "content")
    for key, part in turn.items():
        if key not in (named, written) and not is_empty(part):
            _further(key, part, field, seen)
    content = turn.get(written)
    if isinstance(content, list):
        content = _joined(content, field)
    if role not in _ROLE_OF or not isinstance(content, str):
        raise BadRow("bad_message", f"{field}: {shorten(repr(turn))}")
    return {"role": _ROLE_OF[role], "content": check_text(content, field, seen)}


def _further(key: str, part: Any, field: str, seen: Seen) -> None:
    """What a message holds besides role and content."""
    if key in TOOL_FIELDS:
        raise BadRow("tool_calls", f"{field}: {key} is {shorten(repr(part))}")
    if key in THOUGHT_FIELDS:
        if not seen.drop_thoughts:
            raise BadRow("reasoning_content", f"{field}: {key} is {shorten(repr(part))}")
        seen.notes.add("thoughts_dropped")
    elif key != "weight":  # of the last answer alone, see `refuse_weight`
        seen.unread.add(f"{field}[].{key}")


def _joined(parts: list[Any], field: str) -> str:
    """The text of a content that is a list of parts; raises BadRow where a part is no text."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = part if isinstance(part, str) else None
        if isinstance(part, Mapping) and kind in ("text", "input_text", "output_text"):
            text = next((part[name] for name in ("text", "value") if isinstance(part.get(name), str)), None)
        if text is None:
            raise BadRow("content_parts", f"{field}: a part of the type {kind!r}: {shorten(repr(part))}")
        texts.append(text)
    return "".join(texts)


def refuse_weight(raw: Any, field: str) -> None:
    """Heed the `weight` of the last message of a conversation: 0 is an answer that is not to be learned.

    Raises:
        LeftOut: the weight is 0. BadRow: it is neither 0 nor 1.
    """
    last = raw[-1] if isinstance(raw, list | tuple) and raw else raw
    weight = last.get("weight") if isinstance(last, Mapping) else None
    if isinstance(weight, int | float) and weight == 0:
        raise LeftOut("undesirable", f"the answer of {field} has weight 0")
    if weight is not None and weight != 1:
        raise BadRow("weight", f"{field}: the answer has weight {shorten(repr(weight))}")


def is_transcript(text: str) -> bool:
    """Whether the text is a dialogue transcript: it opens with a Human turn and holds an Assistant turn."""
    return text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def parse_transcript(text: str) -> tuple[Message, ...]:
    """Turns of a transcript as messages, stripped of surrounding white space; the last may be empty (still open)."""
    parts = _MARKER.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple({"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True))


def check_prompt_text(text: str, seen: Seen) -> None:
    """Note what a prompt that is plain text carries of a template; refuse a list that stands in it as JSON."""
    if any(mark in text for mark in ("Human:", "ASSISTANT:", "##")) and _ROLE_MARKS.search(text):
        seen.notes.add("carries_template")
    if text.lstrip().startswith("[") and text.rstrip().endswith("]"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return
        if isinstance(found, list) and found and all(isinstance(part, str | dict) for part in found):
            raise BadRow("serialised_messages", f"prompt: {shorten(repr(text))}")


def as_prompt(turns: tuple[Message, ...], seen: Seen) -> tuple[Message, ...]:
    """Checks turns that are to be a prompt, and joins neighbours of one role."""
    if not any(turn["content"].strip() for turn in turns):
        raise BadRow("empty_prompt")
    if turns[-1]["role"] != "user":
        raise BadRow("prompt_ends_with_answer", f"its last turn is of the {turns[-1]['role']}")
    joined: list[Message] = []
    for turn in turns:
        if not turn["content"].strip():
            seen.notes.add("empty_earlier_turn")
        said = turn["content"]
        if ("Human" in said or "Assistant" in said) and STRAY.search(said):
            seen.notes.add("stray_role_marker_in_prompt")
        if joined and joined[-1]["role"] == turn["role"]:
            seen.notes.add("consecutive_same_role_in_prompt")
            turn = {"role": turn["role"], "content": f"{joined.pop()['content']}\n\n{turn['content']}".strip()}
        joined.append(turn)
    return tuple(joined)


def last_answer(turns: tuple[Message, ...], field: str) -> tuple[tuple[Message, ...], str]:
    """(turns before the answer, answer) of a conversation that ends in one; raises BadRow."""
    if turns[-1]["role"] != "assistant":
        raise BadRow("ends_with_user_turn", f"the last turn of {field} is of the {turns[-1]['role']}")
    return turns[:-1], turns[-1]["content"]


def response(raw: Any, field: str, seen: Seen) -> tuple[tuple[Message, ...], str]:
    """(earlier turns, answer) of a response field: a string, one message, or a conversation."""
    raw = decoded(raw, field)
    if isinstance(raw, str):
        return (), check_text(raw, field, seen)
    refuse_weight(raw, field)
    return last_answer(messages(raw, field, seen), field)


def of_transcript(prompt: str, text: str, field: str) -> str:
    """The answer to a transcript prompt, from a response that may repeat the whole transcript."""
    answer = text[len(prompt) :] if text.startswith(prompt) else text
    refuse_stray(answer, field)
    return answer.strip()


def refuse_stray(text: str, field: str) -> None:
    """Raise BadRow where an answer to a transcript holds a further turn."""
    if ("Human" in text or "Assistant" in text) and (found := STRAY.search(text)):
        raise BadRow("stray_role_marker", f"{field}: ...{text[max(0, found.start() - 20) : found.end() + 20]!r}")
