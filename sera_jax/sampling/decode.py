"""The three compiled programs of the sampler: prefill a block of prompts, insert them into slots, decode all slots.

A cache column is a token position: slot s writes its token of position p into column p, so what a slot computes does
not depend on when it started or on what its neighbours do. A slot first takes the keys and values of all tokens of its
prompt but the last; the last one is fed to the decoder as if it had just been chosen. So the first token of an answer
is chosen by the same code as every other, and prefill needs neither the head nor the choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax.core import Array
from sera_jax.mesh import ROW_AXES, replicated, row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params, forward, row_attention, unembedding, unstacked
from sera_jax.ops.attention import Places, cached_attention
from sera_jax.sampling.choose import choose
from sera_jax.sampling.params import SamplingParams


@struct.dataclass
class Slots:
    """What the decoder carries from step to step. C columns; a column is a token position of prompt + answer.

    Attributes:
        keys: per layer [S, G, d, C], rotated; values: per layer [S, G, C, d]. The two layouts are those in which a CPU
            reads them fastest.
        token: i32[S] the token to feed next; position: i32[S] its position, and so its column.
        count: i32[S] tokens chosen so far.
        active: bool[S]; finished: bool[S] a stop id was chosen.
        key: PRNG keys [S] of the samples.
        tokens, logps: i32 and f32 [S, max_new_tokens], valid up to `count`.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    token: jax.Array
    position: jax.Array
    count: jax.Array
    active: jax.Array
    finished: jax.Array
    key: jax.Array
    tokens: jax.Array
    logps: jax.Array


@struct.dataclass
class Report:
    """The small part of `Slots` that the host reads after each call; whole on every device."""

    active: jax.Array
    finished: jax.Array
    count: jax.Array
    tokens: jax.Array
    logps: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class SamplerPrograms:
    """The compiled functions for one (model, sampling, mesh); each compiles once per set of shapes.

    prepare(params) -> params with one subtree per layer, in the compute dtype.
    empty(slots, columns) -> Slots; both static.
    prefill(params, tokens i32[b, T]) -> (keys, values): per layer [b, G, d, T], [b, G, T, d].
    insert(slots, keys, values, base_key u32[...], placing: Placing) -> Slots (the old one is donated).
    decode(prepared, slots, wake i32, limit i32) -> (Slots, Report) (the old one is donated); runs until `wake` slots
        are idle or `limit` steps are done.
    """

    prepare: Callable[..., Any]
    empty: Callable[..., Slots]
    prefill: Callable[..., tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]
    insert: Callable[..., Slots]
    decode: Callable[..., tuple[Slots, Report]]


@struct.dataclass
class Placing:
    """Which prompts of a prefilled block go into which slots; all i32[I], but where it says otherwise.

    Attributes:
        slot: S where the place is unused.
        source: row of the prefilled block.
        last_token, length: the prompt's last token and its number of tokens.
        prompt_id: u32[I, 2] high and low word; sample: u32[I]. Indices of the sample's PRNG key.
    """

    slot: Array
    source: Array
    last_token: Array
    length: Array
    prompt_id: Array
    sample: Array


def empty_slots(cfg: ModelConfig, sampling: SamplingParams, slots: int, columns: int) -> Slots:
    """All slots idle."""
    shape = (slots, cfg.num_key_value_heads)
    layers = range(cfg.num_hidden_layers)
    integers, booleans = (functools.partial(jnp.zeros, dtype=dtype) for dtype in (jnp.int32, jnp.bool_))
    return Slots(
        keys=tuple(jnp.zeros((*shape, cfg.head_dim, columns), cfg.dtype) for _ in layers),
        values=tuple(jnp.zeros((*shape, columns, cfg.head_dim), cfg.dtype) for _ in layers),
        token=integers(slots),
        position=integers(slots),
        count=integers(slots),
        active=booleans(slots),
        finished=booleans(slots),
        key=jax.vmap(jax.random.key)(jnp.zeros(slots, jnp.uint32)),
        tokens=integers((slots, sampling.max_new_tokens)),
        logps=jnp.zeros((slots, sampling.max_new_tokens), jnp.float32),
    )


def prefill(cfg: ModelConfig, params: Params, tokens: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Keys and values of prompts i32[b, T], filled up on the right; what the filling computes is never read."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    attend = row_attention(cfg, Places.in_rows(jnp.ones_like(tokens), jnp.zeros_like(tokens), positions), keep_kv=True)
    keys, values = forward(cfg, params, tokens, positions, attend)[1]
    return tuple(keys.swapaxes(3, 4)), tuple(values)


def insert(
    slots: Slots,
    keys: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    base_key: jax.Array,
    placing: Placing,
) -> Slots:
    """Start samples in slots. Columns beyond a prompt hold leftovers; they are written before they are read.

    Args:
        base_key: data of the PRNG key of (seed, round); a sample's key is folded from it.
    """
    base = jax.random.wrap_key_data(base_key)
    where, source = placing.slot, placing.source
    length = values[0].shape[2]

    def put(old: jax.Array, new: jax.Array | int | bool) -> jax.Array:
        return old.at[where].set(new, mode="drop")

    def sample_key(prompt_id: jax.Array, sample: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, (prompt_id[0], prompt_id[1], sample), base)

    return dataclasses.replace(
        slots,
        keys=tuple(old.at[where, :, :, :length].set(new[source], mode="drop") for old, new in zip(slots.keys, keys)),
        values=tuple(old.at[where, :, :length].set(new[source], mode="drop") for old, new in zip(slots.values, values)),
        token=put(slots.token, placing.last_token),
        position=put(slots.position, placing.length - 1),
        count=put(slots.count, 0),
        active=put(slots.active, True),
        finished=put(slots.finished, False),
        key=put(slots.key, jax.vmap(sample_key)(placing.prompt_id, placing.sample)),
    )


def step(cfg: ModelConfig, sampling: SamplingParams, prepared: Params, slots: Slots) -> Slots:
    """Feed every slot's token and choose its next one."""
    slot, at, one = jnp.arange(slots.token.shape[0]), slots.position[:, None], jnp.ones((1, 1), jnp.int32)
    column = jnp.arange(slots.values[0].shape[2], dtype=jnp.int32)[None]
    # a slot is one item, and all of it is prompt to the token that comes next
    query, columns = Places(one, 0 * one, at, at), Places(one, 0 * one, column, column)

    # Written before it is attended to, so that the old cache has one reader and is updated in place.
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, **of_model: Any) -> tuple[jax.Array, Any]:
        keys, values = cache
        how = dict(mode="drop", unique_indices=True, indices_are_sorted=True)
        keys = keys.at[slot, :, :, slots.position].set(k[:, :, 0], **how)
        values = values.at[slot, :, slots.position].set(v[:, :, 0], **how)
        return cached_attention(q, keys, values, query, columns, **of_model), (keys, values)

    caches = tuple(zip(slots.keys, slots.values, strict=True))
    hidden, caches = forward(cfg, prepared, slots.token[:, None], at, attend, caches)
    keys, values = zip(*caches, strict=True)

    token, logp = choose(
        logits=unembedding(cfg, prepared)(hidden[:, 0]),
        keys=slots.key,
        index=slots.count,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_new_tokens=sampling.min_new_tokens,
        stop_ids=sampling.stop_ids,
    )
    here = (jnp.arange(sampling.max_new_tokens) == slots.count[:, None]) & slots.active[:, None]
    stopped = jnp.isin(token, jnp.array(sampling.stop_ids, jnp.int32))
    on = slots.active.astype(jnp.int32)
    return dataclasses.replace(
        slots,
        keys=keys,
        values=values,
        token=jnp.where(slots.active, token, slots.token),
        position=slots.position + on,
        count=slots.count + on,
        active=slots.active & ~stopped & (slots.count + 1 < sampling.max_new_tokens),
        finished=slots.finished | (slots.active & stopped),
        tokens=jnp.where(here, token[:, None], slots.tokens),
        logps=jnp.where(here, logp[:, None], slots.logps),
    )


def decode(
    cfg: ModelConfig, sampling: SamplingParams, prepared: Params, slots: Slots, wake: jax.Array, limit: jax.Array
) -> tuple[Slots, Report]:
    """Steps until at least `wake` slots are idle, at most `limit`; both i32[], so that they compile once."""

    def unfinished(carry: tuple[jax.Array, Slots]) -> jax.Array:
        number, slots = carry
        return (number < limit) & (jnp.sum(~slots.active) < wake)

    def body(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        number, slots = carry
        return number + 1, step(cfg, sampling, prepared, slots)

    steps, slots = jax.lax.while_loop(unfinished, body, (jnp.int32(0), slots))
    report = Report(slots.active, slots.finished, slots.count, slots.tokens, slots.logps, steps)
    return slots, report


@functools.lru_cache(maxsize=8)
def programs(cfg: ModelConfig, sampling: SamplingParams, mesh: Mesh | None, slots: int) -> SamplerPrograms:
    """The compiled functions; the same object for the same arguments, so that nothing compiles twice.

    With a mesh, slots are split over (data, fsdp) where their number allows it, and key/value heads over `tensor`.
    """
    if mesh is None:
        state = block = whole = None
    else:
        whole = replicated(mesh)
        rows = ROW_AXES if slots % row_shards(mesh) == 0 else None
        heads = "tensor" if cfg.num_key_value_heads % mesh.shape["tensor"] == 0 else None
        cache, flat = NamedSharding(mesh, P(rows, heads)), NamedSharding(mesh, P(rows))
        names = [field.name for field in dataclasses.fields(Slots)]  # a sharding stands for all arrays of its field
        state = Slots(**{name: cache if name in ("keys", "values") else flat for name in names})
        block = NamedSharding(mesh, P(None, heads))  # any slot may take any prompt of the block
    return SamplerPrograms(
        prepare=jax.jit(functools.partial(unstacked, cfg)),
        empty=jax.jit(
            functools.partial(empty_slots, cfg, sampling),
            static_argnums=(0, 1),
            out_shardings=state,
        ),
        prefill=jax.jit(functools.partial(prefill, cfg), out_shardings=block),
        insert=jax.jit(insert, donate_argnums=0, out_shardings=state),
        decode=jax.jit(
            functools.partial(decode, cfg, sampling),
            donate_argnums=1,
            out_shardings=None if mesh is None else (state, whole),
        ),
    )
