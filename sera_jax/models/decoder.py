"""The one decoder definition: norms, rotary embeddings, grouped-query attention, feed-forward. What differs between
families is a switch of `ModelConfig`.

`forward` (embed, blocks, final norm) and `unembedding` serve training, scoring, prefill and decoding alike; these
differ only in the attention that they hand to `forward`. What belongs to a model, such as the scale of its scores, a
block tells that attention itself.

    embed [V, D]    head [D, V] unless tied    layers/block/* [L, ...]    final_norm/scale [D]
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sera_jax.core import Rows
from sera_jax.mesh import constrain_layers, constrain_rows, constrain_table, row_copies, rows_of_a_device
from sera_jax.models import rope
from sera_jax.models.activations import chosen_remat, group_layers
from sera_jax.models.config import ModelConfig
from sera_jax.models.layers import Linear, Norm
from sera_jax.models.lora import merged
from sera_jax.models.parts import BLOCK, LAST, joined, last_layers
from sera_jax.ops import backends
from sera_jax.ops.attention import KEPT, Places

Params = dict[str, Any]
ACTIVATIONS = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
}
COLUMNS = 1024  # of a row, at least, whose hidden units in the feed-forward are alive at a time
TOKENS = 4096  # of a device, at least, where kernels are gathered for each such part and their gradients added up
UNLIMITED = 2**30  # a window that no position leaves
ABSENT = -1e38  # a logit without probability; finite, so that entropies (p log p) and their gradients are


class Attend(Protocol):
    """Attention of one layer, as `forward` is handed it.

    Called with q [R, H, T, d], k and v [R, G, T, d], the layer's `cache`, and by name what belongs to the model
    (`scale`, `soft_cap`, `sliding_window` of `ops.attention.Attention`). Returns the mixed values [R, H, T, d] and what
    `forward` shall return of this layer.
    """

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, **of_model: Any
    ) -> tuple[jax.Array, Any]: ...


class Carried(NamedTuple):
    """A cache of all layers that goes through the loop over them and is changed in place: `attend` is given it with the
    layer's number i32[] and keeps it as it is after that layer."""

    cache: Any
    layer: jax.Array | None = None


class Block(nn.Module):
    """One layer: attention and feed-forward, each a branch of the residual stream."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, window: jax.Array | int | None, attend: Attend, cache: Any
    ) -> tuple[jax.Array, Any]:
        """x [R, T, D] -> (x [R, T, D], what `attend` keeps of this layer)."""
        cfg = self.cfg

        def norm(when: bool, name: str, y: jax.Array) -> jax.Array:
            return Norm(cfg, name=name)(y) if when else y

        y, kept = self._attention(norm(cfg.pre_norm, "attention_norm", x), cos, sin, window, attend, cache)
        after = x + norm(cfg.post_norm, "attention_post_norm", y)
        y = self._feed_forward(norm(cfg.pre_norm, "mlp_norm", x if cfg.parallel_residual else after))
        return after + norm(cfg.post_norm, "mlp_post_norm", y), kept

    def _attention(
        self, y: jax.Array, cos: jax.Array, sin: jax.Array, window: jax.Array | int | None, attend: Attend, cache: Any
    ) -> tuple[jax.Array, Any]:
        cfg = self.cfg
        rows, length, _ = y.shape

        def heads(name: str, count: int, *, normed: bool) -> jax.Array:
            z = Linear(cfg, count * cfg.head_dim, cfg.qkv_bias, name=name)(y)
            if normed and cfg.qk_norm == "width":
                z = Norm(cfg, name=f"{name}_norm")(z)
            z = z.reshape(rows, length, count, cfg.head_dim)
            if normed and cfg.qk_norm == "head":
                z = Norm(cfg, name=f"{name}_norm")(z)
            return z.swapaxes(1, 2)

        q = rope.rotate(heads("q", cfg.num_attention_heads, normed=True), cos, sin)
        k = rope.rotate(heads("k", cfg.num_key_value_heads, normed=True), cos, sin)
        v = heads("v", cfg.num_key_value_heads, normed=False)
        scale = cfg.query_pre_attn_scalar and cfg.query_pre_attn_scalar**-0.5
        mixed, kept = attend(q, k, v, cache, scale=scale, soft_cap=cfg.attn_logit_softcapping, sliding_window=window)
        out = Linear(cfg, cfg.hidden_size, cfg.out_bias, name="o")
        return out(mixed.swapaxes(1, 2).reshape(rows, length, -1)), kept

    def _feed_forward(self, y: jax.Array) -> jax.Array:
        """Of [R, T, D]; where little is kept for the backward pass, of some columns of T at a time, so that hidden
        units are alive of so many alone."""
        cfg, act = self.cfg, ACTIVATIONS[self.cfg.activation]

        def mlp(block: Block, y: jax.Array) -> jax.Array:
            up = Linear(cfg, cfg.intermediate_size, cfg.mlp_bias, name="up")
            if cfg.gated_mlp:
                hidden = act(Linear(cfg, cfg.intermediate_size, cfg.mlp_bias, name="gate")(y)) * up(y)
            else:
                hidden = act(up(y))
            return Linear(cfg, cfg.hidden_size, cfg.mlp_bias, name="down")(hidden)

        rows, length, width = y.shape
        # a mask of adapters' dropout is drawn over a part: parts are then those of one device
        columns = _columns(length, None if cfg.lora_dropout else rows_of_a_device(rows))
        if columns == length or chosen_remat(cfg, length) not in ("full", "groups"):
            return mlp(self, y)
        parts = y.reshape(rows, -1, columns, width).swapaxes(0, 1)
        recomputed = nn.remat(mlp, prevent_cse=False)
        in_turn = nn.scan(
            lambda block, _, part: (None, recomputed(block, constrain_rows(part))),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        return in_turn(self, None, parts)[1].swapaxes(0, 1).reshape(y.shape)


def _columns(length: int, rows: int | None) -> int:
    """Of a row of so many tokens, how many the feed-forward takes at a time: a multiple of `COLUMNS`, or all.

    Args:
        rows: that lie on each device; None where rows are not split over devices (`mesh.rows_of_a_device`).
    """
    least = COLUMNS if rows is None else max(COLUMNS, TOKENS // rows)
    fitting = [some for some in range(COLUMNS, length, COLUMNS) if length % some == 0]
    if length <= least or not fitting:
        return length
    return next((some for some in fitting if some >= least), fitting[-1])


def embed(cfg: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """The residual stream [R, T, D] before the first layer, of tokens i32[R, T]."""
    table = params["embed"]
    if tokens.size >= cfg.vocab_size:  # fewer tokens, as in a step of decoding, are moved at less cost than the table
        table = constrain_table(table)
    x = table[tokens].astype(cfg.dtype)
    return constrain_rows(x if cfg.embedding_multiplier == 1 else x * jnp.asarray(cfg.embedding_multiplier, x.dtype))


def blocks(
    cfg: ModelConfig, params: Params, x: jax.Array, positions: jax.Array, attend: Attend, caches: Any = None
) -> tuple[jax.Array, Any]:
    """All layers: a scan over stacked parameters, which is what training has, or a loop over those of `unstacked`.

    Args:
        x: [R, T, D]; positions: i32[R, T].
        caches: what `attend` is given of each layer: arrays with a leading axis L, or one `Carried`, for a scan; a
            tuple for a loop.

    Returns:
        x [R, T, D], and what `attend` kept of each layer, in the form that `caches` have; of `Carried` what it kept of
        the last.
    """
    kind_of = _Kinds(cfg, positions)

    def layer(x: jax.Array, given: tuple[Params, Any, Any]) -> tuple[jax.Array, Any]:
        own, cache, kind = given
        cos, sin, window = kind_of(kind)
        out: Any = Block(cfg).apply({"params": own}, constrain_rows(x), cos, sin, window, attend, cache)
        return out

    layers = params["layers"]
    if isinstance(layers, tuple):
        kept = []
        for given in zip(layers, caches or [None] * len(layers), kind_of.each, strict=True):
            x, of_layer = layer(x, given)
            kept.append(of_layer)
        return x, tuple(kept)
    if LAST in layers and not isinstance(caches, Carried):
        count, *stacks = last_layers(layers)
        first, last = (constrain_layers(_kernels_cast(cfg, stack)) for stack in stacks)
        of_first, of_last = (
            jax.tree.map(lambda z, s=s: z[s], (caches, kind_of.stacked)) for s in (slice(-count), slice(-count, None))
        )
        x, kept = _scan(cfg, layer, x, (first, *of_first))
        x, more = _scan(cfg, layer, x, (last, *of_last))
        return x, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, more)
    stacked = constrain_layers(_kernels_cast(cfg, joined(params)["layers"][BLOCK]))
    if not isinstance(caches, Carried):
        return _scan(cfg, layer, x, (stacked, caches, kind_of.stacked))

    def turn(carry: tuple[jax.Array, Any], given: tuple[Params, jax.Array, Any]) -> tuple[tuple[jax.Array, Any], None]:
        own, number, kind = given
        return layer(carry[0], (own, Carried(carry[1], number), kind)), None

    return jax.lax.scan(turn, (x, caches.cache), (stacked, jnp.arange(cfg.num_hidden_layers), kind_of.stacked))[0]


class _Kinds:
    """How layers differ in kind: by which tables they turn queries and keys, and how far they see.

    Attributes:
        each: (number of tables, window or None) of every layer; `stacked`: the same as arrays [L] for a scan, or None
            where all layers are alike and nothing need be looked up.
        tables: number -> cos and sin; with `stacked` also in one array each, in which a scan looks up.
    """

    def __init__(self, cfg: ModelConfig, positions: jax.Array) -> None:
        turned = rope.kinds(cfg)
        self.each = tuple((kind, cfg.window_of(layer)) for layer, kind in enumerate(turned))
        self.tables = {kind: rope.tables(cfg, positions, kind) for kind in sorted(set(turned))}
        self.stacked = None
        if len(set(self.each)) > 1:
            self._looked_up = tuple(jnp.stack(each) for each in zip(*self.tables.values(), strict=True))
            numbers = [list(self.tables).index(kind) for kind in turned]
            windows = [UNLIMITED if window is None else window for _, window in self.each]
            self.stacked = jnp.array(numbers), jnp.array(windows)

    def __call__(self, kind: Any) -> tuple[jax.Array, jax.Array, Any]:
        """cos, sin and window of a layer, of an element of `each` or of `stacked`."""
        number, window = self.each[0] if kind is None else kind
        if isinstance(number, int):
            return *self.tables[number], window
        cos, sin = self._looked_up
        return cos[number], sin[number], window


def _kernels_cast(cfg: ModelConfig, stacked: Params) -> Params:
    """Kernels [L, in, out] in the compute dtype, in which they are multiplied and gathered, before the loop over
    layers: their gradients are in it too, of one microbatch at a time. Scales stay as they are."""
    return jax.tree.map(lambda x: x.astype(cfg.dtype) if x.ndim > 2 else x, stacked)


def _scan(cfg: ModelConfig, layer: Callable, x: jax.Array, given: Any) -> tuple[jax.Array, Any]:
    """`layer` over all of what is `given` of each, as the backward pass of rows like x shall see it
    (`ModelConfig.remat`)."""
    remat = chosen_remat(cfg, x.shape[1])
    if remat == "none":
        return jax.lax.scan(layer, x, given)
    policy = None
    if remat == "dots":
        known = jax.checkpoint_policies
        multiplied, attended = known.dots_with_no_batch_dims_saveable, known.save_only_these_names(KEPT)
        policy = known.save_from_both_policies(multiplied, attended)
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    if remat != "groups":
        return jax.lax.scan(layer, x, given)
    size = math.gcd(group_layers(cfg), jax.tree.leaves(given)[0].shape[0])
    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), given)
    group = jax.checkpoint(functools.partial(jax.lax.scan, layer), prevent_cse=False)
    x, kept = jax.lax.scan(group, x, grouped)
    return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), kept)


def forward(
    cfg: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, attend: Attend, caches: Any = None
) -> tuple[jax.Array, Any]:
    """Tokens i32[R, T] -> final hidden states [R, T, D], normalised, and what `attend` kept. See `blocks`."""
    x, kept = blocks(cfg, params, embed(cfg, params, tokens), positions, attend, caches)
    hidden: Any = Norm(cfg).apply({"params": params["final_norm"]}, x)
    return hidden, kept


def unembedding(cfg: ModelConfig, params: Params, *, rows: int = 0) -> Callable[[jax.Array], jax.Array]:
    """The function from final hidden states [..., D] to logits f32[..., V]; the head is cast once for all its calls.

    Ids that the tokenizer does not have get `ABSENT`: sampler and scorer have one distribution, over the others.

    Args:
        rows: R, where hidden states are of rows, [R, ..., D], a few columns in each call (`mesh.row_copies`).
    """
    head = head_matrix(cfg, params)
    if rows:
        head = row_copies(head, rows)
    ids = np.arange(cfg.vocab_size)
    absent = np.any([(first <= ids) & (ids < last) for first, last in cfg.absent_ids], axis=0)

    def unembed(hidden: jax.Array) -> jax.Array:
        flat = hidden.reshape(*head.shape[:-2], -1, hidden.shape[-1])  # as in `Linear`, on each device by its own copy
        logits = jnp.matmul(flat, head, preferred_element_type=jnp.dtype(cfg.logits_dtype))
        logits = logits.astype(jnp.float32).reshape(*hidden.shape[:-1], head.shape[-1])
        if cfg.final_logit_softcapping is not None:
            logits = cfg.final_logit_softcapping * jnp.tanh(logits / cfg.final_logit_softcapping)
        return jnp.where(absent, ABSENT, logits) if cfg.absent_ids else logits

    return unembed


def head_matrix(cfg: ModelConfig, params: Params) -> jax.Array:
    """The output projection [D, V] in the compute dtype."""
    return (params["head"] if "head" in params else params["embed"].T).astype(cfg.dtype)


def asked_attention(cfg: ModelConfig, devices: str, tokens: int) -> backends.Asked:
    """What a model asks of attention in rows of so many tokens on those devices (`ops.backends.devices`)."""
    return backends.Asked(devices, cfg.dtype, cfg.head_dim, tokens, cfg.attn_logit_softcapping)


def row_attention(
    cfg: ModelConfig, places: Places, *, longest_item: int | None = None, keep_kv: bool = False
) -> Attend:
    """For `forward`: rows attend to themselves by the config's back end on the devices at hand, without a cache.

    Args:
        places: where the tokens of the rows stand.
        longest_item: no item takes more tokens of a row than this (static).
        keep_kv: keep each layer's rotated keys and its values, [R, G, T, d] both.
    """
    asked = asked_attention(cfg, backends.devices(), places.segment.shape[1])
    name, _ = backends.choose(cfg.attn_implementation, asked)
    attention = backends.ATTENTION[name].attend

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, **of_model: Any) -> tuple[jax.Array, Any]:
        mixed = attention(q, k, v, places, places, longest_item=longest_item, **of_model)
        return mixed, (k, v) if keep_kv else None

    return attend


def hidden_states(cfg: ModelConfig, params: Params, rows: Rows, *, window: int | None = None) -> jax.Array:
    """Final hidden states [R, T, D] of packed rows.

    Args:
        window: no item of the rows is longer than this (static); lets attention skip what it cannot see.
    """
    attend = row_attention(cfg, Places.in_rows(rows.segment, rows.branch, rows.positions), longest_item=window)
    return forward(cfg, params, rows.tokens, rows.positions, attend)[0]


def in_compute_dtype(cfg: ModelConfig, params: Params) -> Params:
    """The parameters as the sampler wants them: adapters merged, the head made, all in the compute dtype."""
    params = jax.tree.map(lambda x: x.astype(cfg.dtype), merged(cfg, params))
    return {**params, "head": head_matrix(cfg, params)}


def unstacked(cfg: ModelConfig, params: Params) -> Params:
    """`in_compute_dtype`, with a tree per layer.

    Slicing the stacked parameters in every step of decoding would cost a CPU as much as reading them for the matmuls
    does.
    """
    params = in_compute_dtype(cfg, params)
    stacked = params["layers"]["block"]
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(cfg.num_hidden_layers))
    return {**params, "layers": layers}


class _Layer(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, tables: rope.Tables) -> tuple[jax.Array, None]:
        return Block(self.cfg, name="block")(x, *tables, None, lambda q, k, v, cache, **_: (q, None), None)


class _Parameters(nn.Module):
    """Names, shapes and first values of all parameters; what it computes of them is nothing."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self) -> None:
        cfg = self.cfg
        dtype = jnp.dtype(cfg.param_dtype)
        init = nn.initializers.normal(cfg.initializer_range)
        self.param("embed", init, (cfg.vocab_size, cfg.hidden_size), dtype)
        if not cfg.tie_word_embeddings:
            self.param("head", init, (cfg.hidden_size, cfg.vocab_size), dtype)
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_hidden_layers,
        )
        x = jnp.zeros((1, 1, cfg.hidden_size), cfg.dtype)
        layers(cfg, name="layers")(x, rope.tables(cfg, jnp.zeros((1, 1), jnp.int32)))
        Norm(cfg, name="final_norm")(x)


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters. Trace it under jit with out_shardings to initialise a sharded model in place."""
    return _Parameters(cfg).init(key)["params"]


def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without making them."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
