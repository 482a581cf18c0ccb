"""The families of decoders, as data: what a config.json of each may say, and the names of its tensors.

A family adds a row to `FAMILIES` and no code to the decoder. `models.families` reads the table.
"""

from __future__ import annotations

from typing import Any

from sera_jax.models.family import Family, Field, Rope
from sera_jax.models.family_layers import SWITCHED, UNTURNED, alternating, every_layer
from sera_jax.models.family_tensors import BOTH_NORMS, NEOX_TENSORS, POST_NORMS, PRE_NORMS, llama_tensors

# What config.json calls an activation, first the name that is written.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_GEMMA_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}  # its `gelu` has always been the tanh one


def _fields(
    *more: Field,
    act: Field | None = None,
    head_dim: Any = None,
    eps: Any = 1e-6,
    longest: Any = 2048,
    tied: bool = False,
) -> tuple[Field, ...]:
    """The fields that all families have, by what transformers takes where they are left out, and `more`."""
    return (
        Field("vocab_size", int),
        Field("hidden_size", int),
        Field("intermediate_size", int),
        Field("num_hidden_layers", int),
        Field("num_attention_heads", int),
        Field("num_key_value_heads", int, lambda read: read["num_attention_heads"]),
        Field("head_dim", int, head_dim or (lambda read: read["hidden_size"] // max(1, read["num_attention_heads"]))),
        act or Field("hidden_act", str, "silu", to=("activation",), values=_ACTIVATIONS),
        Field("max_position_embeddings", int, longest),
        Field("rms_norm_eps", float, eps),
        Field("tie_word_embeddings", bool, tied),
        Field("initializer_range", float, 0.02),
        *more,
    )


_ATTENTION_BIAS = Field("attention_bias", bool, False, to=("qkv_bias", "out_bias"))
_MLP_BIAS = Field("mlp_bias", bool, False)
_HIDDEN_ACTIVATION = Field(
    "hidden_activation",
    str,
    "gelu_pytorch_tanh",
    to=("activation",),
    values={"gelu_pytorch_tanh": "gelu_tanh"} | _ACTIVATIONS,
)


_GEMMA = dict(
    norm_offset=1.0,
    embedding_multiplier=lambda read: read["hidden_size"] ** 0.5,
)


def _gemma_fields(*, attn_cap: float | None, final_cap: float | None, longest: int) -> tuple[Field, ...]:
    """Of Gemma 2 and 3; caps where they are left out: null means none."""
    return _fields(
        _ATTENTION_BIAS,
        Field("query_pre_attn_scalar", int, 256),
        Field("attn_logit_softcapping", float, attn_cap, null=None),
        Field("final_logit_softcapping", float, final_cap, null=None),
        act=_HIDDEN_ACTIVATION,
        head_dim=256,
        longest=longest,
        tied=True,
    )


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(  # Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM 1 and 2
            name="llama",
            architecture="LlamaForCausalLM",
            tensors=llama_tensors(PRE_NORMS),
            fields=_fields(_ATTENTION_BIAS, _MLP_BIAS),
        ),
        Family(
            name="mistral",
            architecture="MistralForCausalLM",
            tensors=llama_tensors(PRE_NORMS),
            fields=_fields(longest=131072),
            layerwise=every_layer(4096),
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            tensors=llama_tensors(PRE_NORMS),
            fields=_fields(longest=32768),
            switches=dict(qkv_bias=True),
            layerwise=SWITCHED,
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            tensors=llama_tensors(PRE_NORMS),
            fields=_fields(_ATTENTION_BIAS, head_dim=128, longest=32768),
            switches=dict(qk_norm="head"),
            layerwise=SWITCHED,
        ),
        Family(
            name="smollm3",
            architecture="SmolLM3ForCausalLM",
            tensors=llama_tensors(PRE_NORMS),
            fields=_fields(_ATTENTION_BIAS, _MLP_BIAS, longest=32768, tied=True),
            rope=Rope(default_theta=2000000.0),
            layerwise=UNTURNED,
        ),
        Family(
            name="gemma",
            architecture="GemmaForCausalLM",
            tensors=llama_tensors(PRE_NORMS),
            fields=_fields(
                _ATTENTION_BIAS,
                act=Field("hidden_act", str, "gelu_pytorch_tanh", to=("activation",), values=_GEMMA_ACTIVATIONS),
                head_dim=256,
                longest=8192,
                tied=True,
            ),
            switches=_GEMMA,
            required_values={"hidden_activation": ("gelu_pytorch_tanh", None)},
        ),
        Family(
            name="gemma2",
            architecture="Gemma2ForCausalLM",
            tensors=llama_tensors(BOTH_NORMS),
            fields=_gemma_fields(attn_cap=50.0, final_cap=30.0, longest=8192),
            switches=_GEMMA | dict(post_norm=True),
            ignored=frozenset({"hidden_act"}),
            layerwise=alternating(2),
        ),
        Family(
            name="gemma3_text",
            architecture="Gemma3ForCausalLM",
            tensors=llama_tensors(BOTH_NORMS),
            fields=_gemma_fields(attn_cap=None, final_cap=None, longest=131072),
            switches=_GEMMA | dict(post_norm=True, qk_norm="head"),
            ignored=frozenset({"hidden_act"}),
            rope=Rope(default_theta=1e6, local_theta="rope_local_base_freq"),
            layerwise=alternating(6),
        ),
        Family(
            name="phi3",
            architecture="Phi3ForCausalLM",
            tensors=llama_tensors(PRE_NORMS, fused=True),
            fields=_fields(eps=1e-5, longest=4096),
            required_values={
                "attention_bias": (False, None),
                "embd_pdrop": (0.0, None),
                "resid_pdrop": (0.0, None),
            },
            ignored=frozenset({"original_max_position_embeddings"}),
            rope=Rope(partial="partial_rotary_factor", types=("default",)),
            layerwise=every_layer(None),
        ),
        Family(
            name="olmo2",
            architecture="Olmo2ForCausalLM",
            tensors=llama_tensors(POST_NORMS),
            fields=_fields(_ATTENTION_BIAS, eps=1e-5),
            switches=dict(pre_norm=False, post_norm=True, qk_norm="width"),
        ),
        Family(  # Pythia
            name="gpt_neox",
            architecture="GPTNeoXForCausalLM",
            tensors=NEOX_TENSORS,
            fields=(
                Field("vocab_size", int),
                Field("hidden_size", int),
                Field("intermediate_size", int),
                Field("num_hidden_layers", int),
                Field("num_attention_heads", int),
                Field("hidden_act", str, "gelu", to=("activation",), values=_ACTIVATIONS),
                Field("max_position_embeddings", int, 2048),
                Field("layer_norm_eps", float, 1e-5, to=("rms_norm_eps",)),
                Field("tie_word_embeddings", bool, False),
                Field("initializer_range", float, 0.02),
                Field("use_parallel_residual", bool, True, to=("parallel_residual",)),
                Field("attention_bias", bool, True, to=("qkv_bias", "out_bias")),
            ),
            switches=dict(
                norm="layernorm",
                gated_mlp=False,
                mlp_bias=True,
                num_key_value_heads=lambda read: read["num_attention_heads"],
                head_dim=lambda read: read["hidden_size"] // max(1, read["num_attention_heads"]),
            ),
            required_values={"hidden_dropout": (0.0, None)},
            rope=Rope(theta="rotary_emb_base", partial="rotary_pct", default_partial=0.25),
            tied=("embed_out.weight", "gpt_neox.embed_in.weight"),
            buffers=(
                r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
                r"gpt_neox\.rotary_emb\.inv_freq",
            ),
        ),
    )
}
