"""The one decoder definition: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU.

Layers are scanned, so the parameters of all layers lie in one array with a leading axis L. The same `Block` serves
scoring (packed rows), prefill and decoding; only the attention function it is handed differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sera_jax.core import Rows
from sera_jax.mesh import constrain_rows, constrain_table
from sera_jax.models.activations import chosen_remat
from sera_jax.models.config import ModelConfig
from sera_jax.ops.attention import packed_attention

Params = dict[str, Any]
# (q [R, H, T, d], k [R, G, T, d], v [R, G, T, d]) -> [R, H, T, d]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

ATTENTION: dict[str, Callable[..., jax.Array]] = {"xla": packed_attention}


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
        return x @ kernel.astype(x.dtype)


class Block(nn.Module):
    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        """x [R, T, D] -> (x [R, T, D], (k, v) [R, G, T, d]: this layer's rotated keys and values)."""
        cfg = self.cfg
        rows, length, _ = x.shape

        def heads(name: str, y: jax.Array, count: int) -> jax.Array:
            projected = Linear(cfg, count * cfg.head_dim, name=name)(y)
            return projected.reshape(rows, length, count, cfg.head_dim).swapaxes(1, 2)

        y = RMSNorm(cfg, name="attention_norm")(x)
        q = rotate(heads("q", y, cfg.num_attention_heads), cos, sin)
        k = rotate(heads("k", y, cfg.num_key_value_heads), cos, sin)
        v = heads("v", y, cfg.num_key_value_heads)
        mixed = attend(q, k, v).swapaxes(1, 2).reshape(rows, length, -1)
        x = x + Linear(cfg, cfg.hidden_size, name="o")(mixed)

        y = RMSNorm(cfg, name="mlp_norm")(x)
        gate = nn.silu(Linear(cfg, cfg.intermediate_size, name="gate")(y))
        up = Linear(cfg, cfg.intermediate_size, name="up")(y)
        return x + Linear(cfg, cfg.hidden_size, name="down")(gate * up), (k, v)


class _ScannedBlock(nn.Module):
    """`Block` with the signature nn.scan wants: carry in, (carry, per-layer output) out."""

    cfg: ModelConfig
    attend: Attend
    keep_kv: bool

    @nn.compact
    def __call__(self, x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
        x, kv = Block(self.cfg, name="block")(constrain_rows(x), *tables, self.attend)
        return x, kv if self.keep_kv else None


class Decoder(nn.Module):
    """Parameters: embed [V, D], layers/block/* [L, ...], final_norm/scale [D], and head [D, V] unless tied."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attend: Attend, keep_kv: bool = False
    ) -> tuple[jax.Array, Any]:
        """Final hidden states [R, T, D], normalised, and (k, v) [L, R, G, T, d] when `keep_kv`, else None."""
        cfg = self.cfg
        dtype = jnp.dtype(cfg.param_dtype)
        init = nn.initializers.normal(cfg.initializer_range)
        embed = self.param("embed", init, (cfg.vocab_size, cfg.hidden_size), dtype)
        if not cfg.tie_word_embeddings:
            self.param("head", init, (cfg.hidden_size, cfg.vocab_size), dtype)
        x = constrain_table(embed)[tokens].astype(cfg.dtype)
        block: Any = _ScannedBlock
        remat = chosen_remat(cfg, tokens.shape[1])
        if remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
            block = nn.remat(block, policy=policy, prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=cfg.num_hidden_layers,
        )
        x, kv = scanned(cfg, attend, keep_kv, name="layers")(x, rotary_tables(cfg, positions))
        return RMSNorm(cfg, name="final_norm")(x), kv


def head_matrix(cfg: ModelConfig, params: Params) -> jax.Array:
    """The output projection [D, V] in the compute dtype."""
    head = params["embed"].T if cfg.tie_word_embeddings else params["head"]
    return head.astype(cfg.dtype)


def init_params(cfg: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters. Trace it under jit with out_shardings to initialise a sharded model in place."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    attend = functools.partial(packed_attention, segment=tokens, branch=tokens)
    return Decoder(cfg).init(key, tokens, tokens, attend)["params"]


def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without making them."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def hidden_states(cfg: ModelConfig, params: Params, rows: Rows, *, window: int | None = None) -> jax.Array:
    """Final hidden states [R, T, D] of packed rows.

    Args:
        window: no item of the rows is longer than this (static); lets attention skip what it cannot see.
    """
    if cfg.attn_implementation not in ATTENTION:
        raise ValueError(
            f"attn_implementation={cfg.attn_implementation!r} is unknown; choose one of {', '.join(ATTENTION)}"
        )
    attend = functools.partial(
        ATTENTION[cfg.attn_implementation], segment=rows.segment, branch=rows.branch, window=window
    )
    return Decoder(cfg).apply({"params": params}, rows.tokens, rows.positions, attend)[0]
