"""Encode text in which only marked parts may be control tokens.

A copy of the tokenizer knows its control tokens under names that no text holds; the parts written by a template have
theirs renamed, contents stay as they are. The whole is encoded in one piece, so the tokens at the seams are those of
ordinary encoding, and a content that spells a control token is cut into pieces of text like any other.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import numpy as np
import tokenizers

# Unicode noncharacters: never assigned, so practically never in text; where one is, the next is used.
_MARKERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
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
        self._backends: dict[tuple[str, bool], tuple[tokenizers.Tokenizer, np.ndarray, np.ndarray]] = {}
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
            backend, original, watched = self._backend(marker, start)
            written, wanted = zip(*(self._escape(texts[index].pieces, marker) for index in members))
            encodings = backend.encode_batch_fast(list(written), add_special_tokens=False)
            for index, encoding, asked in zip(members, encodings, wanted, strict=True):
                results[index] = _checked(texts[index], np.array(encoding.ids, np.int32), asked, original, watched)
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

    def _backend(self, marker: str, start: bool) -> tuple[tokenizers.Tokenizer, np.ndarray, np.ndarray]:
        if (marker, start) not in self._backends:
            self._backends[marker, start] = self._build(marker, start)
        return self._backends[marker, start]

    def _build(self, marker: str, start: bool) -> tuple[tokenizers.Tokenizer, np.ndarray, np.ndarray]:
        """A tokenizer that knows control tokens under other names, the ids that its own mean i32[ids], and which of
        its own are control tokens bool[ids]."""
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
        return backend, original.astype(np.int32), np.isin(original, list(self._watched))


def _checked(
    text: Text, ids: np.ndarray, wanted: list[int], original: np.ndarray, watched: np.ndarray
) -> np.ndarray | PromptRefused:
    """The ids of a text as the tokenizer numbers them; refused where a control token is one that no template wrote."""
    marked = watched[ids]
    ids = original[ids]
    if (ids[marked].tolist() if marked.any() else []) != wanted:
        return PromptRefused("a content was encoded to a control token by this tokenizer's own model; drop the row")
    ids = ids[text.skip :]
    return ids if text.end is None else np.append(ids, np.int32(text.end))


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
