"""Items that lie in flat arrays, as on disk: an `Item` is made where one is asked for. Numpy only.

A selection of stored items is the places of the items and what is shown of each: all of it, one response, the whole as
one text, or the prompt alone. Selections are cheap, and what is asked of many at once (lengths, keys, digests) is
answered from the arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence, Set
from typing import Any, TypeVar, cast

import numpy as np

from sera_jax.data.items import KEY_BYTES, Item, Lengths, PairItem, items_digest, lengths_of, prompt_keys

SIDES = ("chosen", "rejected")
_TAILS = tuple(f"/{side}\0".encode() for side in SIDES)
_AT_ONCE = 1024  # items that are hashed at a time
_OFFLINE = (((0, 1),), ((1, 0),))

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """Items one after the other, each its prompt and then its responses, as many in all.

    Attributes:
        tokens: i32[N] of all items. lengths: i32[n, 1 + K] of the prompt and each response.
        ids: u8[...] UTF-8 of all ids; id_ends: i64[n] where each ends.
        contents: u8[n, 32] `content_key` of each prompt; keys: u8[n, 16] its `prompt_key`.
        openings: u8[m, 32] of all items; opening_ends: i64[n].
    """

    tokens: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    id_ends: np.ndarray
    contents: np.ndarray
    keys: np.ndarray
    openings: np.ndarray
    opening_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """i64[n]: where each item's tokens begin."""
        ends = np.cumsum(self.lengths.sum(1, dtype=np.int64))
        return np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends

    def id(self, place: int) -> str:
        start = int(self.id_ends[place - 1]) if place else 0
        return self.ids[start : int(self.id_ends[place])].tobytes().decode()

    def openings_of(self, place: int) -> tuple[str, ...]:
        start = int(self.opening_ends[place - 1]) if place else 0
        return tuple(key.tobytes().hex() for key in self.openings[start : int(self.opening_ends[place])])


class _Selection(Sequence[T]):
    """A sequence that is made element by element."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.make(int(index) % len(self))

    def __iter__(self) -> Iterator[T]:
        return (self.make(i) for i in range(len(self)))

    def make(self, index: int) -> T:
        raise NotImplementedError

    def take(self, places: np.ndarray) -> Any:
        """The elements at these places, in their order."""
        raise NotImplementedError


class Items(_Selection[Item]):
    """Stored items.

    Args:
        places: i64[n] in the store.
        side: i8[n] the one response that is shown of each; None: all.
        bare: without responses. text: prompt and response as one text, see `as_text`.
        renamed: bool[n] whose id gets "new/" before it; None: none's.
    """

    def __init__(
        self,
        stored: Stored,
        places: np.ndarray,
        *,
        side: np.ndarray | None = None,
        bare: bool = False,
        text: bool = False,
        renamed: np.ndarray | None = None,
    ) -> None:
        self.stored, self.places = stored, places
        self._side, self._bare, self._text, self._renamed = side, bare, text, renamed

    def __len__(self) -> int:
        return len(self.places)

    def make(self, index: int) -> Item:
        stored, place = self.stored, int(self.places[index])
        ends = (stored.starts[place] + np.cumsum(stored.lengths[place])).tolist()
        tokens = stored.tokens
        prompt = np.asarray(tokens[int(stored.starts[place]) : ends[0]])
        responses = tuple(np.asarray(tokens[a:b]) for a, b in itertools.pairwise(ends))
        if self._bare:
            responses = ()
        elif self._side is not None:
            responses = (responses[self._side[index]],)
        if self._text:
            rest = np.concatenate([prompt[1:], *responses]).astype(np.int32)
            prompt, responses = prompt[:1], (rest,)
        content = stored.contents[place].tobytes().hex()
        return Item(self.id(index), prompt, responses, content, stored.openings_of(place))

    def id(self, index: int) -> str:
        name = self.stored.id(int(self.places[index]))
        if self._side is not None:
            name = f"{name}/{SIDES[self._side[index]]}"
        return f"new/{name}" if self._renamed is not None and self._renamed[index] else name

    def take(self, places: np.ndarray) -> Items:
        return self._shown(
            self.places[places],
            side=None if self._side is None else self._side[places],
            renamed=None if self._renamed is None else self._renamed[places],
        )

    def with_side(self, places: np.ndarray, side: np.ndarray) -> Items:
        """One response each of the items at these places, named as its row named it."""
        return self._shown(self.places[places], side=side)

    def as_texts(self) -> Items:
        return self._shown(self.places, text=True)

    def renamed(self, which: np.ndarray) -> Items:
        """With "new/" before the ids of some, bool[n]."""
        return self._shown(self.places, renamed=which)

    def unique_prompts(self) -> Items:
        """Each prompt once, without responses, in order."""
        _, first = np.unique(self.token_keys().view(f"V{KEY_BYTES}").ravel(), return_index=True)
        return self._shown(self.places[np.sort(first)], side=None, bare=True, renamed=None)

    def _shown(self, places: np.ndarray, **changes: Any) -> Items:
        now = dict(side=self._side, bare=self._bare, text=self._text, renamed=self._renamed) | changes
        return Items(self.stored, places, **now)

    def token_keys(self) -> np.ndarray:
        """u8[n, 16]: `prompt_key` of each whole prompt."""
        return self.stored.keys[self.places]

    def contents(self) -> np.ndarray:
        """u8[n, 32]: `content_key` of each."""
        return self.stored.contents[self.places]

    def lengths(self) -> Lengths:
        found = self.stored.lengths[self.places].astype(np.int64)
        prompt, responses = found[:, 0], found[:, 1:]
        if self._bare:
            responses = responses[:, :0]
        elif self._side is not None:
            responses = np.take_along_axis(responses, self._side[:, None].astype(np.int64), axis=1)
        if self._text:
            prompt, responses = np.ones_like(prompt), prompt[:, None] - 1 + responses.sum(1, keepdims=True)
        return Lengths(prompt, np.full(len(found), responses.shape[1], np.int64), responses.ravel())

    def digest(self) -> str:
        """`items_digest`, once."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        if self._text:
            return items_digest(list(self))
        total = hashlib.sha256()
        for start in range(0, len(self), _AT_ONCE):
            total.update(b"".join(self._hashed(slice(start, start + _AT_ONCE))))
        return total.hexdigest()

    def _hashed(self, some: slice) -> list[Any]:
        """What `items_digest` takes of some items: each id, and each part with its length."""
        stored, places = self.stored, self.places[some]
        sizes = stored.lengths[places].astype(np.int64)
        begins = stored.starts[places][:, None] + np.cumsum(sizes, axis=1) - sizes
        tails = [b"\0"] * len(places)
        if self._bare:
            sizes, begins = sizes[:, :1], begins[:, :1]
        elif self._side is not None:
            shown = np.stack([np.zeros(len(places), np.int64), 1 + self._side[some].astype(np.int64)], axis=1)
            sizes, begins = (np.take_along_axis(values, shown, axis=1) for values in (sizes, begins))
            tails = [_TAILS[side] for side in self._side[some].tolist()]
        fronts = [b""] * len(places)
        if self._renamed is not None:
            fronts = [b"new/" if named else b"" for named in self._renamed[some].tolist()]
        ids, tokens = memoryview(stored.ids), memoryview(stored.tokens)
        stops = stored.id_ends[places].tolist()
        id_starts = np.where(places > 0, stored.id_ends[places - 1], 0).tolist()
        count, heads = sizes.shape[1], memoryview(sizes.astype("<u4").tobytes())
        spans = list(zip(begins.ravel().tolist(), (begins + sizes).ravel().tolist(), strict=True))
        pieces: list[Any] = []
        for k, (front, begin, stop, tail) in enumerate(zip(fronts, id_starts, stops, tails, strict=True)):
            pieces += (front, ids[begin:stop], tail)
            for part in range(k * count, (k + 1) * count):
                first, last = spans[part]
                pieces += (heads[4 * part : 4 * part + 4], tokens[first:last])
        return pieces


class Pairs(_Selection[PairItem]):
    """Stored items of two responses as pairs of weight 1.

    Args:
        items: of all of their responses. flipped: bool[n] of label noise. ref_logp: f32[n, 2], or None.
    """

    def __init__(self, items: Items, flipped: np.ndarray | None = None, ref_logp: np.ndarray | None = None) -> None:
        self.items, self.ref_logp = items, ref_logp
        self.flipped = np.zeros(len(items), bool) if flipped is None else flipped

    def __len__(self) -> int:
        return len(self.items)

    def make(self, index: int) -> PairItem:
        flipped = bool(self.flipped[index])
        reference = None if self.ref_logp is None else self.ref_logp[index]
        return PairItem(self.items.make(index), _OFFLINE[flipped], reference, flipped=flipped)

    def take(self, places: np.ndarray) -> Pairs:
        places = np.asarray(places, np.int64)
        reference = None if self.ref_logp is None else self.ref_logp[places]
        return Pairs(self.items.take(places), self.flipped[places], reference)

    def flip(self, which: np.ndarray) -> Pairs:
        """With chosen and rejected exchanged where `which`, bool[n]."""
        return Pairs(self.items, self.flipped ^ which, self.ref_logp)

    def first_choice(self, values: np.ndarray) -> np.ndarray:
        """Values of both responses, [n, 2], those of the chosen one first."""
        return np.where(self.flipped[:, None], values[:, ::-1], values)

    def preferred(self) -> np.ndarray:
        """i8[n]: which response each pair prefers."""
        return self.flipped.astype(np.int8)


class Joined(_Selection[T]):
    """Two sequences one after the other."""

    def __init__(self, first: Sequence[T], second: Sequence[T]) -> None:
        self.parts = (first, second)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def make(self, index: int) -> T:
        first, second = self.parts
        return first[index] if index < len(first) else second[index - len(first)]

    def take(self, places: np.ndarray) -> list[T]:
        return [self.make(int(place)) for place in places]

    def lengths(self) -> Lengths:
        """Of items."""
        both = [lengths_of(cast(Sequence[Item], part)) for part in self.parts]
        names = [field.name for field in dataclasses.fields(Lengths)]
        return Lengths(*(np.concatenate([getattr(one, name) for one in both]) for name in names))


def joined(first: Sequence[T], second: Sequence[T]) -> Sequence[T]:
    """The one and then the other."""
    return Joined(first, second) if len(second) else first


def parts_of(entries: Sequence[T]) -> Sequence[Sequence[T]]:
    """What stands one after the other in it."""
    return entries.parts if isinstance(entries, Joined) else (entries,)


def items_of(pairs: Sequence[PairItem]) -> Sequence[Item]:
    """The items of pairs."""
    if isinstance(pairs, Joined):
        return Joined(*map(items_of, pairs.parts))
    return pairs.items if isinstance(pairs, Pairs) else [pair.item for pair in pairs]


def pair_counts(pairs: Sequence[PairItem]) -> np.ndarray:
    """i64[n]: pairs of each entry."""
    if isinstance(pairs, Joined):
        return np.concatenate([pair_counts(part) for part in pairs.parts])
    if isinstance(pairs, Pairs):
        return np.ones(len(pairs), np.int64)
    return np.array([len(pair.pairs) for pair in pairs], np.int64)


def with_reference(pairs: Sequence[PairItem], logps: Any) -> Sequence[PairItem]:
    """The pairs with the reference log-probs f32[len(responses)] of each."""
    if isinstance(pairs, Pairs):
        return Pairs(pairs.items, pairs.flipped, np.asarray(logps, np.float32).reshape(len(pairs), 2))
    return [dataclasses.replace(pair, ref_logp=logp) for pair, logp in zip(pairs, logps, strict=True)]


def chosen_from(entries: Sequence[T], places: np.ndarray) -> Sequence[T]:
    """The entries at these places, in their order."""
    if isinstance(entries, _Selection):
        return entries.take(np.asarray(places, np.int64))
    return [entries[i] for i in places]


def id_of(items: Sequence[Item], index: int) -> str:
    """The id of one of them."""
    return items.id(index) if isinstance(items, Items) else items[index].id


def content_texts(entries: Sequence[Any]) -> list[bytes]:
    """The content key of each stored entry, as text; [] where they are not stored, or there are none."""
    items = entries.items if isinstance(entries, Pairs) else entries
    if not isinstance(items, Items):
        return []
    text, size = items.contents().tobytes().hex().encode(), 2 * items.stored.contents.shape[1]
    return [text[start : start + size] for start in range(0, len(text), size)]


def keys_of(entries: Sequence[Any]) -> set[str | bytes]:
    """What the prompts of the entries are known by."""
    items = entries.items if isinstance(entries, Pairs) else entries
    if isinstance(items, Items):
        return {*(key.tobytes() for key in items.token_keys()), *(text.decode() for text in content_texts(items))}
    return {key for entry in items for key in prompt_keys(entry.item if isinstance(entry, PairItem) else entry)}


def known(entries: Sequence[Any], keys: Set[str | bytes]) -> np.ndarray:
    """bool[n]: whether the prompt of each entry is known by one of the keys."""
    items = entries.items if isinstance(entries, Pairs) else entries
    if not isinstance(items, Items):
        found = (prompt_keys(entry.item if isinstance(entry, PairItem) else entry) for entry in items)
        return np.array([bool(own & keys) for own in found], bool)
    contents = {bytes.fromhex(key) for key in keys if isinstance(key, str)}
    prompts = {key for key in keys if isinstance(key, bytes)}
    return _among(items.contents(), contents) | _among(items.token_keys(), prompts)


def _among(rows: np.ndarray, keys: Set[bytes]) -> np.ndarray:
    """bool[n]: whether each row of bytes u8[n, w] is one of the keys; the first eight bytes tell of most."""
    begun = np.ascontiguousarray(rows[:, :8]).view(np.uint64).ravel()
    found = np.isin(begun, np.array([int.from_bytes(key[:8], sys.byteorder) for key in keys], np.uint64))
    found[found] = [rows[i].tobytes() in keys for i in np.flatnonzero(found)]
    return found


def flipped(pairs: Sequence[PairItem]) -> np.ndarray:
    """bool[n]: which were exchanged by label noise."""
    return pairs.flipped if isinstance(pairs, Pairs) else np.array([pair.flipped for pair in pairs], bool)


def lengths_of_pairs(pairs: Sequence[PairItem]) -> np.ndarray:
    """i64[n, 2]: tokens of the chosen and the rejected response of each entry's first pair."""
    if isinstance(pairs, Pairs):
        return pairs.first_choice(pairs.items.lengths().responses.reshape(-1, 2))
    return np.array([[len(pair.item.responses[k]) for k in pair.pairs[0]] for pair in pairs])


def trained_on(pairs: Sequence[PairItem]) -> list[Any]:
    """[pairs, weight, reference log-probs] of each entry."""
    if isinstance(pairs, Pairs):
        sides = [_OFFLINE[int(side)] for side in pairs.flipped]
        references = [None] * len(pairs) if pairs.ref_logp is None else pairs.ref_logp.tolist()
        return [[side, 1.0, reference] for side, reference in zip(sides, references, strict=True)]
    return [[p.pairs, p.weight, None if p.ref_logp is None else np.asarray(p.ref_logp).tolist()] for p in pairs]
