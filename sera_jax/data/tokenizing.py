"""Text to token ids: prompts exactly as generation is given them, responses as their continuation.

What holds for every tokenizer that is accepted:

* The prompt's tokens do not depend on the response, and a response is encoded as a continuation of the prompt: what
  the template puts between the two (often a space) belongs to the response, and nothing else is added. In particular
  plain text gets no space between prompt and response, and a SentencePiece tokenizer's dummy space is not put before
  a response that follows text.
* A control token is written by the template or by this module, never by a content: "</s>" in a message is text.
  Otherwise the tokens are those of the template's rendering encoded in one piece, seams included. Control tokens are
  the special tokens and those other added tokens that the template writes around contents.
* A prompt starts with BOS where it does outside: where the tokenizer's own chat template writes it; with plain text or
  a template that is given, where the tokenizer puts it before text by itself. `add_bos` may choose otherwise.
* `template` says all that is done, and `save` writes it with the tokenizer: transformers' apply_chat_template, or for
  plain text the call of the tokenizer, gives there the prompts that are given here. So a template that prints the date
  is given a fixed one, and one without a generation prompt gets what it writes before an answer.
* A complete response ends in `end_id`: the first control token that the template puts after an answer (with what it
  puts before that), else EOS. Where `end_id` is not EOS (ChatML on a base tokenizer), both stop generation.
* Nothing looks for padding: `pad_id` is only reported, and may equal EOS.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from sera_jax.data import chat
from sera_jax.data.chat import Prompt, Shape
from sera_jax.data.escaping import EscapingEncoder, PromptRefused, Text, attempt, not_empty, settle
from sera_jax.data.pretrained import from_pretrained

POLICY = "sera_jax tokenizing 2"  # part of the fingerprint: raise it when the same text gives other tokens
ADD_BOS = ("tokenizer", "always", "never")
THOUGHT_MARKS = ("<think>", "</think>")


class Tokenizer:
    """A transformers tokenizer under this project's rules for prompts and responses; make one with `load`.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_id, eos_id: ids, or None where the tokenizer has none.
        pad_id: the tokenizer's padding id, else EOS, else 0; for display, never searched for.
        end_id: the token that ends a complete response.
        stop_ids: sorted ids at which generation stops: `end_id` and EOS.
        template: text of the chat template in force, or None for plain text.
    """

    def __init__(self, tokenizer: Any, template: str | None, *, add_bos: str = "tokenizer", own: bool = False):
        self._hf = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._spec: dict[str, Any] = json.loads(self._backend.to_str())
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.pad_id: int = next(id for id in (tokenizer.pad_token_id, self.eos_id, 0) if id is not None)
        vocab = tokenizer.get_vocab()
        self.vocab_size: int = max(len(tokenizer), max(vocab.values()) + 1)
        first = self._plain_call("a")[:1] == [self.bos_id] and not (template and own)  # BOS of the tokenizer's own
        self._bos_first = {"tokenizer": first, "always": True, "never": False}[add_bos]
        if self._bos_first and self.bos_id is None:
            raise ValueError("add_bos='always', but the tokenizer has no BOS; set add_bos to 'tokenizer' or 'never'")
        self.template = self._in_force(template, refuse_late=add_bos != "never") if template else None
        self._chat = chat.ChatTemplate(self.template, self._render) if self.template else None
        control = {name: vocab[name] for name in self._control_tokens() if name in vocab}
        unknown = [tokenizer.unk_token] if tokenizer.unk_token is not None else []
        self._encoder = EscapingEncoder(self._spec, control, unknown)
        self._ends: dict[str, int] = {}
        self._control = frozenset(control.values())
        self.end_id: int = self._end_of(self._chat.shape(("user",)) if self._chat else None)
        self.stop_ids: tuple[int, ...] = tuple(
            sorted({self.end_id, self.end_id if self.eos_id is None else self.eos_id})
        )

    @classmethod
    def load(
        cls, path_or_id: str | pathlib.Path, chat_template: str | None = None, *, add_bos: str = "tokenizer"
    ) -> Tokenizer:
        """Load a tokenizer from a local folder or a hub id; code that comes with it is never run.

        Args:
            path_or_id: folder in transformers' format, or a hub id.
            chat_template: '' or None (the tokenizer's own; plain text if it has none), 'none' (plain text), 'hh' (the
                built-in Human/Assistant transcript), the path of a Jinja file, or a template's text.
            add_bos: `tokenizer` (BOS where the tokenizer or its own template writes it by itself), `always` (before
                every prompt, once), or `never` (none but what the template writes).

        Raises:
            ValueError: nothing usable there, or no token to end a response, with the way out.
        """
        tokenizer = from_pretrained(path_or_id)
        own = tokenizer.chat_template
        if isinstance(own, dict):
            if not chat_template and "default" not in own:
                raise ValueError(
                    f"tokenizer {str(path_or_id)!r} has the chat templates {sorted(own)} and no 'default'; "
                    "give one as chat_template (path or text), or choose 'hh' or 'none'"
                )
            own = own.get("default")
        template = chat.resolve(chat_template, own)
        return cls(tokenizer, template, add_bos=add_bos, own=template == own)

    def encode_prompt(self, prompt: Prompt) -> np.ndarray:
        """i32[P], P >= 1: the prompt as generation is given it.

        Args:
            prompt: text, or messages (`role`, `content`) ending with the user's turn. With a chat template, text is one
                user message; without one, a single user message is its text, and anything more is refused.

        Raises:
            PromptRefused: (a ValueError) the template or the text does not allow it; the message says why.
        """
        return self.encode_prompts([prompt])[0]

    def encode_prompts(
        self, prompts: Sequence[Prompt], refused: MutableMapping[int, str] | None = None
    ) -> list[np.ndarray]:
        """`encode_prompt` of many, in batches.

        Args:
            prompts: as for `encode_prompt`.
            refused: where given, takes index -> reason of the prompts that cannot be encoded; their places in the
                result are empty arrays. Otherwise the first of them raises.
        """
        results = self._encode([attempt(self._prompt_text, prompt) for prompt in prompts])
        return settle([self._with_bos(result) for result in results], refused)

    def encode_response(self, prompt: Prompt, text: str, complete: bool = True) -> np.ndarray:
        """i32[n], n >= 1: the response as a continuation of the prompt; it ends in `end_id` if complete.

        Raises:
            PromptRefused: (a ValueError) as for `encode_prompt`, or an empty text that is not complete.
        """
        return self.encode_responses([prompt], [text], complete)[0]

    def encode_responses(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        complete: bool = True,
        refused: MutableMapping[int, str] | None = None,
    ) -> list[np.ndarray]:
        """`encode_response` of many, in batches; `refused` as for `encode_prompts`."""
        jobs = [
            attempt(self._response_text, prompt, text, complete) for prompt, text in zip(prompts, texts, strict=True)
        ]
        return settle([not_empty(result, "the response has no tokens") for result in self._encode(jobs)], refused)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, control tokens skipped; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(self._plain(ids), skip_special_tokens=True)

    def decode_response(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of a response's ids, the inverse of `encode_response`.

        What the template puts around an answer (the space of 'Assistant: ...') is taken off where it is there, and an
        answer's own leading space, which `decode` loses with SentencePiece tokenizers, is kept.
        """
        text = self._continuation(self._plain(ids)).removeprefix(self._lead)
        if self._chat is not None:
            before_end, end = self._encoder.split(self._chat.shape(("user",)).after)
            text = text.removesuffix(before_end) if end is not None and len(ids) and ids[-1] == self.end_id else text
        return text

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return self._hf.get_vocab()

    def fingerprint(self) -> str:
        """sha256 (hex) over the tokenizer's content, the template and this module's rules."""
        parts = {
            "policy": POLICY,
            "tokenizer": {**self._spec, "post_processor": None},  # what it does to prompts is said below
            "ids": [self.bos_id, self.eos_id, self.end_id, sorted(self._control)],
            "template": self.template,
            "bos_first": self._bos_first and self._chat is None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | pathlib.Path) -> None:
        """Write the tokenizer with the template in force, in transformers' format.

        apply_chat_template, or for plain text the call of the tokenizer, then gives the prompts that are given here.
        """
        own, self._hf.chat_template = self._hf.chat_template, self.template
        processor = self._backend.post_processor
        try:
            if self._chat is None and self._plain_call("a") != self.encode_prompt("a").tolist():
                self._backend.post_processor = self._processor()
            self._hf.save_pretrained(str(folder))
        finally:
            self._hf.chat_template, self._backend.post_processor = own, processor

    def _plain_call(self, text: str) -> list[int]:
        """The ids that transformers' own call of the tokenizer gives."""
        return self._hf(text)["input_ids"]

    def _processor(self) -> tokenizers.processors.PostProcessor:
        """What puts BOS, or nothing, before plain text, and nothing after it."""
        if not self._bos_first:
            return tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
        bos = self._hf.bos_token
        single, pair = [f"{bos}:0", "$A:0"], [f"{bos}:0", "$A:0", f"{bos}:1", "$B:1"]
        return tokenizers.processors.TemplateProcessing(single=single, pair=pair, special_tokens=[(bos, self.bos_id)])

    def _prompt_text(self, prompt: Prompt) -> Text:
        if self._chat is None:
            text = _plain_prompt(prompt)
            if not text and not self._bos_first:
                raise PromptRefused("the prompt is empty and there is no BOS to begin with; give it some text")
            return Text(((False, text),))
        shape, contents = self._chat.contents(_as_messages(prompt))
        return Text(_interleaved(shape.prompt, contents))

    def _response_text(self, prompt: Prompt, text: str, complete: bool) -> Text:
        if self._chat is None:
            return Text(((False, text),), start=not _plain_prompt(prompt), end=self.end_id if complete else None)
        shape, said = self._answer(_as_messages(prompt), text)
        if shape.after not in self._ends:
            self._ends[shape.after] = self._end_of(shape)
        if self._ends[shape.after] != self.end_id:
            raise PromptRefused(
                "the chat template ends this answer with another token than others; use another template"
            )
        before_end, end = self._encoder.split(shape.after)
        pieces = list(said)
        if complete and end is not None:
            pieces.append((True, before_end + end))
        # A control token right before the response conditions its first token (some tokenizers put a space there).
        anchor = self._encoder.trailing(shape.prompt[-1])
        return Text(
            tuple([(True, anchor), *pieces] if anchor else pieces),
            start=bool(anchor),
            skip=1 if anchor else 0,
            end=self.end_id if complete and end is None else None,
        )

    def _answer(self, prompt: chat.Messages, text: str) -> tuple[Shape, list[tuple[bool, str]]]:
        """The prompt's shape, and what follows the generation prompt, up to the answer's end.

        An answer that opens with its thoughts is what generation would write: the template's own rendering where that
        shows them, else the thoughts from where the generation prompt leaves off. What a template writes in place of
        thoughts (an empty pair of marks) stands before an answer without any.
        """
        assert self._chat is not None
        shape = self._chat.shape(tuple(turn["role"] for turn in prompt))
        if thinks := text.lstrip().startswith("<think>") and "</think>" in text:
            if shape.opens and "<think>" not in shape.lead:
                try:  # a template that does not look at thoughts
                    return shape, [(True, shape.lead), (False, self._chat.contents(prompt, text)[1][-1])]
                except PromptRefused:
                    pass
            written = self._chat.continuation(prompt, text).removesuffix(shape.after)
            if "".join(written.split()) == "".join(text.split()):
                text = written
            before, _, rest = text.partition("<think>")
            thought, _, rest = rest.partition("</think>")
            opened = shape.prompt[-1].rstrip().endswith("<think>")
            if opened and shape.prompt[-1].endswith("\n"):
                thought = thought.removeprefix("\n")
            lead = [] if opened else [(True, shape.lead.partition("<think>")[0]), (False, before), (True, "<think>")]
            return shape, [*lead, (False, thought), (True, "</think>"), (False, rest)]
        if not shape.opens and not thinks:
            raise PromptRefused(
                f"the chat template's generation prompt ends in {shape.prompt[-1][-40:]!r}, but its own rendering of "
                f"an answer opens with {shape.full[-2][-40:]!r}: an answer would stand where the model "
                "is never asked for one. Give answers that begin with <think>...</think>, or choose another "
                "data.chat_template"
            )
        shape, contents = self._chat.contents(prompt, text)
        return shape, [(True, shape.lead), (False, contents[-1])]

    def spells_control(self, text: str) -> bool:
        """Whether a content holds a control token's name, which is text there. (Marks of thoughts are not meant.)"""
        before, name = self._encoder.split(text)
        return name is not None and (name not in THOUGHT_MARKS or self.spells_control(text[len(before) + len(name) :]))

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """i32[n] of texts for pretraining: no template, BOS where plain text gets it, and the end of a response."""
        results = self._encode([Text(((False, text),), end=self.end_id) for text in texts])
        bos = [] if self.bos_id is None or not self._bos_first else [np.array([self.bos_id], np.int32)]
        return [np.concatenate([*bos, ids]) for ids in settle(results, None)]

    def _encode(self, jobs: Sequence[Text | PromptRefused]) -> list[np.ndarray | PromptRefused]:
        encoded = iter(self._encoder.encode([job for job in jobs if isinstance(job, Text)]))
        return [next(encoded) if isinstance(job, Text) else job for job in jobs]

    def _with_bos(self, ids: np.ndarray | PromptRefused) -> np.ndarray | PromptRefused:
        if isinstance(ids, PromptRefused):
            return ids
        if self._bos_first and self._chat is None:
            ids = np.concatenate([np.array([self.bos_id], np.int32), ids])
        return not_empty(ids, "the prompt has no tokens")

    def _control_tokens(self) -> list[str]:
        """Special tokens, and other added tokens that the template itself writes around contents."""
        added = {token["content"]: token for token in self._spec["added_tokens"]}
        special = {name for name, token in added.items() if token["special"]} | set(self._hf.all_special_tokens)
        written = ""
        if self._chat is not None:
            shape = self._chat.shape(("user",))
            written = "\0".join([*shape.prompt, *shape.full])
        others = {name for name in added if name in written and not name.isspace()}
        return sorted(special | others)

    def _end_of(self, shape: Shape | None) -> int:
        _, end = self._encoder.split(shape.after) if shape is not None else ("", None)
        token = end if end is not None else self._hf.eos_token
        if token is None:
            raise ValueError(
                "no token ends a response: the tokenizer has no EOS and the chat template writes no special token "
                "after an answer; set eos_token in tokenizer_config.json or choose a template that ends the turn"
            )
        return self._hf.convert_tokens_to_ids(token)

    def _in_force(self, template: str, *, refuse_late: bool) -> str:
        """The template, with all in its text that is done to prompts here.

        Raises:
            ValueError: it doubles BOS, or (`refuse_late`) writes it after other text, a start that nothing else has.
        """
        cut = chat.ChatTemplate(template, self._render)
        template, shape, bos = cut.source, cut.shape(("user",)), self._hf.bos_token
        if shape.header:
            template = chat.with_generation_prompt(template, shape.header)
        first = shape.prompt[0]
        if bos and (first.startswith(bos + bos) or (refuse_late and bos in first and not first.startswith(bos))):
            raise ValueError(
                f"the chat template begins with {first[:80]!r}: BOS {bos!r} must come once and first, or not at all "
                "(data.add_bos says whether it is added); correct the template and give it as chat_template"
            )
        return chat.with_bos(template) if self._bos_first and not first.startswith(bos) else template

    def _plain(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        control = self._control
        return [id for id in (ids.tolist() if isinstance(ids, np.ndarray) else map(int, ids)) if id not in control]

    def _continuation(self, ids: list[int]) -> str:
        """Decode ids as the middle of a text, so that a decoder that strips the first space does not."""
        if self._spec["decoder"] is None or not ids:
            return self._backend.decode(ids)
        letter = self._letter
        return self._backend.decode([*letter, *ids]).removeprefix(self._backend.decode(letter))

    @functools.cached_property
    def _lead(self) -> str:
        """What decoding shows before an answer's own text: the template's, or a space of the tokenizer's."""
        try:
            text = self._continuation(self._plain(self.encode_response("x", "a", complete=False)))
        except PromptRefused:  # no answer without thoughts can follow this generation prompt
            return ""
        return text.removesuffix("a") if text.endswith("a") else ""

    @functools.cached_property
    def _letter(self) -> list[int]:
        """One token of plain letters to decode a continuation after; empty if there is none."""
        written = ((id, self._backend.decode([id])) for id in range(self.vocab_size))
        return next(([id] for id, text in written if text.isascii() and text.isalpha()), [])

    def _render(self, source: str, messages: list[dict[str, str]], generation: bool) -> str:
        return self._hf.apply_chat_template(
            messages, chat_template=source, add_generation_prompt=generation, tokenize=False, return_dict=False
        )


def _as_messages(prompt: Prompt) -> chat.Messages:
    return [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def _plain_prompt(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    roles = [message["role"] for message in prompt]
    if roles != ["user"]:
        raise PromptRefused(
            f"messages with the roles {roles} need a chat template and there is none; set data.chat_template to 'hh' "
            "(Human/Assistant transcript) or to a Jinja template"
        )
    return prompt[0]["content"]


def _interleaved(pieces: Sequence[str], contents: Sequence[str]) -> tuple[tuple[bool, str], ...]:
    pairs = zip(pieces, [*contents, ""], strict=True)
    return tuple(part for piece, content in pairs for part in ((True, piece), (False, content)) if part[1])
