"""Low-rank adapters (LoRA, Hu et al. 2022): leaves beside the kernels, so that a tree without them is the base model.

    layers/block/q/kernel [L, in, out]    lora_a [L, in, r]    lora_b [L, r, out]

    y = x kernel + scale (x lora_a) lora_b          scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)

`Linear` adds the second term where the tree it is given has these leaves; the scale is `ModelConfig.lora_scale`. Where
a key lies beside them (`dropping`), entries of the x of that term are dropped by it (`ModelConfig.lora_dropout`).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from sera_jax.models.config import ModelConfig
from sera_jax.models.parts import Tree, joined, merge, nested, paths, split

KERNEL, A, B, KEY = "kernel", "lora_a", "lora_b", "lora_key"
ADAPTERS = rf".*/({A}|{B})"  # whole paths of adapters
DTYPE = jnp.float32  # of adapters, whatever the base is kept in


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted, and how. `kernels`: whole paths of stacked kernels, such as layers/block/q/kernel."""

    rank: int
    alpha: float
    kernels: tuple[str, ...]
    use_rslora: bool = False
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def init_adapters(lora: Lora, params: Tree, key: jax.Array) -> Tree:
    """Fresh adapters of a model of these parameters, which change nothing: a is uniform in +-1/sqrt(in), as PEFT draws
    it, b is 0.

    Each kernel's are drawn by its own name, so they do not depend on what else is adapted.
    """
    kernels = paths(params)
    out: Tree = {}
    for path in lora.kernels:
        layers, inputs, outputs = kernels[path].shape
        own, bound = jax.random.fold_in(key, zlib.crc32(path.encode())), inputs**-0.5
        a = jax.random.uniform(own, (layers, inputs, lora.rank), DTYPE, -bound, bound)
        beside = path.removesuffix(KERNEL)
        out = merge(out, nested({f"{beside}{A}": a, f"{beside}{B}": jnp.zeros((layers, lora.rank, outputs), DTYPE)}))
    return out


def dropping(lora: Lora, params: Tree, key: jax.Array) -> Tree:
    """The parameters with a key [L, 2] beside each adapter, another in every layer: what is computed of them drops."""
    kernels = paths(params)

    def keys(path: str) -> jax.Array:
        layers = kernels[path].shape[0]
        return jax.random.key_data(jax.random.split(jax.random.fold_in(key, zlib.crc32(path.encode())), layers))

    return merge(params, nested({path.removesuffix(KERNEL) + KEY: keys(path) for path in lora.kernels}))


def dropped(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """Entries of x are 0 with probability `rate` and else divided by 1 - rate, so that the mean stays. key: u32[2]."""
    keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def has_adapters(params: Tree) -> bool:
    return bool(split(params, ADAPTERS)[0])


def merged(cfg: ModelConfig, params: Tree) -> Tree:
    """The same function without adapters, and with all layers in one stack: kernel + scale a b, added in float32 and
    rounded to the kernel's dtype.

    A layer at a time, so that one layer's sum is alive in float32.
    """

    def one(layer: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        kernel, a, b = layer
        change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(DTYPE) + cfg.lora_scale * change).astype(kernel.dtype)

    def walk(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if A not in node:
            return {name: walk(part) for name, part in node.items()}
        rest = {name: part for name, part in node.items() if name not in (A, B)}
        return {**rest, KERNEL: jax.lax.map(one, (node[KERNEL], node[A], node[B]))}

    return walk(joined(params))
