"""Rotary embeddings (RoFormer, section 3.2): which angle each pair of dimensions turns by per position.

Frequencies are made on the host in float64: an error in one is multiplied by the position, and accelerators' `pow` is
loose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sera_jax.models.config import ModelConfig, RopeScaling

Tables = tuple[jax.Array, jax.Array]  # cos and sin


def frequencies(cfg: ModelConfig) -> np.ndarray:
    """Radians per position f32[rotary_dim / 2], scaled as the config says."""
    inverse = _unscaled(cfg, cfg.rope_theta)
    scaling = cfg.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return inverse.astype(np.float32)
    if scaling.rope_type == "linear":
        kept: np.ndarray | float = 0.0
    elif scaling.rope_type == "llama3":
        # rotations within the original context: few are slowed by `factor`, many are kept, between them a blend
        turns = scaling.original_max_position_embeddings * inverse / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        kept = _yarn_kept(cfg, scaling)
    kept = np.clip(kept, 0.0, 1.0)
    return ((1 - kept) * inverse / scaling.factor + kept * inverse).astype(np.float32)


def _unscaled(cfg: ModelConfig, base: float) -> np.ndarray:
    return base ** -(np.arange(0, cfg.rotary_dim, 2, dtype=np.float64) / cfg.rotary_dim)


def _yarn_kept(cfg: ModelConfig, scaling: RopeScaling) -> np.ndarray:
    """Share of each frequency that YaRN (section 3.2) keeps: a ramp over dimensions, between those that make
    `beta_fast` and `beta_slow` rotations within the original context."""

    def dimension(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return cfg.rotary_dim * np.log(length / (rotations * 2 * np.pi)) / (2 * np.log(cfg.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0), min(high, cfg.rotary_dim - 1)
    return 1 - (np.arange(cfg.rotary_dim // 2) - low) / (high - low if high > low else 0.001)


def kinds(cfg: ModelConfig) -> tuple[int, ...]:
    """For every layer which of `tables` turns it: 0 the model's, 1 that of layers with a window, 2 none at all."""
    return tuple(
        2
        if cfg.no_rope_layers and not cfg.no_rope_layers[layer]
        else int(cfg.rope_local_base_freq is not None and cfg.window_of(layer) is not None)
        for layer in range(cfg.num_hidden_layers)
    )


def tables(cfg: ModelConfig, positions: jax.Array, kind: int = 0) -> Tables:
    """cos and sin, f32[R, T, rotary_dim / 2], of positions i32[R, T]; `kind` as in `kinds`."""
    factor = 1.0
    if kind == 0:
        turned = frequencies(cfg)
        factor = 1.0 if cfg.rope_scaling is None else cfg.rope_scaling.attention_factor
    elif kind == 1:
        assert cfg.rope_local_base_freq is not None
        turned = _unscaled(cfg, cfg.rope_local_base_freq).astype(np.float32)
    else:
        turned = np.zeros(cfg.rotary_dim // 2, np.float32)
    angles = positions[:, :, None].astype(jnp.float32) * turned
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if factor == 1.0 else (factor * cos, factor * sin)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the first dimensions of x [R, H, T, d] by tables [R, T, r / 2]; halves are paired as in Hugging Face's
    Llama, and dimensions beyond r pass."""
    turned = x if 2 * cos.shape[-1] == x.shape[-1] else x[..., : 2 * cos.shape[-1]]
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    parts = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.concatenate(parts, axis=-1).astype(x.dtype)
    return turned if turned.shape == x.shape else jnp.concatenate([turned, x[..., turned.shape[-1] :]], axis=-1)
