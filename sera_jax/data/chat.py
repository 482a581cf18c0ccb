"""Chat templates as literal pieces around the contents, so that the two can be encoded under different rules.

A template is rendered once per sequence of roles with placeholders for the contents and cut at the placeholders; what
lies between them is the template's own text. Every real conversation is then compared with the template's rendering of
it, so a template that inspects or rewrites what is said is noticed instead of being approximated.
"""

from __future__ import annotations

import dataclasses
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from sera_jax.data import opaque
from sera_jax.data.escaping import PromptRefused

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages

HH = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ '\n\nHuman: ' + message['content'] }}
{%- elif message['role'] == 'assistant' -%}{{ '\n\nAssistant: ' + message['content'] }}
{%- elif message['role'] == 'system' and loop.first -%}{{ message['content'] }}
{%- else -%}{{ raise_exception("the hh transcript has no role '" + message['role'] + "' at this place") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '\n\nAssistant:' }}{%- endif -%}
"""

# A run must not depend on the day it is started, so templates that print today's date are given this one.
_FIXED_DATE = {
    "%d": "26",
    "%B": "July",
    "%b": "Jul",
    "%m": "07",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
    "%a": "Fri",
    "%H": "00",
    "%M": "00",
    "%S": "00",
}
# An unusual space that str.strip removes: whether it survives beside a placeholder says whether a content is trimmed.
_SPACE = "\u2003"
PROBE_SECONDS = 20.0  # for three renderings of placeholders, which take milliseconds
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a template writes around the contents of one sequence of roles.

    Attributes:
        prompt: literal texts around the prompt's contents, one more than contents; the last ends with the
            generation prompt.
        full: the same with the assistant's answer as last content and without generation prompt.
        order, full_order: which message each content is: a template may move the system message, or leave it out where
            an answer follows.
        prompt_trims, full_trims: for each content, whether the template strips its (left, right) end.
        header: part of `prompt` that the template writes only before an answer, when it has no generation prompt.
        lead: what the template puts between the generation prompt and the answer (often nothing or a space).
        after: what the template puts after the answer.
        opens: the generation prompt is how the template opens an answer.
    """

    prompt: tuple[str, ...]
    full: tuple[str, ...]
    order: tuple[int, ...]
    full_order: tuple[int, ...]
    prompt_trims: tuple[tuple[bool, bool], ...]
    full_trims: tuple[tuple[bool, bool], ...]
    header: str
    lead: str
    after: str
    opens: bool


class ChatTemplate:
    """A Jinja chat template and the shapes of the role sequences seen so far.

    Args:
        source: the template's text.
        render: `render(source, messages, add_generation_prompt) -> str`, the sandboxed renderer.
    """

    def __init__(self, source: str, render: Callable[[str, list[dict[str, str]], bool], str]):
        self.source = with_fixed_date(source)
        self._renderer = render
        self._shapes: dict[tuple[str, ...], Shape] = {}
        self._copies = opaque.copies_contents(self.source)

    def shape(self, roles: tuple[str, ...]) -> Shape:
        """The literal pieces for a prompt with these roles; PromptRefused where the template cannot be cut."""
        if roles not in self._shapes:
            self._shapes[roles] = self._cut(roles)
        return self._shapes[roles]

    def contents(self, messages: Messages, answer: str | None = None) -> tuple[Shape, list[str]]:
        """The shape of a prompt and its contents as the template writes them (stripped where it strips).

        Args:
            messages: the prompt, ending with the user's turn.
            answer: the assistant's answer; None for the prompt alone.

        Raises:
            PromptRefused: the template's own rendering of this conversation is not its pieces around the contents.
        """
        roles = tuple([message["role"] for message in messages])
        if not roles:
            raise PromptRefused("the prompt has no messages; a prompt needs at least one user message")
        if roles[-1] == "assistant":
            raise PromptRefused("the prompt ends with an assistant message; end it with the user's turn")
        shape = self.shape(roles)
        texts = [message["content"] for message in messages]
        if not all(isinstance(text, str) for text in texts):
            raise PromptRefused("a message's content is not text; only text can be trained on")
        pieces, trims, order = shape.prompt, shape.prompt_trims, shape.order
        if answer is not None:
            texts.append(answer)
            pieces, trims, order = shape.full, shape.full_trims, shape.full_order
        if self._copies:  # the rendering is known
            return shape, [_strip(texts[index], trim) for index, trim in zip(order, trims, strict=True)]
        said = zip((*roles, "assistant"), texts)
        turns = [dict(role=role, content=text) for role, text in said]
        rendered = self._render(turns, answer is None) + (shape.header if answer is None else "")
        for said in (texts, _without_thoughts(texts, roles)):
            stripped = [_strip(said[index], trim) for index, trim in zip(order, trims, strict=True)]
            if rendered == interleave(pieces, stripped):
                return shape, stripped
        raise PromptRefused(
            f"the chat template rewrites the content of this conversation (roles {list(roles)}), so the "
            "two cannot be told apart; drop the row, or set data.chat_template to 'hh' or a simpler template"
        )

    def continuation(self, messages: Messages, answer: str) -> str:
        """What the template's own rendering writes after the generation prompt; '' where it does not continue it."""
        turns = [dict(role=turn["role"], content=turn["content"]) for turn in messages]
        asked = self._render(turns, True)
        answered = self._render([*turns, dict(role="assistant", content=answer)], False)
        return answered.removeprefix(asked) if answered.startswith(asked) else ""

    def _render(self, messages: list[dict[str, str]], generation: bool) -> str:
        # Templates raise whatever they like (their own exceptions, jinja errors, TypeErrors on missing tokens).
        try:
            return self._renderer(self.source, messages, generation)
        except Exception as error:
            roles = [message["role"] for message in messages]
            raise PromptRefused(
                f"the chat template refuses the roles {roles}: {error}; set data.chat_template to 'hh' or "
                "another template"
            ) from error

    def _cut(self, roles: tuple[str, ...]) -> Shape:
        marks = [f"Zq{index:04d}placeholder" for index in range(len(roles) + 1)]
        turns = [
            dict(role=role, content=_SPACE + mark + _SPACE)
            for role, mark in zip((*roles, "assistant"), marks, strict=True)
        ]
        bare, asked, answered = _in_time(
            lambda: (self._render(turns[:-1], False), self._render(turns[:-1], True), self._render(turns, False))
        )
        prompt, prompt_trims, order = _split(asked, marks[:-1], roles)
        # a system message that stands before the last user turn only while that is the last of all
        lost = [
            k for k, role in enumerate(roles) if role == "system" and marks[k] in asked and marks[k] not in answered
        ]
        full, full_trims, full_order = _split(answered, marks, (*roles, "assistant"), lost)
        if full_order[-1] != len(roles):
            raise _reorders(len(roles), (*roles, "assistant"))
        opens = full[-2].startswith(prompt[-1])
        header, lead = "", full[-2].removeprefix(prompt[-1]) if opens else ""
        if full[: len(roles)] == prompt[:-1] and lead.strip() and _split(bare, marks[:-1], roles)[0] == prompt:
            # No generation prompt: what the template writes before an answer is the prompt's, up to a last space.
            header = lead.rstrip(" ")
            lead = lead.removeprefix(header)
            prompt = (*prompt[:-1], prompt[-1] + header)
        return Shape(prompt, full, order, full_order, prompt_trims, full_trims, header, lead, full[-1], opens)


def with_fixed_date(source: str) -> str:
    """The template with one date in place of today's, so that a run does not depend on the day it is started."""
    if "strftime_now" not in source or "macro strftime_now(" in source:
        return source
    body = "format" + "".join(f" | replace('{code}', '{text}')" for code, text in _FIXED_DATE.items())
    return "{%- macro strftime_now(format) -%}{{ " + body + " }}{%- endmacro -%}" + source


def with_bos(source: str) -> str:
    """The template with BOS before all that it writes."""
    # the comment keeps white space at the template's start where it was, at the start of a line
    return "{{ bos_token }}" + ("{##}\n" if source[:1].isspace() else "") + source


def with_generation_prompt(source: str, header: str) -> str:
    """The template with a generation prompt, which it lacks: the text that it writes before an answer."""
    return source.removesuffix("\n") + "{{ " + ascii(header) + " if add_generation_prompt else '' }}"


def resolve(value: str | None, own: str | None) -> str | None:
    """The template text that a `data.chat_template` value means; None for plain text.

    Args:
        value: '' or None (the tokenizer's own, plain text if it has none), 'none', 'hh', the path of a Jinja file or
            the text of a template.
        own: the tokenizer's own template.
    """
    if not value:
        return own or None
    if value == "none":
        return None
    if value == "hh":
        return HH
    if "{{" in value or "{%" in value:
        return value
    path = pathlib.Path(value).expanduser()
    if not path.is_file():
        raise ValueError(
            f"chat_template {value!r} is not a file; choose '' (the tokenizer's own), 'none' (plain text), 'hh', the "
            "path of a Jinja file, or the text of a template"
        )
    return path.read_text(encoding="utf-8")


def _in_time(work: Callable[[], T]) -> T:
    """What `work` gives; PromptRefused where it takes longer than any template needs, as one with loops within loops.

    It goes on in its thread, which does not keep the process alive: nothing can stop it.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise PromptRefused(
            f"the chat template is not done with a short conversation after {PROBE_SECONDS} seconds; "
            "set data.chat_template to 'hh' or another template"
        )
    return results[0]


def interleave(pieces: Sequence[str], contents: Sequence[str]) -> str:
    """pieces[0] contents[0] pieces[1] ... as one text; one more piece than contents."""
    return "".join(piece + content for piece, content in zip(pieces, [*contents, ""], strict=True))


def _strip(text: str, trim: tuple[bool, bool]) -> str:
    left, right = trim
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def _without_thoughts(texts: Sequence[str], roles: Sequence[str]) -> list[str]:
    """The contents as templates write them that take thoughts out of earlier answers; a last one keeps its own."""
    earlier = zip(texts, roles)  # the answer, if any, has no role
    said = [text.split("</think>")[-1].lstrip("\n") if role == "assistant" else text for text, role in earlier]
    return [*said, *texts[len(roles) :]]


def _reorders(index: int, roles: Sequence[str]) -> PromptRefused:
    return PromptRefused(
        f"the chat template reorders the content of message {index + 1} of {list(roles)}; set data.chat_template to "
        "'hh' or a template that writes every content once and the answer last"
    )


def _split(
    text: str, marks: Sequence[str], roles: Sequence[str], lost: Sequence[int] = ()
) -> tuple[tuple[str, ...], tuple[tuple[bool, bool], ...], tuple[int, ...]]:
    """(pieces, trims, order) of a rendering cut at its placeholders; each must be there once, but those of `lost`. Only
    system messages may stand at another place than their own."""
    kept = [index for index in range(len(marks)) if index not in lost]
    for index in kept:
        if text.count(marks[index]) != 1:
            verb = "leaves out or changes" if marks[index] not in text else "repeats"
            raise PromptRefused(
                f"the chat template {verb} the content of message {index + 1} of {list(roles)}; set data.chat_template "
                "to 'hh' or a template that writes every content once and in order"
            )
    order = sorted(kept, key=lambda index: text.index(marks[index]))
    spoken = [index for index in order if roles[index] != "system"]
    if spoken != sorted(spoken):
        raise _reorders(next(a for a, b in zip(spoken, sorted(spoken)) if a != b), roles)
    pieces, trims, start = [], [], 0
    for index in order:
        mark = marks[index]
        at = text.index(mark)
        left = not text[:at].endswith(_SPACE)
        right = not text[at + len(mark) :].startswith(_SPACE)
        pieces.append(text[start : at if left else at - len(_SPACE)])
        start = at + len(mark) + (0 if right else len(_SPACE))
        trims.append((left, right))
    return (*pieces, text[start:]), tuple(trims), tuple(order)
