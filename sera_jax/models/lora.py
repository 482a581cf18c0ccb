"""Low-rank adapters (LoRA, Hu et al. 2022): leaves beside the kernels, so that a tree without them is the base model.

    layers/block/q/kernel [L, in, out]    lora_a [L, in, r]    lora_b [L, r, out]

    y = x kernel + scale (x lora_a) lora_b          scale = alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)

`Linear` adds the second term where the tree it is given has these leaves; the scale is `ModelConfig.lora_scale`.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from sera_jax.models.config import ModelConfig
from sera_jax.models.parts import Tree, merge, nested, paths, split

KERNEL, A, B = "kernel", "lora_a", "lora_b"
ADAPTERS = rf".*/({A}|{B})"  # whole paths of adapters
DTYPE = jnp.float32  # of adapters, whatever the base is kept in


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted, and how. `kernels`: whole paths of stacked kernels, such as layers/block/q/kernel."""

    rank: int
    alpha: float
    kernels: tuple[str, ...]
    use_rslora: bool = False

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


def has_adapters(params: Tree) -> bool:
    return bool(split(params, ADAPTERS)[0])


def merged(cfg: ModelConfig, params: Tree) -> Tree:
    """The same function without adapters: kernel + scale a b, added in float32 and rounded to the kernel's dtype.

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

    return walk(params)
