"""The row layout, slowly and obviously: what each response is on its own, and what a packed row says that it is."""

import numpy as np

from sera_jax.core import Rows
from sera_jax.data.items import Item


def standalone(item: Item, k: int) -> dict[str, list[int]]:
    """Response k without any packing: prompt + response, counted from 0, every response token a target."""
    tokens = [*item.prompt.tolist(), *item.responses[k].tolist()]
    start = len(item.prompt)
    return {
        "tokens": tokens,
        "positions": list(range(len(tokens))),
        "source": list(range(start - 1, len(tokens) - 1)),
        "target": tokens[start:],
    }


def visible(rows: Rows, r: int, query: int, key: int) -> bool:
    """May `query` see `key`: same segment, key not after query, key in the prompt or in the query's own branch."""
    if rows.segment[r, query] == 0 or rows.segment[r, query] != rows.segment[r, key] or key > query:
        return False
    return rows.branch[r, key] == 0 or rows.branch[r, key] == rows.branch[r, query]


def read_slot(rows: Rows, r: int, k: int) -> dict[str, list[int]]:
    """What slot k of row r means: the tokens its last token can see, and the scored places among them."""
    places = [m for m in range(rows.slot.shape[1]) if rows.slot[r, m] == k]
    last = int(rows.source[r, places[-1]])
    # The last target is the token after its source in the row, or, for a response of one token, the branch's only one.
    if len(places) > 1:
        end = last + 1
    else:
        end = next(
            t for t in range(rows.tokens.shape[1]) if t > last and visible(rows, r, t, last) and _is_slot(rows, r, t, k)
        )
    seen = [t for t in range(end + 1) if visible(rows, r, end, t)]
    order = {t: i for i, t in enumerate(seen)}
    return {
        "tokens": [int(rows.tokens[r, t]) for t in seen],
        "positions": [int(rows.positions[r, t]) for t in seen],
        "source": [order[int(rows.source[r, m])] for m in places],
        "target": [int(rows.target[r, m]) for m in places],
    }


def _is_slot(rows: Rows, r: int, token: int, k: int) -> bool:
    """Is the token the first of the k-th branch (segment, branch >= 1) of the row, counted from the left?"""
    seen: list[tuple[int, int]] = []
    for t in range(token + 1):
        branch = (int(rows.segment[r, t]), int(rows.branch[r, t]))
        if branch[1] and branch not in seen:
            seen.append(branch)
    return len(seen) == k + 1 and seen[-1] == (rows.segment[r, token], rows.branch[r, token])


def alone(item: Item, k: int) -> Rows:
    """Response k as one unpadded row of its own."""
    one = standalone(item, k)
    length = len(one["tokens"])
    start = len(item.prompt)

    def row(values) -> np.ndarray:
        return np.array([values], np.int32)

    return Rows(
        tokens=row(one["tokens"]),
        positions=row(one["positions"]),
        segment=row([1] * length),
        branch=row([0] * start + [1] * (length - start)),
        source=row(one["source"]),
        target=row(one["target"]),
        slot=row([0] * len(one["target"])),
        num_slots=1,
    )


def random_items(
    rng: np.random.Generator,
    count: int,
    *,
    vocab: int,
    prompt: tuple[int, int],
    response: tuple[int, int],
    most: int = 3,
) -> list[Item]:
    """Items of 1 to `most` responses with lengths in the given closed ranges and ids `item-0`, `item-1`, ..."""

    def draw(low: int, high: int) -> np.ndarray:
        return rng.integers(1, vocab, rng.integers(low, high + 1)).astype(np.int32)

    return [
        Item(f"item-{i}", draw(*prompt), tuple(draw(*response) for _ in range(rng.integers(1, most + 1))))
        for i in range(count)
    ]
