"""How much of the forward pass is kept for the backward pass: counted from the shape of the model alone.

The rest of what an update holds is known beforehand: parameters, gradients (twice while they are accumulated) and
optimiser state. Activations grow with the rows that are trained on at a time, so they are what must be bounded.
"""

from __future__ import annotations

import jax.numpy as jnp

from sera_jax.models.config import ModelConfig

ACTIVATION_BYTES = 2**30  # what an update may keep on each device at a time, unless a single row needs more


def chosen_remat(cfg: ModelConfig, row_tokens: int) -> str:
    """What the backward pass recomputes: `cfg.remat`, or for `auto` all but matmuls and attention, where a row then
    fits ACTIVATION_BYTES, else `full`. On a CPU to store and fetch the rest takes longer than to compute it again."""
    if cfg.remat != "auto":
        return cfg.remat
    return "dots" if _bytes(cfg, row_tokens, "dots") <= ACTIVATION_BYTES else "full"


def activation_bytes(cfg: ModelConfig, row_tokens: int) -> int:
    """What the backward pass of one row of `row_tokens` tokens keeps of its forward pass, logits left out."""
    return _bytes(cfg, row_tokens, chosen_remat(cfg, row_tokens))


def group_layers(cfg: ModelConfig) -> int:
    """Layers of which `groups` keeps the first one's input: four, or fewer where that does not divide their number."""
    return next(size for size in (4, 3, 2, 1) if cfg.num_hidden_layers % size == 0)


def _bytes(cfg: ModelConfig, row_tokens: int, remat: str) -> int:
    hidden, inner, layers = cfg.hidden_size, cfg.intermediate_size, cfg.num_hidden_layers
    projected = (cfg.num_attention_heads + 2 * cfg.num_key_value_heads) * cfg.head_dim
    layer = 5 * hidden + 5 * inner + 2 * projected  # in and out of norms, rotation, attention, gate and sums
    group = group_layers(cfg)
    kept = {
        "none": layer * layers,
        "dots": (2 * hidden + 2 * inner + projected + cfg.num_attention_heads * cfg.head_dim) * layers,
        "full": hidden * layers,
        "groups": hidden * (layers // group + group),  # the inputs of groups, and of the layers of one
    }[remat]
    working = 0 if remat == "none" else layer  # the layer whose forward pass is being repeated
    return row_tokens * (kept + working) * jnp.dtype(cfg.dtype).itemsize
