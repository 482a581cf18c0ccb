"""What a block is made of: norms and linear layers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sera_jax.models.config import ModelConfig
from sera_jax.models.lora import KEY, A, B, dropped


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis of [R, T, ...], in float32.

    R and T are one axis while it computes: with R = 1 a sum over the last of three axes, as the gradient has it, takes
    XLA on a CPU ten times as long as over the last of two. Heads stay apart, since they may lie on several devices.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.param_dtype)
        scale = self.param("scale", nn.initializers.constant(1 - cfg.norm_offset), (x.shape[-1],), dtype)
        shape, x = x.shape, x.reshape(-1, *x.shape[2:])
        wide, bias = x.astype(jnp.float32), None
        if cfg.norm == "layernorm":
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), dtype)
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + cfg.rms_norm_eps)
        if cfg.norm == "rmsnorm" and not cfg.norm_offset:
            return (wide.astype(x.dtype) * scale.astype(x.dtype)).reshape(shape)
        wide = wide * (scale.astype(jnp.float32) + cfg.norm_offset)
        return (wide if bias is None else wide + bias.astype(jnp.float32)).astype(x.dtype).reshape(shape)


class Linear(nn.Module):
    """x [..., in] -> [..., out].

    Leading axes are multiplied as one: of two XLA transposes the output's gradient before it multiplies it for the
    kernel's gradient, which costs a CPU a third of a feed-forward.
    """

    cfg: ModelConfig
    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, dtype = nn.initializers.normal(self.cfg.initializer_range), jnp.dtype(self.cfg.param_dtype)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), dtype)
        leading, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        y = x @ kernel.astype(x.dtype)
        if self.has_variable("params", A):
            a, b = (self.get_variable("params", name).astype(x.dtype) for name in (A, B))
            if self.has_variable("params", KEY):
                x = dropped(x, self.get_variable("params", KEY), self.cfg.lora_dropout)
            y += self.cfg.lora_scale * ((x @ a) @ b)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,), dtype).astype(x.dtype)
        return y.reshape(*leading, self.features)
