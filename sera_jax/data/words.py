"""Tokens of a text as those of its words, each asked of the tokenizer once.

Most tokenizers cut a text into words by a regular expression before their model sees it, so that the tokens of a word
are the same wherever it stands. Most words of a corpus are few: with what they gave kept, a text costs its cutting. The
expression is read from the tokenizer and holds for characters whose classes no version of Unicode changes; on these
it is compared with the tokenizer before it is used. Whatever is not plainly of that kind is left to the tokenizer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Western text: Latin letters as far as U+024F, but for the long s, which case folding makes an s; marks and signs.
_LETTERS, _NUMBERS, _SPACES = "A-Za-zªµºÀ-ÖØ-öø-žƀ-ɏ", "0-9²³¹¼-¾", r"\t-\r "
_KNOWN = re.compile("[\\x00-\\x7f¡-žƀ-ɏ‐-‧‰-⁞←-⌨⌫-⏿]*")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PART = re.compile(r"\\p\{\w+\}|\\.|\[\^?|\]|.", re.DOTALL)  # of such an expression
_CLASSES = {r"\p{L}": _LETTERS, r"\p{N}": _NUMBERS, r"\s": _SPACES, r"\r": r"\r", r"\n": r"\n"}
_KEPT = 1 << 18  # words
_FEW = 32  # added tokens that each text is searched for


class Words:
    """What `cut_by` found out of a tokenizer, and the words so far.

    Args:
        stages: each cuts every piece of the one before.
        encode: the tokens of one word, i32[n]; None where it is not to be had so.
        apart: names that are tokens wherever they stand, so that a text which holds one is no text of words.
    """

    def __init__(
        self, stages: Sequence[re.Pattern[str]], encode: Callable[[str], np.ndarray | None], apart: Sequence[str]
    ) -> None:
        self._stages, self._encode, self._apart = tuple(stages), encode, tuple(apart)
        self._tokens = _Tokens(self._learn)

    def tokens(self, text: str) -> bytes | None:
        """The i32 tokens of the text, as bytes; None where only the tokenizer knows."""
        if not (text.isascii() or _KNOWN.fullmatch(text)) or any(name in text for name in self._apart):
            return None
        try:
            return b"".join(map(self._tokens.__getitem__, self._cut(text)))
        except _Unknown:
            return None

    def _cut(self, text: str) -> list[str]:
        first, *others = self._stages
        words = first.findall(text)
        for stage in others:
            words = [word for piece in words for word in stage.findall(piece)]
        return words

    def _learn(self, word: str) -> bytes:
        found = self._encode(word) if self._cut(word) == [word] else None
        if found is None:
            raise _Unknown
        if len(self._tokens) >= _KEPT:
            self._tokens.clear()
        return found.astype(np.int32).tobytes()


class _Tokens(dict[str, bytes]):
    """The tokens of words, made where one is asked for the first time."""

    def __init__(self, make: Callable[[str], bytes]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, word: str) -> bytes:
        found = self[word] = self._make(word)
        return found


class _Unknown(Exception):
    """A word whose tokens the tokenizer must say in its text."""


def of_tokenizer(
    spec: Mapping[str, Any], encode: Callable[[str], np.ndarray | None], apart: Sequence[str]
) -> Words | None:
    """The words of a tokenizer, parsed from its tokenizer.json; None where texts are no rows of words. Arguments as of
    `Words`; `encode` also takes whole texts."""
    stages = _stages(spec.get("pre_tokenizer"))
    if not stages or spec.get("normalizer") not in (None, {"type": "NFC"}) or len(apart) > _FEW:
        return None
    if spec["model"].get("dropout"):
        return None
    words = Words(stages, encode, apart)
    for text in _trials():
        known, found = encode(text), words.tokens(text)
        if known is not None and found is not None and known.astype(np.int32).tobytes() != found:
            return None
    return words


def _stages(node: Any) -> list[re.Pattern[str]] | None:
    """The expressions that a pre-tokenizer cuts by, one after the other; None where it does anything else."""
    kind = node and node["type"]
    if kind == "Sequence":
        parts = [_stages(part) for part in node["pretokenizers"]]
        return None if None in parts else [stage for part in parts for stage in part or ()]
    if kind == "ByteLevel" and not node["add_prefix_space"]:
        return _compiled(_GPT2) if node.get("use_regex", True) else []
    if kind == "Digits":
        return [re.compile(f"[{_NUMBERS}]{'' if node['individual_digits'] else '+'}|[^{_NUMBERS}]+")]
    if kind == "Split" and (node["behavior"], node["invert"]) in (("Isolated", False), ("Removed", True)):
        return _compiled(node["pattern"].get("Regex"))
    return None


def _compiled(pattern: str | None) -> list[re.Pattern[str]] | None:
    """The expression in Python's words, of known characters; None where it has classes of others."""
    if pattern is None:
        return None
    out, within = [], False
    for part in _PART.findall(pattern):
        if (part.startswith("[") and not within) or part == "]":
            within = part != "]"
        elif part in _CLASSES:
            part = _CLASSES[part] if within else f"[{_CLASSES[part]}]"
        elif part == r"\S" and not within:
            part = f"[^{_SPACES}]"
        elif part.startswith("\\") and part[1].isalnum():
            return None
        out.append(part)
    try:
        made = re.compile("".join(out))
    except re.error:
        return None
    return None if made.groups else [made]


def _trials() -> list[str]:
    """Texts that hold every known character beside letters, digits, spaces and marks; and some of many drawn ones."""
    known = [chr(code) for code in range(0x2400) if _KNOWN.fullmatch(chr(code))]
    draw = random.Random(0)
    common = [*map(chr, range(0x20, 0x7F)), *" \n\t'", "'s", "'LL", "\r\n", "12345", "  ", "\n\n", "the", " a"]
    drawn = ["".join(draw.choices(common, k=60)) for _ in range(200)]
    return [f"a{c}b '{c}1{c} {c}{c}\n{c} {c}" for c in known] + drawn
