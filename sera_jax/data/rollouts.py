"""Rollouts in packed rows, and which prompts an iteration rolls out. Numpy only; pure functions of the iteration.

An iteration's shapes follow from its own rollouts: of the few lengths and numbers of rows, those that lay the least
filling. The shapes before are kept where they hold the rollouts without much of it. They are a part of the training
state, so a restart goes on with the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sera_jax.core import Stream, rng_for
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout, Packed, build_rows, laid_tokens, merge_specs, pack, spec_for
from sera_jax.data.planning import deal_rows

Shape = tuple[int, int, int, int]  # R, T, M, K of a minibatch
NO_SHAPE: Shape = (0, 0, 0, 0)
_STEPS = (4, 5, 6, 7)  # sizes of R and T are these times powers of two: at most a fifth of the rows is filling
_LENGTHS = 64  # T is a multiple of so many tokens, or as long as a row may be
_LOOSE = 1.3  # an earlier shape that has more than this many times the tokens needed is given up


@dataclasses.dataclass(frozen=True)
class PromptSchedule:
    """The prompts of every iteration: each source is gone through in a fresh order again and again.

    Attributes:
        sft, new: prompts that have demonstrations, and prompts that have none.
        overlap: share of an iteration's prompts that come from `sft`.
        per_iteration: prompts of an iteration.
    """

    sft: Sequence[Item]
    new: Sequence[Item]
    overlap: float
    per_iteration: int
    seed: int

    @property
    def sft_per_iteration(self) -> int:
        return round(self.overlap * self.per_iteration)

    def prompts(self, iteration: int) -> list[Item]:
        """Prompts of an iteration >= 1, without responses; ids name the pass over the source, so none comes twice.

        Raises:
            ValueError: a source that prompts are to come from is empty.
        """
        counts = (self.sft_per_iteration, self.per_iteration - self.sft_per_iteration)
        return [
            item
            for source, (pool, count) in enumerate(zip((self.sft, self.new), counts, strict=True))
            for item in self._take(source, pool, count, (iteration - 1) * count)
        ]

    def _take(self, source: int, pool: Sequence[Item], count: int, start: int) -> list[Item]:
        if count and not pool:
            name = ("demonstrations", "new prompts")[source]
            raise ValueError(
                f"ppo.prompt_overlap={self.overlap} takes {count} prompts of an iteration from the {name}, of which "
                "there are none; give some, or change ppo.prompt_overlap"
            )
        out: list[Item] = []
        order, known = np.zeros(0, np.int64), -1  # of the lap that the last place lies in
        for place in range(start, start + count):
            lap, index = divmod(place, len(pool))
            if lap != known:
                order = rng_for(self.seed, Stream.PROMPTS, source, lap).permutation(len(pool))
                known = lap
            item = pool[order[index]]
            out.append(Item(f"{item.id}#{lap}", item.prompt, ()))
        return out


def lay_rollouts(
    items: Sequence[Item], parts: int, layout: Layout, *, seed: int, iteration: int, earlier: Shape = NO_SHAPE
) -> list[Packed]:
    """An iteration's rollouts as `parts` minibatches of the same shape, with as many items each, drawn at random.

    Rows are as long as lays the fewest tokens, at most the layout's: a minibatch of a few short answers in rows that
    were made for pairs is mostly filling.

    Args:
        items: prompts with their responses; a multiple of `parts`.
        earlier: shape of the iteration before, kept if it holds these rollouts; a new shape costs a compilation.

    Returns:
        Packed rows whose `item` indexes `items`.

    Raises:
        ValueError: an item does not fit a row.
    """
    assert len(items) % parts == 0, "the config's rules make the rollouts divisible by the minibatches"
    order = rng_for(seed, Stream.SHUFFLE, int(Stream.PROMPTS), iteration).permutation(len(items))
    draws = np.split(order, parts)
    groups = [[items[i] for i in draw] for draw in draws]
    rows, length, packed = _laid(groups, layout, earlier)
    spec = None
    for group, assigned in zip(groups, packed, strict=True):
        spec = merge_specs(spec, spec_for(group, assigned, length))
    assert spec is not None
    if (rows, length) == earlier[:2]:
        spec = dataclasses.replace(spec, scored=max(spec.scored, earlier[2]), slots=max(spec.slots, earlier[3]))
    out = []
    for draw, group, assigned in zip(draws, groups, packed, strict=True):
        work = [sum(laid_tokens(group[i], layout.share_prompt) for i in row) for row in assigned]
        laid = build_rows(group, deal_rows(assigned, work, layout.dealt, rows), spec, rows, layout.share_prompt)
        item = np.where(laid.item >= 0, draw[laid.item], -1).astype(np.int32)
        out.append(dataclasses.replace(laid, item=item))
    return out


_Laid = tuple[int, int, list[list[list[int]]]]  # R, T, and the items of each row of each minibatch


def _laid(groups: Sequence[Sequence[Item]], layout: Layout, earlier: Shape) -> _Laid:
    """The minibatches in the shape before, or in the one of fewest tokens; of equal ones the one of longer rows, whose
    scored positions have less filling."""
    sizes = [[laid_tokens(item, layout.share_prompt) for item in group] for group in groups]
    longest, most = max(map(max, sizes)), max(map(sum, sizes))

    def laid(length: int) -> _Laid:
        packed = [pack(group, length, layout.share_prompt) for group in groups]
        return rounded_rows(max(map(len, packed)), layout.dealt), length, packed

    lengths = [t for t in coarse_sizes(_LENGTHS, layout.row_tokens // _LENGTHS) if longest <= t < layout.row_tokens]
    best: _Laid | None = None
    full = ((rounded_rows(-(-most // t), layout.dealt) * t, t) for t in (*lengths, layout.row_tokens))
    for bound, length in sorted(full):
        if best is not None and bound > best[0] * best[1]:
            break  # not even full rows of this length, or of those that follow, are fewer tokens
        found = laid(length)
        if best is None or (found[0] * length, -length) < (best[0] * best[1], -best[1]):
            best = found
    assert best is not None
    rows, length = earlier[:2]
    if rows % layout.dealt == 0 and longest <= length and rows * length <= _LOOSE * best[0] * best[1]:
        needed, _, packed = laid(length)
        if needed <= rows:
            return rows, length, packed
    return best


def coarse_sizes(multiple: int = 1, most: int = 4096) -> tuple[int, ...]:
    """The few sizes that are laid where each batch needs another: `multiple` times 1 to `most`, ascending."""
    scales = (2**power for power in range(most.bit_length()))
    units = [*range(1, _STEPS[0]), *(step * scale for scale in scales for step in _STEPS)]
    return tuple(multiple * unit for unit in units if unit <= most)


def rounded_rows(count: int, multiple: int = 1) -> int:
    """The smallest of `coarse_sizes` that holds `count` rows."""
    return next(size for size in coarse_sizes(multiple, 2 * count) if size >= count)


def lay_token_values(packed: Packed, values: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Values of response tokens in the places of the scored columns, f32[R, M]; 0 at unused places.

    Args:
        values: for every item, for every response, one value per token.
    """
    out = np.zeros(packed.rows.slot.shape, np.float32)
    for r, k in np.argwhere(packed.item >= 0):
        out[r, packed.rows.slot[r] == k] = values[int(packed.item[r, k])][int(packed.response[r, k])]
    return out


def lay_response_values(packed: Packed, values: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
    """Values of responses in their slots, [R, K]; 0 where the slot is empty."""
    out = np.zeros(packed.item.shape, dtype)
    for r, k in np.argwhere(packed.item >= 0):
        out[r, k] = values[int(packed.item[r, k])][int(packed.response[r, k])]
    return out
