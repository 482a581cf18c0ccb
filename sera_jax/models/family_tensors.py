"""Names of tensors in Hugging Face files: Llama's, which most families have in variants, and GPT-NeoX's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from sera_jax.models.config import ModelConfig
from sera_jax.models.family import Tensor


def _fused(*parts: Callable[[ModelConfig], int]) -> tuple[Callable[[ModelConfig], np.ndarray], ...]:
    """Rows of parts that lie one after the other in a tensor, by their lengths."""

    def rows(cfg: ModelConfig, part: int) -> np.ndarray:
        ends = np.cumsum([0, *(length(cfg) for length in parts)])
        return np.arange(ends[part], ends[part + 1])

    return tuple(lambda cfg, part=part: rows(cfg, part) for part in range(len(parts)))


def _queries(cfg: ModelConfig) -> int:
    return cfg.num_attention_heads * cfg.head_dim


def _keys(cfg: ModelConfig) -> int:
    return cfg.num_key_value_heads * cfg.head_dim


def _inner(cfg: ModelConfig) -> int:
    return cfg.intermediate_size


def _of_each_head(part: int) -> Callable[[ModelConfig], np.ndarray]:
    """Rows of the queries, keys or values where all three of a head lie together, head after head."""

    def rows(cfg: ModelConfig) -> np.ndarray:
        return np.arange(3 * _queries(cfg)).reshape(cfg.num_attention_heads, 3, cfg.head_dim)[:, part].reshape(-1)

    return rows


def _linear(name: str, path: str, rows: Callable[[ModelConfig], np.ndarray] | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer."""
    return (
        Tensor(f"{name}.weight", f"{path}/kernel", transpose=True, rows=rows),
        Tensor(f"{name}.bias", f"{path}/bias", rows=rows),
    )


_LAYER, _BLOCK = "model.layers.{layer}.", "layers/block/"
PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
POST_NORMS = {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}
BOTH_NORMS = {"input_layernorm": "attention_norm", "pre_feedforward_layernorm": "mlp_norm", **POST_NORMS}
_QKV_ROWS = _fused(_queries, _keys, _keys)
_GATE_UP_ROWS = _fused(_inner, _inner)


def llama_tensors(norms: Mapping[str, str], *, fused: bool = False) -> tuple[Tensor, ...]:
    """The tensors of a family with Llama's names, but for its norms and, in `fused`, its joint projections."""

    def linear(name: str, path: str, rows: Callable[[ModelConfig], np.ndarray] | None = None) -> tuple[Tensor, Tensor]:
        return _linear(_LAYER + name, _BLOCK + path, rows)

    if fused:
        attention = [
            tensor
            for ours, rows in zip("qkv", _QKV_ROWS, strict=True)
            for tensor in linear("self_attn.qkv_proj", ours, rows)
        ]
        mlp = [
            tensor
            for ours, rows in zip(("gate", "up"), _GATE_UP_ROWS, strict=True)
            for tensor in linear("mlp.gate_up_proj", ours, rows)
        ]
    else:
        attention = [tensor for ours in "qkv" for tensor in linear(f"self_attn.{ours}_proj", ours)]
        mlp = [tensor for ours in ("gate", "up") for tensor in linear(f"mlp.{ours}_proj", ours)]
    return (
        Tensor("model.embed_tokens.weight", "embed"),
        *(Tensor(f"{_LAYER}{name}.weight", f"{_BLOCK}{ours}/scale") for name, ours in norms.items()),
        *attention,
        *linear("self_attn.o_proj", "o"),
        Tensor(f"{_LAYER}self_attn.q_norm.weight", f"{_BLOCK}q_norm/scale"),
        Tensor(f"{_LAYER}self_attn.k_norm.weight", f"{_BLOCK}k_norm/scale"),
        *mlp,
        *linear("mlp.down_proj", "down"),
        Tensor("model.norm.weight", "final_norm/scale"),
        Tensor("lm_head.weight", "head", transpose=True),
    )


def _norm(name: str, path: str) -> tuple[Tensor, Tensor]:
    return Tensor(f"{name}.weight", f"{path}/scale"), Tensor(f"{name}.bias", f"{path}/bias")


_NEOX_LAYER = "gpt_neox.layers.{layer}."
NEOX_TENSORS = (
    Tensor("gpt_neox.embed_in.weight", "embed"),
    *_norm(_NEOX_LAYER + "input_layernorm", _BLOCK + "attention_norm"),
    *_norm(_NEOX_LAYER + "post_attention_layernorm", _BLOCK + "mlp_norm"),
    *(
        tensor
        for part, ours in enumerate("qkv")
        for tensor in _linear(_NEOX_LAYER + "attention.query_key_value", _BLOCK + ours, _of_each_head(part))
    ),
    *_linear(_NEOX_LAYER + "attention.dense", _BLOCK + "o"),
    *_linear(_NEOX_LAYER + "mlp.dense_h_to_4h", _BLOCK + "up"),
    *_linear(_NEOX_LAYER + "mlp.dense_4h_to_h", _BLOCK + "down"),
    *_norm("gpt_neox.final_layer_norm", "final_norm"),
    Tensor("embed_out.weight", "head", transpose=True),
)
