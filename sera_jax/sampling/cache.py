"""Where the keys and values of the slots lie, and how a step of decoding writes and reads them: two forms, one algebra.

`Split` is a CPU's: arrays of their own for each layer, in the orders that the two matmuls of a step read fastest.
`Stacked` is an accelerator's: one array of all layers, which a loop over layers writes in place, in the order in which
a TPU keeps it inside that loop; any other is copied on the way in and out, which doubles it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Attend, Carried, Params, in_compute_dtype, unstacked
from sera_jax.ops.attention import Places, cached_attention

_IN_PLACE = dict(mode="drop", unique_indices=True, indices_are_sorted=True)  # one column of each slot


class Cache(Protocol):
    """Keys, rotated, and values of S slots and C columns; a column is a token position of prompt + answer."""

    keys: Any
    values: Any

    @staticmethod
    def prepare(cfg: ModelConfig, params: Params) -> Params:
        """The parameters in the compute dtype, as a step over this form wants them, from stacked ones."""
        ...

    @classmethod
    def empty(cls, cfg: ModelConfig, slots: int, columns: int) -> Self: ...

    @classmethod
    def of_prompts(cls, kept: Any) -> Self:
        """What `forward` kept of prompts, keys and values [b, G, T, d] of each layer, as b slots of T columns."""
        ...

    @classmethod
    def spec(cls, slots: str | tuple[str, ...] | None, heads: str | None) -> P:
        """How every array of it lies on a mesh: its slots split over those axes, its heads over that."""
        ...

    @property
    def columns(self) -> int: ...

    def insert(self, prompts: Self, slot: jax.Array, source: jax.Array) -> Self:
        """Rows `source` i32[I] of prefilled prompts into the first columns of `slot` i32[I]; slot S is dropped."""
        ...

    def caches(self) -> Any:
        """What `forward` is given as caches."""
        ...

    def after(self, kept: Any) -> Self:
        """The cache after a step, of what `forward` kept."""
        ...

    def attend(self, position: jax.Array) -> Attend:
        """Attention of a step that writes the token of each slot at its position i32[S], then reads.

        Written before it is read, so that the old cache has one reader and is updated in place.
        """
        ...


def _places(position: jax.Array, columns: int) -> tuple[Places, Places]:
    """Of the fed tokens and of the columns: a slot is one item, all of it prompt to the token that comes next."""
    at, one = position[:, None], jnp.ones((1, 1), jnp.int32)
    column = jnp.arange(columns, dtype=jnp.int32)[None]
    return Places(one, 0 * one, at, at), Places(one, 0 * one, column, column)


@struct.dataclass
class Split:
    """Per layer: keys [S, G, d, C], values [S, G, C, d]."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    prepare = staticmethod(unstacked)

    @classmethod
    def empty(cls, cfg: ModelConfig, slots: int, columns: int) -> Split:
        shape, layers = (slots, cfg.num_key_value_heads), range(cfg.num_hidden_layers)
        return cls(
            tuple(jnp.zeros((*shape, cfg.head_dim, columns), cfg.dtype) for _ in layers),
            tuple(jnp.zeros((*shape, columns, cfg.head_dim), cfg.dtype) for _ in layers),
        )

    @classmethod
    def of_prompts(cls, kept: Iterable[tuple[jax.Array, jax.Array]]) -> Split:
        return cls(*zip(*((keys.swapaxes(2, 3), values) for keys, values in kept), strict=True))

    @classmethod
    def spec(cls, slots: str | tuple[str, ...] | None, heads: str | None) -> P:
        return P(slots, heads)

    @property
    def columns(self) -> int:
        return self.values[0].shape[2]

    def insert(self, prompts: Split, slot: jax.Array, source: jax.Array) -> Split:
        length = prompts.columns

        def put(old: jax.Array, new: jax.Array, where: tuple) -> jax.Array:
            return old.at[where].set(new[source], mode="drop")

        return Split(
            tuple(
                put(old, new, (slot, slice(None), slice(None), slice(length)))
                for old, new in zip(self.keys, prompts.keys, strict=True)
            ),
            tuple(
                put(old, new, (slot, slice(None), slice(length)))
                for old, new in zip(self.values, prompts.values, strict=True)
            ),
        )

    def caches(self) -> tuple[tuple[jax.Array, jax.Array], ...]:
        return tuple(zip(self.keys, self.values, strict=True))

    def after(self, kept: Iterable[tuple[jax.Array, jax.Array]]) -> Split:
        return Split(*zip(*kept, strict=True))

    def attend(self, position: jax.Array) -> Attend:
        slot = jnp.arange(len(position))
        queries, columns = _places(position, self.columns)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, **of_model: Any) -> tuple[jax.Array, Any]:
            keys, values = cache
            keys = keys.at[slot, :, :, position].set(k[:, :, 0], **_IN_PLACE)
            values = values.at[slot, :, position].set(v[:, :, 0], **_IN_PLACE)
            mixed = cached_attention(q, keys, values, queries, columns, orders=("sgdc", "sgcd"), **of_model)
            return mixed, (keys, values)

        return attend


@struct.dataclass
class Stacked:
    """Keys and values [L, S, C, G, d]."""

    keys: jax.Array
    values: jax.Array

    prepare = staticmethod(in_compute_dtype)

    @classmethod
    def empty(cls, cfg: ModelConfig, slots: int, columns: int) -> Stacked:
        shape = (cfg.num_hidden_layers, slots, columns, cfg.num_key_value_heads, cfg.head_dim)
        return cls(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))

    @classmethod
    def of_prompts(cls, kept: tuple[jax.Array, jax.Array]) -> Stacked:
        return cls(*(x.swapaxes(2, 3) for x in kept))

    @classmethod
    def spec(cls, slots: str | tuple[str, ...] | None, heads: str | None) -> P:
        return P(None, slots, None, heads)

    @property
    def columns(self) -> int:
        return self.keys.shape[2]

    def insert(self, prompts: Stacked, slot: jax.Array, source: jax.Array) -> Stacked:
        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return old.at[:, slot, : prompts.columns].set(new[:, source], mode="drop")

        return Stacked(put(self.keys, prompts.keys), put(self.values, prompts.values))

    def caches(self) -> Carried:
        return Carried(self)

    def after(self, kept: Stacked) -> Stacked:
        return kept

    def attend(self, position: jax.Array) -> Attend:
        queries, columns = _places(position, self.columns)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, **of_model: Any) -> tuple[jax.Array, Any]:
            whole, layer = cache
            # numbered within the loop over layers, or the compiler does not see that each is written where it lies
            slot = jnp.arange(len(position))
            keys = whole.keys.at[layer, slot, position].set(k[:, :, 0], **_IN_PLACE)
            values = whole.values.at[layer, slot, position].set(v[:, :, 0], **_IN_PLACE)
            mixed = cached_attention(
                q, keys[layer], values[layer], queries, columns, orders=("scgd", "scgd"), **of_model
            )
            return mixed, Stacked(keys, values)

        return attend
