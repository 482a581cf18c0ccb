"""Lay items (a prompt and its responses) into rows of fixed length. Numpy only.

Whole items are placed by best-fit decreasing; rows that it leaves loose are tried again (`fitting`). The layout is
`core.Rows`: one copy of the prompt serves all responses of an item, or, with `share_prompt=False`, every response
carries its own copy in a segment of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sera_jax.core import Rows
from sera_jax.data.fitting import TIGHT_ITEMS, as_rows, fit_all, rows_of_all
from sera_jax.data.items import Item, lengths_of

Scores = list[np.ndarray] | np.ndarray  # f32[len(responses)] of every item; an array where each has as many


@dataclasses.dataclass(frozen=True)
class Layout:
    """How items are laid into rows; one for everything that a run scores and trains on.

    Attributes:
        row_tokens: T.
        share_prompt: one copy of the prompt serves all responses of an item; else each response has its own.
        multiple: steps are planned to fill a multiple of so many rows in each microbatch. Which pairs make a step
            depends on it, and not on the devices.
        shards: parts that the rows are spread over; a step is laid in a multiple of so many rows in each microbatch.
        microbatches: A; rows are dealt so that [R, ...] splits into [A, R / A, ...] of similar work.
        max_shapes: at most so many sizes of R are compiled for one kind of batch.
    """

    row_tokens: int
    share_prompt: bool = True
    multiple: int = 1
    shards: int = 1
    microbatches: int = 1
    max_shapes: int = 3

    def __post_init__(self) -> None:
        for name in ("row_tokens", "multiple", "shards", "microbatches", "max_shapes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def planned(self) -> int:
        """The planned rows of a step are a multiple of this."""
        return self.microbatches * self.multiple

    @property
    def dealt(self) -> int:
        """The equal parts that the rows of a step are dealt to; R is a multiple of it."""
        return self.microbatches * self.shards

    def laid(self, rows: int) -> int:
        """R for so many rows."""
        return -(-rows // self.dealt) * self.dealt

    def window(self, items: Sequence[Item]) -> int:
        """Static attention window of items that are laid so."""
        return window_for(items, self.row_tokens, self.share_prompt)

    def accumulated(self, microbatches: int) -> Layout:
        """The layout of batches that are trained on in so many microbatches; 0: in as many as memory asks for."""
        return dataclasses.replace(self, microbatches=max(1, microbatches))


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """The fixed sizes of a row: T tokens, M scored positions, K response slots, Q pairs."""

    row_tokens: int
    scored: int
    slots: int
    pairs: int = 0


class Slots(NamedTuple):
    """Where the slots of rows come from.

    Attributes:
        item: i32[R, K] index of the item in the list that was packed; -1 where the slot is empty.
        response: i32[R, K] index into that item's responses; -1 where the slot is empty.
    """

    item: np.ndarray
    response: np.ndarray


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows (numpy) and where their slots come from; `item` and `response` as in Slots."""

    rows: Rows
    item: np.ndarray
    response: np.ndarray

    @property
    def slots(self) -> Slots:
        return Slots(self.item, self.response)


def laid_tokens(item: Item, share_prompt: bool = True) -> int:
    """Tokens of a row that the item fills."""
    if share_prompt:
        return item.tokens
    return sum(len(item.prompt) + len(r) for r in item.responses)


def pack(
    items: Sequence[Item],
    row_tokens: int,
    share_prompt: bool = True,
    limits: RowSpec | None = None,
    pairs: Sequence[int] | None = None,
) -> list[list[int]]:
    """Rows of item indices, each row at most `row_tokens` tokens; deterministic.

    Args:
        items: what to pack; every item stays whole within one row.
        row_tokens: T.
        limits: rows also obey its `scored`, `slots` and `pairs`.
        pairs: pairs of each item (only read with `limits`); default none.

    Raises:
        ValueError: an item does not fit a row of its own; names its id, size and the limit.
    """
    sizes = sizes_of(items, share_prompt, pairs)
    check_sizes(sizes, items, row_tokens, share_prompt, limits)
    if limits is None and (len(items) > TIGHT_ITEMS or (len(items) and not sizes[:, 0].all())):
        rows = as_rows(rows_of_all(sizes[:, 0], row_tokens), sizes[:, 0])
    else:
        rows = fit_all(sizes, [np.arange(len(items))], room_of(row_tokens, limits))[0] if len(items) else ()
    return [list(row) for row in rows]


def sizes_of(items: Sequence[Item], share_prompt: bool, pairs: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """i64[n, 4]: (tokens, scored positions, slots, pairs) that each item takes of a row."""
    lengths = lengths_of(items)
    count = np.zeros(len(items), np.int64) if pairs is None else np.asarray(pairs, np.int64)
    return np.stack([lengths.laid(share_prompt), lengths.scored, lengths.counts, count], axis=1).reshape(-1, 4)


def check_sizes(
    sizes: np.ndarray, items: Sequence[Item], row_tokens: int, share_prompt: bool, limits: RowSpec | None = None
) -> None:
    """Raises ValueError for the first item that does not fit a row of its own; names its id, size and the limit."""
    for i in np.flatnonzero(sizes[:, 0] > row_tokens)[:1]:
        how = "with its prompt shared" if share_prompt else "with its prompt once per response"
        raise ValueError(
            f"item {items[int(i)].id!r} takes {sizes[i, 0]} tokens {how}, more than the {row_tokens} of a row; "
            f"raise the row length or truncate its prompt or responses"
        )
    if limits is None:
        return
    for axis, name in enumerate(("scored", "slots", "pairs"), 1):
        limit = _limits(limits)[axis]
        for i in np.flatnonzero(sizes[:, axis] > limit)[:1]:
            need = sizes[i, axis]
            raise ValueError(
                f"item {items[int(i)].id!r} needs {name}={need} of a row, more than the {limit} of {limits}"
            )


def room_of(row_tokens: int, limits: RowSpec | None) -> tuple[int, ...]:
    """What a row has room for, as `fitting` takes it."""
    return (row_tokens,) if limits is None else _limits(limits)


def _limits(spec: RowSpec) -> tuple[int, int, int, int]:
    return spec.row_tokens, spec.scored, spec.slots, spec.pairs


def build_rows(
    items: Sequence[Item], assignment: Sequence[Sequence[int]], spec: RowSpec, num_rows: int, share_prompt: bool = True
) -> Packed:
    """Lay the items out.

    Args:
        items: the list that `assignment` indexes.
        assignment: item indices of each row, at most `num_rows` rows; the remaining rows are padding.
        spec: T, M and K.
        num_rows: R.

    Raises:
        ValueError: the rows do not fit `num_rows` or `spec`.
    """
    if len(assignment) > num_rows:
        raise ValueError(f"{len(assignment)} rows of items do not fit num_rows={num_rows}; raise num_rows")
    length, width, slots = spec.row_tokens, spec.scored, spec.slots
    tokens, positions, segment, branch = (np.zeros((num_rows, length), np.int32) for _ in range(4))
    source, target = (np.zeros((num_rows, width), np.int32) for _ in range(2))
    slot = np.full((num_rows, width), slots, np.int32)
    owner, response = (np.full((num_rows, slots), -1, np.int32) for _ in range(2))
    steps = np.arange(length, dtype=np.int32)

    for r, row in enumerate(assignment):
        at = scored = k = seg = 0
        for i in row:
            item = items[i]
            prompt = len(item.prompt)
            _check_room(item, at + laid_tokens(item, share_prompt), scored, k, spec)
            base = at
            for b, answer in enumerate(item.responses):
                count = len(answer)
                if b == 0 or not share_prompt:
                    base, seg = at, seg + 1
                    at += prompt
                    tokens[r, base:at] = item.prompt
                    positions[r, base:at] = steps[:prompt]
                    segment[r, base:at] = seg
                end, last = at + count, scored + count
                tokens[r, at:end] = answer
                positions[r, at:end] = steps[prompt : prompt + count]
                segment[r, at:end] = seg
                branch[r, at:end] = b + 1 if share_prompt else 1
                # The first response token is predicted by the prompt's last token, each other one by the token before.
                source[r, scored] = base + prompt - 1
                source[r, scored + 1 : last] = steps[at : end - 1]
                target[r, scored:last] = answer
                slot[r, scored:last] = k
                owner[r, k], response[r, k] = i, b
                at, scored, k = end, last, k + 1
    rows = Rows(tokens, positions, segment, branch, source, target, slot, slots)
    return Packed(rows, owner, response)


def _check_room(item: Item, tokens: int, scored: int, slots: int, spec: RowSpec) -> None:
    scored += sum(len(r) for r in item.responses)
    slots += len(item.responses)
    for name, need, limit in zip(("row_tokens", "scored", "slots"), (tokens, scored, slots), _limits(spec)):
        if need > limit:
            raise ValueError(f"the row of item {item.id!r} needs {name}={need}, more than {limit}; pack with this spec")


def spec_for(
    items: Sequence[Item], assignment: Sequence[Sequence[int]], row_tokens: int, pairs: Sequence[int] | None = None
) -> RowSpec:
    """The smallest coarse spec that holds the rows, so that nearby data gives the same shapes.

    M goes up to the next eighth of the row, K and Q (which cost next to nothing) to the next power of two, at least 4.
    """
    sizes = sizes_of(items, True, pairs)[:, 1:]
    return rounded_spec(row_tokens, [sizes[list(row)].sum(0) for row in assignment])


def rounded_spec(row_tokens: int, taken: Sequence[np.ndarray] | np.ndarray) -> RowSpec:
    """The smallest coarse spec of rows that take so many (scored, slots, pairs) each."""
    scored, slots, count = np.max(taken, axis=0).tolist() if len(taken) else (0, 0, 0)
    step = max(row_tokens // 8, 1)
    scored = min(max(-(-scored // step), 1) * step, row_tokens)
    return RowSpec(row_tokens, scored, _power_of_two(slots), _power_of_two(count) if count else 0)


def _power_of_two(count: int) -> int:
    return max(4, 1 << max(count - 1, 0).bit_length())


def merge_specs(a: RowSpec | None, b: RowSpec) -> RowSpec:
    """The spec that holds the rows of both; it only ever grows.

    Raises:
        ValueError: the row lengths differ.
    """
    if a is None:
        return b
    if a.row_tokens != b.row_tokens:
        raise ValueError(f"row lengths {a.row_tokens} and {b.row_tokens} differ; keep one spec per row length")
    return RowSpec(a.row_tokens, max(a.scored, b.scored), max(a.slots, b.slots), max(a.pairs, b.pairs))


def scatter_scores(values: np.ndarray, packed: Packed, items: Sequence[Item]) -> Scores:
    """Slot values f32[R, K] back to f32[len(responses)] of every item; nan where `packed` lacks the response."""
    return gather_scores([values], [packed], items)


def gather_scores(values: Sequence[np.ndarray], packed: Sequence[Packed], items: Sequence[Item]) -> Scores:
    """Slot values of several packed batches, f32[R, K] each, to f32[len(responses)] of every item.

    nan where no batch holds the response.
    """
    scores = Gathering(items)
    for block, batch in zip(values, packed, strict=True):
        scores.take(batch.slots, block)
    return scores.by_item()


class Gathering:
    """Collects slot values of packed batches, see `gather_scores`."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._counts = lengths_of(items).counts
        self._starts = np.cumsum(self._counts) - self._counts
        self._flat = np.full(int(self._counts.sum()), np.nan, np.float32)

    def take(self, slots: Slots, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of one batch, f32[R, K]. Returns what `put` takes: the places of its responses among all, i64[n], and their
        values, f32[n]."""
        full = slots.item >= 0
        places, taken = self._starts[slots.item[full]] + slots.response[full], np.asarray(values)[full]
        self.put(places, taken)
        return places, taken

    def put(self, places: np.ndarray, values: np.ndarray) -> None:
        """Of responses, by their places among those of all items."""
        self._flat[places] = values

    def by_item(self) -> Scores:
        return _by_item(self._flat, self._counts)


def by_item(flat: np.ndarray, items: Sequence[Item]) -> Scores:
    """Values of all responses of all items, f32[...], as those of each item; one array where each has as many."""
    return _by_item(flat, lengths_of(items).counts)


def _by_item(flat: np.ndarray, counts: np.ndarray) -> Scores:
    if len(counts) and (counts == counts[0]).all():
        return flat.reshape(len(counts), int(counts[0]))
    return [flat[end - count : end] for end, count in zip(np.cumsum(counts).tolist(), counts.tolist(), strict=True)]


def window_for(items: Sequence[Item], row_tokens: int, share_prompt: bool = True) -> int:
    """Static attention window of these items: tokens of the longest, rounded up to 64, at most `row_tokens`."""
    lengths = lengths_of(items)
    if share_prompt:
        longest = int(lengths.laid(True).max(initial=1))
    else:
        longest = int((np.repeat(lengths.prompt, lengths.counts) + lengths.responses).max(initial=1))
    return rounded_window(longest, row_tokens)


def rounded_window(longest: int, row_tokens: int) -> int:
    """Static attention window for items of at most `longest` tokens: rounded up to 64, at most `row_tokens`."""
    return min(-(-longest // 64) * 64, row_tokens)


def padding_fraction(rows: Rows) -> float:
    """Share of the rows' tokens that is padding, rows of nothing but padding included."""
    return float(np.mean(np.asarray(rows.segment) == 0))


def shared_prompt_savings(items: Sequence[Item]) -> float:
    """Tokens laid with shared prompts over tokens if each response carried its prompt; 1 saves nothing."""
    return sum(item.tokens for item in items) / max(sum(laid_tokens(item, False) for item in items), 1)


def split_items(items: Sequence[Item], layout: Layout) -> list[Item]:
    """The same responses, in the same order, in items that fit a row; most items are one piece."""
    pieces: list[Item] = []
    for item in items:
        part: tuple[np.ndarray, ...] = ()
        for response in item.responses:
            together = Item("", item.prompt, (*part, response))
            if part and laid_tokens(together, layout.share_prompt) > layout.row_tokens:
                pieces.append(Item(f"{item.id}@{len(pieces)}", item.prompt, part))
                part = ()
            part = (*part, response)
        pieces.append(Item(f"{item.id}@{len(pieces)}", item.prompt, part))
    return pieces
