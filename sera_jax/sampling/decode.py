"""The three compiled programs of the sampler: prefill a block of prompts, insert them into slots, decode all slots.

A cache column is a token position: slot s writes its token of position p into column p, so what a slot computes does
not depend on when it started or on what its neighbours do. A slot first takes the keys and values of all tokens of its
prompt but the last; the last one is fed to the decoder as if it had just been chosen. So the first token of an answer
is chosen by the same code as every other, and prefill needs neither the head nor the choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax.core import Array
from sera_jax.mesh import ROW_AXES, constrain_choice, param_shardings, replicated, row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params, abstract_params, forward, row_attention, unembedding
from sera_jax.ops.attention import Places
from sera_jax.sampling.cache import Cache, Split, Stacked
from sera_jax.sampling.choose import choose
from sera_jax.sampling.params import SamplingParams


@struct.dataclass
class Slots:
    """What the decoder carries from step to step. C columns; a column is a token position of prompt + answer.

    Attributes:
        cache: keys and values of what was fed so far.
        token: i32[S] the token to feed next; position: i32[S] its position, and so its column.
        count: i32[S] tokens chosen so far.
        active: bool[S]; finished: bool[S] a stop id was chosen.
        key: PRNG keys [S] of the samples.
        tokens, logps: i32 and f32 [S, max_new_tokens], valid up to `count`.
    """

    cache: Cache
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

    prepare(params) -> params in the compute dtype, laid on the mesh as a step of decoding wants them.
    empty(slots, columns) -> Slots; both static.
    prefill(prepared, tokens i32[b, T]) -> Cache of b slots and T columns.
    insert(slots, prompts: Cache, base_key u32[...], placing: Placing) -> Slots (the old one is donated).
    decode(prepared, slots, wake i32, limit i32) -> (Slots, Report) (the old one is donated); runs until `wake` slots
        are idle or `limit` steps are done.
    prepare_as(formats) -> `prepare` to other layouts, where the compiler of `decode` chooses them.
    """

    cfg: ModelConfig
    slots: int
    prepare: Any
    empty: Any
    prefill: Any
    insert: Any
    decode: Any
    prepare_as: Callable[..., Any] | None = None

    def lower_decode(self, columns: int) -> Any:
        """`decode` over a cache of so many columns, traced for shapes alone."""
        prepared = jax.eval_shape(self.prepare, abstract_params(self.cfg))
        slots = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            self.empty.lower(self.slots, columns).out_info,
        )
        bound = jax.ShapeDtypeStruct((), jnp.int32)
        return self.decode.lower(prepared, slots, bound, bound)

    @functools.lru_cache(maxsize=8)  # noqa: B019, as many as `programs` keeps
    def decoder(self, columns: int) -> tuple[Callable[..., Any], Callable[..., tuple[Slots, Report]]]:
        """`prepare` and `decode` for a cache of so many columns.

        Where `decode` leaves the layout of the weights to the compiler, `prepare` lays them out as it found best: any
        other would be copied in every call.
        """
        if self.prepare_as is None:
            return self.prepare, self.decode
        compiled = self.lower_decode(columns).compile()
        return self.prepare_as(compiled.input_formats[0][0]), compiled


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


def empty_slots(cfg: ModelConfig, sampling: SamplingParams, form: type[Cache], slots: int, columns: int) -> Slots:
    """All slots idle."""
    integers, booleans = (functools.partial(jnp.zeros, dtype=dtype) for dtype in (jnp.int32, jnp.bool_))
    return Slots(
        cache=form.empty(cfg, slots, columns),
        token=integers(slots),
        position=integers(slots),
        count=integers(slots),
        active=booleans(slots),
        finished=booleans(slots),
        key=jax.vmap(jax.random.key)(jnp.zeros(slots, jnp.uint32)),
        tokens=integers((slots, sampling.max_new_tokens)),
        logps=jnp.zeros((slots, sampling.max_new_tokens), jnp.float32),
    )


def prefill(cfg: ModelConfig, form: type[Cache], prepared: Params, tokens: jax.Array) -> Cache:
    """Keys and values of prompts i32[b, T], filled up on the right; what the filling computes is never read."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    places = Places.in_rows(jnp.ones_like(tokens), jnp.zeros_like(tokens), positions)
    attend = row_attention(cfg, places, keep_kv=True)
    return form.of_prompts(forward(cfg, prepared, tokens, positions, attend)[1])


def insert(slots: Slots, prompts: Cache, base_key: jax.Array, placing: Placing) -> Slots:
    """Start samples in slots. Columns beyond a prompt hold leftovers; they are written before they are read.

    Args:
        base_key: data of the PRNG key of (seed, round); a sample's key is folded from it.
    """
    base = jax.random.wrap_key_data(base_key)
    where, source = placing.slot, placing.source

    def put(old: jax.Array, new: jax.Array | int | bool) -> jax.Array:
        return old.at[where].set(new, mode="drop")

    def sample_key(prompt_id: jax.Array, sample: jax.Array) -> jax.Array:
        return functools.reduce(jax.random.fold_in, (prompt_id[0], prompt_id[1], sample), base)

    return dataclasses.replace(
        slots,
        cache=slots.cache.insert(prompts, where, source),
        token=put(slots.token, placing.last_token),
        position=put(slots.position, placing.length - 1),
        count=put(slots.count, 0),
        active=put(slots.active, True),
        finished=put(slots.finished, False),
        key=put(slots.key, jax.vmap(sample_key)(placing.prompt_id, placing.sample)),
    )


def step(cfg: ModelConfig, sampling: SamplingParams, prepared: Params, slots: Slots) -> Slots:
    """Feed every slot's token and choose its next one."""
    attend = slots.cache.attend(slots.position)
    hidden, kept = forward(cfg, prepared, slots.token[:, None], slots.position[:, None], attend, slots.cache.caches())
    token, logp = choose(
        logits=constrain_choice(unembedding(cfg, prepared)(hidden[:, 0])),
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
        cache=slots.cache.after(kept),
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


def form_for(devices: Iterable[Any]) -> type[Cache]:
    """The form of the cache that these devices read fastest."""
    return Split if next(iter(devices)).platform == "cpu" else Stacked


@functools.lru_cache(maxsize=8)
def programs(
    cfg: ModelConfig, sampling: SamplingParams, mesh: Mesh | None, slots: int, form: type[Cache]
) -> SamplerPrograms:
    """The compiled functions; the same object for the same arguments, so that nothing compiles twice.

    With a mesh, as `decoding_mesh` makes it, slots are split over (data, fsdp) where their number allows it, and
    key/value heads over `tensor`.
    """
    prepare, by_compiler = functools.partial(form.prepare, cfg), {}
    if mesh is None:
        weights = state = block = whole = None
    else:
        whole = replicated(mesh)
        rows = ROW_AXES if slots % row_shards(mesh) == 0 else None
        heads = "tensor" if cfg.num_key_value_heads % mesh.shape["tensor"] == 0 else None
        flat = NamedSharding(mesh, P(rows))
        names = [field.name for field in dataclasses.fields(Slots)]  # a sharding stands for all arrays of its field
        state = Slots(**dict.fromkeys(names, flat) | {"cache": NamedSharding(mesh, form.spec(rows, heads))})
        block = NamedSharding(mesh, form.spec(None, heads))  # any slot may take any prompt of the block
        weights = prepared_shardings(cfg, mesh, form)
        if form is Stacked:
            by_compiler["in_shardings"] = (jax.tree.map(lambda x: Format(Layout.AUTO, x), weights), state, whole, whole)
    return SamplerPrograms(
        cfg,
        slots,
        prepare=jax.jit(prepare, out_shardings=weights),
        empty=jax.jit(
            functools.partial(empty_slots, cfg, sampling, form),
            static_argnums=(0, 1),
            out_shardings=state,
        ),
        prefill=jax.jit(functools.partial(prefill, cfg, form), out_shardings=block),
        insert=jax.jit(insert, donate_argnums=0, out_shardings=state),
        decode=jax.jit(
            functools.partial(decode, cfg, sampling),
            donate_argnums=1,
            out_shardings=None if mesh is None else (state, whole),
            **by_compiler,
        ),
        prepare_as=functools.partial(_jit_to, prepare) if by_compiler else None,
    )


def _jit_to(function: Callable[..., Any], formats: Any) -> Callable[..., Any]:
    return jax.jit(function, out_shardings=formats)


def prepared_shardings(cfg: ModelConfig, mesh: Mesh, form: type[Cache]) -> Any:
    """Where every prepared parameter lies: as `mesh.RULES` says of the stacked one it was made of."""
    stacked = jax.eval_shape(functools.partial(Stacked.prepare, cfg), abstract_params(cfg))
    found = param_shardings(mesh, stacked)
    if form is Stacked:
        return found
    of_layer = jax.tree.map(lambda whole: NamedSharding(mesh, P(*whole.spec[1:])), found["layers"]["block"])
    return {**found, "layers": (of_layer,) * cfg.num_hidden_layers}
