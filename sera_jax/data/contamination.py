"""Do prompts that are to be answered stand in rows that are trained on? Exactly, or by a run of thirteen words.

The check of GPT-3 (Brown et al. 2020, appendix C; PaLM's, Chowdhery et al. 2022, section 8, counts 8-grams), on words
without case and punctuation: the runs of letters and digits of the case-folded text in Unicode's form NFKC; of scripts
that put no space between words each character is one.

exact: a row's prompt has the words of the prompt, system turns left out.
ngram: thirteen words in a row of one of the prompt's user turns stand within a turn or an answer of a row; a turn of 8
    to 12 words is looked for whole, a shorter one is not. Words that more than ten rows have are a phrase: prompts that
    are found by such words alone are counted apart, as `common`.

Hashes of the prompts' words are in memory, and rows go by: the time is linear in the words of the rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sera_jax.data.chat import Prompt
from sera_jax.data.reasons import shorten

NGRAM, SHORTEST = 13, 8  # words
PHRASE = 10  # rows: words that more of them have are a phrase
EXAMPLES = 3  # of each group of prompts in each source
_AT_ONCE = 1 << 16  # words that are hashed together
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai, Lao, Burmese, kana, Han
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_ASCII = {code: " " for code in range(128) if not chr(code).isalnum()} | {c: c + 32 for c in range(65, 91)}
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no hash loses what it held
_MOST_BITS = 27


def words(text: str) -> list[str]:
    """The words of a text, see above."""
    if text.isascii():  # the same, some times quicker
        return text.translate(_ASCII).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Sought:
    """Prompts that are looked for.

    Args:
        prompts: (group, where it stands, prompt) of each; groups are counted apart.
    """

    def __init__(self, prompts: Iterable[tuple[str, str, Prompt]]) -> None:
        self.groups: dict[str, int] = {}
        self.group: list[str] = []
        self.where: list[str] = []
        self.says: list[str] = []
        self.whole: dict[str, list[int]] = defaultdict(list)
        texts, owners = [], []
        for index, (group, where, prompt) in enumerate(prompts):
            self.groups[group] = self.groups.get(group, 0) + 1
            self.group.append(group)
            self.where.append(where)
            last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            self.says.append(shorten(" ".join(last.split())))
            turns = _turns(prompt)
            if whole := _whole(turns):
                self.whole[whole].append(index)
            for role, said in turns:
                if role == "user" and len(said) >= SHORTEST:
                    texts.append(said)
                    owners.append(index)
        self.sizes = sorted({min(len(said), NGRAM) for said in texts})
        own = np.array([min(len(said), NGRAM) for said in texts], np.int64)
        grams, of = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for size, hashes, at, (text, _) in _windows(texts, self.sizes):
            mine = own[text[at]] == size
            grams.append(hashes[mine])
            of.append(np.array(owners)[text[at[mine]]])
        self.keys, self.gram = np.unique(np.concatenate(grams), return_inverse=True)
        self.owner = np.concatenate(of)
        bits = min(max(16, (16 * len(self.keys)).bit_length()), _MOST_BITS)
        self._shift = np.uint64(64 - bits)
        self._known = np.zeros(1 << bits, bool)
        self._known[self.keys >> self._shift] = True

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places of those hashes that are sought, which of `keys` each is)."""
        place = np.flatnonzero(self._known[hashes >> self._shift])
        at = np.searchsorted(self.keys, hashes[place])
        at[at == len(self.keys)] = 0
        found = self.keys[at] == hashes[place] if len(self.keys) else np.zeros(0, bool)
        return place[found], at[found]


@dataclasses.dataclass
class _Buffer:
    """Rows that are not hashed yet: their texts as words, the row of each text, and how many words there are."""

    texts: list[list[str]] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    wheres: dict[int, str] = dataclasses.field(default_factory=dict)
    count: int = 0


class Search:
    """Rows of one source that are looked through for what is `sought`."""

    def __init__(self, sought: Sought) -> None:
        self._sought, self._buffer = sought, _Buffer()
        self._rows = 0
        self._counts = np.zeros(len(sought.keys), np.int64)
        self._rows_of: dict[int, list[int]] = defaultdict(list)  # of keys that are no phrase yet
        self._said: dict[int, str] = {}  # words of a key
        self._exact: dict[int, list[int]] = defaultdict(list)  # prompt -> rows
        self._where: dict[int, str] = {}

    def add(self, where: str, prompt: Prompt, answers: Sequence[str]) -> None:
        """One row: where it stands, and what it says."""
        said = _turns(prompt)
        buffer, row = self._buffer, self._rows
        self._rows += 1
        for index in self._sought.whole.get(_whole(said), ()):
            self._where[row] = where
            self._exact[index].append(row)
        texts = [*(turn for _, turn in said), *map(words, answers)]
        buffer.texts += texts
        buffer.rows += [row] * len(texts)
        buffer.count += sum(map(len, texts))
        buffer.wheres[row] = where
        if buffer.count >= _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        buffer, self._buffer = self._buffer, _Buffer()
        row_of, total = np.array(buffer.rows), len(self._counts)
        for size, hashes, at, (text, start) in _windows(buffer.texts, self._sought.sizes):
            place, key = self._sought.find(hashes)
            both, first = np.unique(row_of[text[at[place]]] * total + key, return_index=True)
            rows, keys, places = both // max(total, 1), both % max(total, 1), at[place[first]]
            for row, key, word in zip(rows.tolist(), keys.tolist(), places.tolist()):
                self._counts[key] += 1
                if self._counts[key] <= PHRASE:
                    self._rows_of[key].append(row)
                    self._where.setdefault(row, buffer.wheres[row])
                    if key not in self._said:
                        said = buffer.texts[text[word]]
                        self._said[key] = " ".join(said[start[word] : start[word] + size])

    def found(self) -> dict[str, dict[str, Any]]:
        """group -> `prompts` (that are sought), of which `exact`, `ngram` (not exact) and `common` (by phrases alone)
        are found; `rows` in which the first two are, and `examples` of them."""
        self._flush()
        sought, count = self._sought, self._counts[self._sought.gram]
        near: dict[int, int] = {}  # prompt -> a key that shows it
        for owner, key in zip(
            *(part[(count > 0) & (count <= PHRASE)].tolist() for part in (sought.owner, sought.gram))
        ):
            near.setdefault(owner, key)
        phrases = set(sought.owner[count > PHRASE].tolist()) - near.keys() - self._exact.keys()
        out: dict[str, dict[str, Any]] = {}
        for group, prompts in sought.groups.items():
            mine = {index for index in (*near, *self._exact) if sought.group[index] == group}
            exact = mine & self._exact.keys()
            rows = {row for index in exact for row in self._exact[index]}
            hit = np.isin(sought.owner, list(mine)) & (count > 0) & (count <= PHRASE)
            rows.update(row for key in set(sought.gram[hit].tolist()) for row in self._rows_of[key])
            out[group] = {
                "prompts": prompts,
                "exact": len(exact),
                "ngram": len(mine) - len(exact),
                "common": sum(sought.group[index] == group for index in phrases),
                "rows": len(rows),
                "examples": [self._example(index, near) for index in sorted(mine)[:EXAMPLES]],
            }
        return out

    def _example(self, index: int, near: dict[int, int]) -> dict[str, str]:
        sought = self._sought
        example = {"prompt": sought.where[index], "says": sought.says[index]}
        if index in self._exact:
            return example | {"row": self._where[self._exact[index][0]], "by": "exact"}
        key = near[index]
        return example | {"row": self._where[self._rows_of[key][0]], "by": "ngram", "words": self._said[key]}


def _turns(prompt: Prompt) -> list[tuple[str, list[str]]]:
    """(role, words) of each turn."""
    if isinstance(prompt, str):
        return [("user", words(prompt))]
    return [(turn["role"], words(turn["content"])) for turn in prompt]


def _whole(turns: Sequence[tuple[str, list[str]]]) -> str:
    """All that a prompt says, but for system turns, as words."""
    return " ".join(word for role, said in turns if role != "system" for word in said)


def _windows(
    texts: Sequence[Sequence[str]], sizes: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]]:
    """Of each size (in words, ascending): (size, u64 hash of every run of so many words within a text, the word that
    each starts at, of all words (the text, the place in it))."""
    lengths = np.array([len(said) for said in texts], np.int64)
    total = int(lengths.sum())
    hashes = np.fromiter(map(hash, itertools.chain.from_iterable(texts)), np.int64, total).view(np.uint64)
    text = np.repeat(np.arange(len(texts)), lengths)
    start = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    room = np.repeat(lengths, lengths) - start
    value = np.zeros(total, np.uint64)
    for size in range(1, max(sizes, default=0) + 1):
        if size > total:
            return
        value = value[: total - size + 1] * _BASE + hashes[size - 1 :]
        if size in sizes:
            whole = np.flatnonzero(room[: len(value)] >= size)
            mixed = value[whole] ^ (value[whole] >> np.uint64(31))
            yield size, mixed * _BASE, whole, (text, start)
