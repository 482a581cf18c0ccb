"""The one decoder definition: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU.

`forward` (embed, blocks, final norm) and `unembedding` serve training, scoring, prefill and decoding alike; these
differ only in the attention that they hand to `forward`. What belongs to a model, such as the scale of its scores, a
block tells that attention itself.

    embed [V, D]    head [D, V] unless tied    layers/block/* [L, ...]    final_norm/scale [D]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sera_jax.core import Rows
from sera_jax.mesh import constrain_layers, constrain_rows, constrain_table
from sera_jax.models.activations import chosen_remat, group_layers
from sera_jax.models.config import ModelConfig
from sera_jax.models.lora import A, B, merged
from sera_jax.ops.attention import ATTENTION, Places

Params = dict[str, Any]
COLUMNS = 1024  # of a row, whose hidden units in the feed-forward are alive at a time
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


def rotary_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Inverse frequencies f32[d / 2] (RoFormer, eq. 15), with Llama 3.1's scaling where the config has one.

    Made on the host in float64: an error here is multiplied by the position, and accelerators' `pow` is loose.
    """
    inverse = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    scaling = cfg.rope_scaling
    if scaling is not None:
        # Rotations within the original context: few are slowed by `factor`, many are kept, between them a blend.
        turns = scaling.original_max_position_embeddings * inverse / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        inverse = (1 - kept) * inverse / scaling.factor + kept * inverse
    return inverse.astype(np.float32)


def rotary_tables(cfg: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, f32[R, T, d / 2], of positions i32[R, T]; computed once for all layers."""
    angles = positions[:, :, None].astype(jnp.float32) * rotary_frequencies(cfg)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate x [R, H, T, d] by tables [R, T, d / 2]; halves are paired as in Hugging Face's Llama."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.cfg.param_dtype))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.cfg.rms_norm_eps)
        return wide.astype(x.dtype) * scale.astype(x.dtype)


class Linear(nn.Module):
    cfg: ModelConfig
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(self.cfg.initializer_range)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.dtype(self.cfg.param_dtype))
        y = x @ kernel.astype(x.dtype)
        if self.has_variable("params", A):
            a, b = (self.get_variable("params", name).astype(x.dtype) for name in (A, B))
            y += self.cfg.lora_scale * ((x @ a) @ b)
        return y


class Block(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend, cache: Any
    ) -> tuple[jax.Array, Any]:
        """x [R, T, D] -> (x [R, T, D], what `attend` keeps of this layer)."""
        cfg = self.cfg
        rows, length, _ = x.shape

        def heads(name: str, y: jax.Array, count: int) -> jax.Array:
            projected = Linear(cfg, count * cfg.head_dim, name=name)(y)
            return projected.reshape(rows, length, count, cfg.head_dim).swapaxes(1, 2)

        y = RMSNorm(cfg, name="attention_norm")(x)
        q = rotate(heads("q", y, cfg.num_attention_heads), cos, sin)
        k = rotate(heads("k", y, cfg.num_key_value_heads), cos, sin)
        v = heads("v", y, cfg.num_key_value_heads)
        mixed, kept = attend(q, k, v, cache)
        x = x + Linear(cfg, cfg.hidden_size, name="o")(mixed.swapaxes(1, 2).reshape(rows, length, -1))

        return x + self._feed_forward(RMSNorm(cfg, name="mlp_norm")(x)), kept

    def _feed_forward(self, y: jax.Array) -> jax.Array:
        """SwiGLU of [R, T, D]; where little is kept for the backward pass, of `COLUMNS` columns of T at a time, so that
        hidden units are alive of so many alone."""
        cfg = self.cfg

        def swiglu(block: Block, y: jax.Array) -> jax.Array:
            gate = nn.silu(Linear(cfg, cfg.intermediate_size, name="gate")(y))
            up = Linear(cfg, cfg.intermediate_size, name="up")(y)
            return Linear(cfg, cfg.hidden_size, name="down")(gate * up)

        rows, length, width = y.shape
        if length <= COLUMNS or length % COLUMNS or chosen_remat(cfg, length) not in ("full", "groups"):
            return swiglu(self, y)
        parts = y.reshape(rows, -1, COLUMNS, width).swapaxes(0, 1)
        recomputed = nn.remat(swiglu, prevent_cse=False)
        in_turn = nn.scan(
            lambda block, _, part: (None, recomputed(block, constrain_rows(part))),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        return in_turn(self, None, parts)[1].swapaxes(0, 1).reshape(y.shape)


def embed(cfg: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """The residual stream [R, T, D] before the first layer, of tokens i32[R, T]."""
    table = params["embed"]
    if tokens.size >= cfg.vocab_size:  # fewer tokens, as in a step of decoding, are moved at less cost than the table
        table = constrain_table(table)
    return constrain_rows(table[tokens].astype(cfg.dtype))


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
    tables = rotary_tables(cfg, positions)

    def layer(x: jax.Array, given: tuple[Params, Any]) -> tuple[jax.Array, Any]:
        own, cache = given
        out: Any = Block(cfg).apply({"params": own}, constrain_rows(x), *tables, attend, cache)
        return out

    layers = params["layers"]
    if isinstance(layers, tuple):
        kept = []
        for given in zip(layers, caches or [None] * len(layers), strict=True):
            x, of_layer = layer(x, given)
            kept.append(of_layer)
        return x, tuple(kept)
    stacked = constrain_layers(_kernels_cast(cfg, layers["block"]))
    if not isinstance(caches, Carried):
        return _scan(cfg, layer, x, (stacked, caches))

    def turn(carry: tuple[jax.Array, Any], given: tuple[Params, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
        own, number = given
        return layer(carry[0], (own, Carried(carry[1], number))), None

    return jax.lax.scan(turn, (x, caches.cache), (stacked, jnp.arange(cfg.num_hidden_layers)))[0]


def _kernels_cast(cfg: ModelConfig, stacked: Params) -> Params:
    """Kernels [L, in, out] in the compute dtype, in which they are multiplied and gathered, before the loop over layers:
    their gradients are in it too, of one microbatch at a time. Scales stay as they are."""
    return jax.tree.map(lambda x: x.astype(cfg.dtype) if x.ndim > 2 else x, stacked)


def _scan(cfg: ModelConfig, layer: Callable, x: jax.Array, given: Any) -> tuple[jax.Array, Any]:
    """`layer` over all of what is `given` of each, as the backward pass of rows like x shall see it
    (`ModelConfig.remat`)."""
    remat = chosen_remat(cfg, x.shape[1])
    if remat == "none":
        return jax.lax.scan(layer, x, given)
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    if remat != "groups":
        return jax.lax.scan(layer, x, given)
    size = group_layers(cfg)
    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), given)
    group = jax.checkpoint(functools.partial(jax.lax.scan, layer), prevent_cse=False)
    x, kept = jax.lax.scan(group, x, grouped)
    return x, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), kept)


def forward(
    cfg: ModelConfig, params: Params, tokens: jax.Array, positions: jax.Array, attend: Attend, caches: Any = None
) -> tuple[jax.Array, Any]:
    """Tokens i32[R, T] -> final hidden states [R, T, D], normalised, and what `attend` kept. See `blocks`."""
    x, kept = blocks(cfg, params, embed(cfg, params, tokens), positions, attend, caches)
    hidden: Any = RMSNorm(cfg).apply({"params": params["final_norm"]}, x)
    return hidden, kept


def unembedding(cfg: ModelConfig, params: Params) -> Callable[[jax.Array], jax.Array]:
    """The function from final hidden states [..., D] to logits f32[..., V]; the head is cast once for all its calls.

    Ids that the tokenizer does not have get `ABSENT`: sampler and scorer have one distribution, over the others.
    """
    head = head_matrix(cfg, params)
    ids = np.arange(cfg.vocab_size)
    absent = np.any([(first <= ids) & (ids < last) for first, last in cfg.absent_ids], axis=0)

    def unembed(hidden: jax.Array) -> jax.Array:
        logits = jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.dtype(cfg.logits_dtype))
        logits = logits.astype(jnp.float32)
        return jnp.where(absent, ABSENT, logits) if cfg.absent_ids else logits

    return unembed


def head_matrix(cfg: ModelConfig, params: Params) -> jax.Array:
    """The output projection [D, V] in the compute dtype."""
    return (params["head"] if "head" in params else params["embed"].T).astype(cfg.dtype)


def row_attention(
    cfg: ModelConfig, places: Places, *, longest_item: int | None = None, keep_kv: bool = False
) -> Attend:
    """For `forward`: rows attend to themselves by the config's back end, without a cache.

    Args:
        places: where the tokens of the rows stand.
        longest_item: no item takes more tokens of a row than this (static).
        keep_kv: keep each layer's rotated keys and its values, [R, G, T, d] both.
    """
    if cfg.attn_implementation not in ATTENTION:
        raise ValueError(
            f"attn_implementation={cfg.attn_implementation!r} is unknown; choose one of {', '.join(ATTENTION)}"
        )
    attention = ATTENTION[cfg.attn_implementation]

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
    def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return Block(self.cfg, name="block")(x, *tables, lambda q, k, v, cache, **_: (q, None), None)


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
        layers(cfg, name="layers")(x, rotary_tables(cfg, jnp.zeros((1, 1), jnp.int32)))
        RMSNorm(cfg, name="final_norm")(x)


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters. Trace it under jit with out_shardings to initialise a sharded model in place."""
    return _Parameters(cfg).init(key)["params"]


def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without making them."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
