"""Encode text in which only marked parts may be control tokens.

A copy of the tokenizer knows its control tokens under names that no text holds; the parts written by a template have
theirs renamed, contents stay as they are. The whole is encoded in one piece, so the tokens at the seams are those of
ordinary encoding, and a content that spells a control token is cut into pieces of text like any other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from sera_jax import processor
from sera_jax.data import words

# Unicode noncharacters: never assigned, so practically never in text; where one is, the next is used.
_MARKERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
# Texts that are worth finding out whether a tokenizer's words can be had apart; and cores on which encoding whole texts
# side by side, as tokenizers does by itself, is faster by the clock, at four times the work.
_MANY, _MANY_CORES = 64, 5
_CACHED_WORDS = 1 << 18  # of which a backend remembers the tokens; by itself 10,000, fewer than a corpus has


class PromptRefused(ValueError):
    """A conversation or text that cannot be encoded faithfully; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Text:
    """One text to encode.

    Attributes:
        pieces: (written by a template, text) in order.
        start: the text begins a sequence, so the tokenizer may put its dummy space before it.
        skip: tokens to drop from the front (a control token that was only there to condition the next).
        end: token id to append; None for none.
    """

    pieces: tuple[tuple[bool, str], ...]
    start: bool = True
    skip: int = 0
    end: int | None = None


class EscapingEncoder:
    """Encodes `Text`s; a control token comes out exactly where a template's piece wrote it.

    Args:
        spec: the tokenizer as parsed tokenizer.json.
        control: control token -> its id.
        unknown: strings of tokens that a content may produce although they are special (the unknown token).
    """

    def __init__(self, spec: dict[str, Any], control: dict[str, int], unknown: Iterable[str] = ()):
        self._spec = spec
        self._control = control
        self._names = list(control)
        self._index = {name: index for index, name in enumerate(self._names)}
        self._watched = {id for name, id in control.items() if name not in set(unknown)}
        self._pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
        self._begin = {name[:1] for name in control}
        self._written: dict[tuple[str, str], tuple[str, list[int]]] = {}
        self._backends: dict[tuple[str, bool], _Backend] = {}
        flags = {token["content"]: token for token in spec["added_tokens"]}
        odd = [name for name in control if flags.get(name, {}).get("single_word")]
        if odd:
            raise ValueError(f"control tokens {odd} match whole words only (single_word), which is not supported")
        self._strips_right = {name for name in control if flags.get(name, {}).get("rstrip")}

    def split(self, text: str) -> tuple[str, str | None]:
        """The text before its first control token and that token; (text, None) if it has none."""
        if not any(first in text for first in self._begin):
            return text, None
        match = self._pattern.search(text)
        return (text, None) if match is None else (text[: match.start()], match.group())

    def trailing(self, text: str) -> str:
        """The control token that ends a template's text, '' if it ends in ordinary text."""
        matches = list(self._pattern.finditer(text))
        if not matches:
            return ""
        name, rest = matches[-1].group(), text[matches[-1].end() :]
        return name if not rest or (rest.isspace() and name in self._strips_right) else ""

    def encode(self, texts: Sequence[Text]) -> list[np.ndarray | PromptRefused]:
        """i32[n] for each text, or why it cannot be encoded."""
        results: list[np.ndarray | PromptRefused] = [np.zeros(0, np.int32)] * len(texts)
        groups: dict[tuple[str, bool], list[int]] = {}
        for index, text in enumerate(texts):
            reason = _unusable(text)
            if reason:
                results[index] = PromptRefused(reason)
                continue
            others = [piece for _, piece in text.pieces if not piece.isascii()]
            marker = next((m for m in _MARKERS if not any(m in piece for piece in others)), None)
            if marker is None:
                results[index] = PromptRefused("the text holds every Unicode noncharacter U+FDD0..U+FDEF; remove them")
                continue
            groups.setdefault((marker, text.start), []).append(index)
        for (marker, start), members in groups.items():
            if (marker, start) not in self._backends:
                self._backends[marker, start] = self._build(marker, start)
            backend = self._backends[marker, start]
            by_words = (
                backend.by_words if len(members) >= _MANY and processor.cores() < _MANY_CORES else lambda text: None
            )
            left: list[tuple[int, str, list[int]]] = []
            for index in members:
                written, wanted = self._escape(texts[index].pieces, marker)
                if (found := by_words(written)) is None:
                    left.append((index, written, wanted))
                else:
                    results[index] = _finished(texts[index], found)
            encodings = backend.of.encode_batch_fast([written for _, written, _ in left], add_special_tokens=False)
            for (index, _, wanted), encoding in zip(left, encodings, strict=True):
                results[index] = backend.checked(texts[index], np.array(encoding.ids, np.int32), wanted)
        return results

    def _escape(self, pieces: Sequence[tuple[bool, str]], marker: str) -> tuple[str, list[int]]:
        """The text with the control tokens that a template wrote under other names, and their ids."""
        texts: list[str] = []
        ids: list[int] = []
        for template, piece in pieces:
            if template:
                piece, found = self._renamed(piece, marker)
                ids += found
            texts.append(piece)
        return "".join(texts), ids

    def _renamed(self, piece: str, marker: str) -> tuple[str, list[int]]:
        """The same of one piece of a template, of which there are few."""
        if (known := self._written.get((piece, marker))) is None:
            names = self._pattern.findall(piece)
            ids = [self._control[name] for name in names]
            text = self._pattern.sub(lambda match: f"{marker}{self._index[match.group()]}{marker}", piece)
            known = self._written[piece, marker] = text, [id for id in ids if id in self._watched]
        return known

    def _build(self, marker: str, start: bool) -> _Backend:
        spec = dict(self._spec, added_tokens=[], post_processor=None, truncation=None, padding=None)
        if not start:
            spec["normalizer"] = _without_dummy_space(spec["normalizer"])
            spec["pre_tokenizer"] = _without_dummy_space(spec["pre_tokenizer"])
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        vocab = backend.get_vocab(with_added_tokens=False)
        if vocab and max(vocab.values()) >= len(vocab):
            raise ValueError("the tokenizer's vocabulary has unused ids between used ones, which is not supported")
        added = {token["content"]: token for token in self._spec["added_tokens"]}
        kept = [(token["content"], token["content"]) for token in added.values() if token["content"] not in self._index]
        renamed = [(name, f"{marker}{index}{marker}") for name, index in self._index.items()]
        originals = {}
        for name, written in kept + renamed:
            flags = added.get(name, dict(id=self._control.get(name), normalized=False, special=True))
            token = tokenizers.AddedToken(
                written,
                lstrip=flags.get("lstrip", False),
                rstrip=flags.get("rstrip", False),
                single_word=flags.get("single_word", False),
                normalized=flags["normalized"],
                special=flags["special"],
            )
            add = backend.add_special_tokens if flags["special"] else backend.add_tokens
            add([token])
            originals[backend.token_to_id(written)] = flags["id"]
        if (resize := getattr(backend.model, "_resize_cache", None)) is not None:  # of models that have one
            resize(_CACHED_WORDS)
        original = np.arange(max([*vocab.values(), *originals], default=0) + 1)
        original[list(originals)] = list(originals.values())
        plain = {written: self._control[name] for name, written in renamed if not _reaches_out(added.get(name, {}))}
        return _Backend(
            of=backend,
            original=original.astype(np.int32),
            watched=np.isin(original, list(self._watched)),
            spec=spec,
            others=[name for name, _ in kept],
            split=re.compile(f"({marker}[0-9]+{marker})").split,
            control={written: np.int32(id).tobytes() for written, id in plain.items()},
        )


@dataclasses.dataclass(frozen=True)
class _Backend:
    """A tokenizer that knows control tokens under other names.

    Attributes:
        of: the tokenizer. original: i32[ids] what its ids mean; watched: bool[ids] which of them are control tokens.
        spec, others: what it was made of, and its added tokens but the control tokens.
        split: cuts a text into contents and control tokens, one after the other.
        control: the id, as i32 bytes, of each control token that takes no white space around it, by its other name.
    """

    of: tokenizers.Tokenizer
    original: np.ndarray
    watched: np.ndarray
    spec: dict[str, Any]
    others: Sequence[str]
    split: Callable[[str], list[str]]
    control: dict[str, bytes]

    @functools.cached_property
    def words(self) -> words.Words | None:
        return words.of_tokenizer(self.spec, self.of_content, self.others)

    def of_content(self, text: str) -> np.ndarray | None:
        """The ids of a text without control tokens; None where it gets one."""
        ids = np.array(self.of.encode(text, add_special_tokens=False).ids, np.int32)
        return None if self.watched[ids].any() else self.original[ids]

    def by_words(self, written: str) -> bytes | None:
        """The ids of a text as i32 bytes, made of those of its words; None where that cannot be."""
        if self.words is None:
            return None
        found: list[bytes] = []
        for k, part in enumerate(self.split(written)):
            ids = self.control.get(part) if k % 2 else self.words.tokens(part)
            if ids is None:
                return None
            found.append(ids)
        return b"".join(found)

    def checked(self, text: Text, ids: np.ndarray, wanted: list[int]) -> np.ndarray | PromptRefused:
        """The ids of a text as the tokenizer numbers them; refused where a control token is one that no template
        wrote."""
        marked = self.watched[ids]
        ids = self.original[ids]
        if (ids[marked].tolist() if marked.any() else []) != wanted:
            return PromptRefused("a content was encoded to a control token by this tokenizer's own model; drop the row")
        return _finished(text, ids.tobytes())


def _reaches_out(flags: dict[str, Any]) -> bool:
    return flags.get("lstrip", False) or flags.get("rstrip", False)


def _finished(text: Text, ids: bytes) -> np.ndarray:
    """i32[n]: without what was there only to condition the rest, and with the end."""
    return np.frombuffer(ids + (b"" if text.end is None else np.int32(text.end).tobytes()), np.int32)[text.skip :]


def attempt(make: Callable[..., Text], *args: Any) -> Text | PromptRefused:
    """What `make` gives, or why not."""
    try:
        return make(*args)
    except PromptRefused as error:
        return error


def not_empty(ids: np.ndarray | PromptRefused, reason: str) -> np.ndarray | PromptRefused:
    return ids if isinstance(ids, PromptRefused) or len(ids) else PromptRefused(reason)


def settle(results: Sequence[np.ndarray | PromptRefused], refused: MutableMapping[int, str] | None) -> list[np.ndarray]:
    settled = []
    for index, result in enumerate(results):
        if isinstance(result, PromptRefused):
            if refused is None:
                raise result
            refused[index] = str(result)
            result = np.zeros(0, np.int32)
        settled.append(result)
    return settled


def _unusable(text: Text) -> str | None:
    for _, piece in text.pieces:
        if not isinstance(piece, str):
            return f"a content is {type(piece).__name__}, not text"
        if piece.isascii():
            continue
        try:
            piece.encode()
        except UnicodeEncodeError:
            return "the text holds half of a surrogate pair, which is no Unicode text"
    return None


def _without_dummy_space(node: Any) -> Any:
    """A normalizer or pre-tokenizer without its rule to put a space before the text."""
    if node is None or node["type"] == "Prepend":
        return None
    if node["type"] == "Metaspace":
        return dict(node, prepend_scheme="never")
    if node["type"] == "ByteLevel":
        return dict(node, add_prefix_space=False)
    if node["type"] == "Sequence":
        key = "normalizers" if "normalizers" in node else "pretokenizers"
        parts = [_without_dummy_space(part) for part in node[key]]
        return {"type": "Sequence", key: [part for part in parts if part is not None]}
    return node
