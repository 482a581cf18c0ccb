"""The families of decoders, as data: what a config.json of each may say, and the names of its tensors.

A family adds a row to `FAMILIES` and no code to the decoder. `models.families` reads the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from sera_jax.models.config import ModelConfig

REQUIRED = object()
AS_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of config.json that becomes a field of ModelConfig.

    Attributes:
        name: in config.json.
        kind: int, float, bool or str.
        default: what transformers takes where config.json leaves the field out: a value, a function of what was read so
            far, or REQUIRED.
        null: what null means; AS_ABSENT: the default.
        to: the fields of ModelConfig that get it; empty: the one of its name.
        values: what its values are called in ModelConfig; empty: all are taken as they are.
    """

    name: str
    kind: type
    default: Any = REQUIRED
    null: Any = AS_ABSENT
    to: tuple[str, ...] = ()
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> tuple[str, ...]:
        return self.to or (self.name,)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor name, and one of our parameters that lies in it. `{layer}` in the name stands for the layers, which
    lie stacked in our parameter.

    Attributes:
        name: name in the safetensors file; several parameters may lie in one tensor.
        path: path in our parameters, `layers/block/q/kernel`.
        transpose: Hugging Face stores linear layers as [out, in], we as [in, out].
        rows: where the parameter is a part of the tensor, which of the tensor's rows [out] it is, in our order.
    """

    name: str
    path: str
    transpose: bool = False
    rows: Callable[[ModelConfig], np.ndarray] | None = None

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


@dataclasses.dataclass(frozen=True)
class Rope:
    """How a config.json writes rotary embeddings.

    Attributes:
        theta: name of the base of the angles, and default_theta what it is where that is left out.
        partial, default_partial: the same of the share of dimensions that is rotated ("": all always are).
        types: of `rope_scaling`, that are computed.
        local_theta: name and default of the base in layers with a window ("": the same as in others).
    """

    theta: str = "rope_theta"
    default_theta: float = 10000.0
    partial: str = ""
    default_partial: float = 1.0
    types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
    local_theta: str = ""
    default_local_theta: float = 10000.0


@dataclasses.dataclass(frozen=True)
class Layerwise:
    """What a config.json says of single layers.

    Attributes:
        fields: the names it uses for that.
        read: (config.json, fields read so far) -> sliding_window, layer_types and no_rope_layers of ModelConfig.
        write: the way back.
    """

    fields: frozenset[str]
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes a family.

    Attributes:
        name: `model_type` of config.json; architecture: the class name in `architectures`.
        tensors: every tensor that a checkpoint may have; one whose parameter a config does not have is left out.
        fields: read into ModelConfig, in the order config.json is written.
        switches: fields of ModelConfig that are the family's own, whatever config.json says; a function is given the
            fields read.
        required_values: fields that would change the mathematics, with the values under which they do not.
        ignored: fields that this family's implementation in transformers does not read.
        layerwise: what its layers differ in; None: all are alike, without a window.
        tied: (name of the output projection, name of the embedding): with tied embeddings a file may hold the
            first as a copy of the second.
        buffers: patterns of tensors in old files that are not parameters; passed over when loading.
    """

    name: str
    architecture: str
    tensors: tuple[Tensor, ...]
    fields: tuple[Field, ...]
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    required_values: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    rope: Rope = Rope()
    layerwise: Layerwise | None = None
    tied: tuple[str, str] = ("lm_head.weight", "model.embed_tokens.weight")
    buffers: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")

    @property
    def paths(self) -> dict[str, Tensor]:
        """The tensor that each of our parameters lies in."""
        return {tensor.path: tensor for tensor in self.tensors}


# Fields that say nothing about the logits: provenance, tokens, generation, training heads, and options of Hugging
# Face's own implementation. `pretraining_tp` only split matmuls into slices.
_IGNORED = """
    architectures model_type transformers_version torch_dtype dtype use_cache pretraining_tp is_llama_config
    transformers.js_config unsloth_version unsloth_fixed bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id tokenizer_class prefix max_sequence_length finetuning_task task_specific_params
    problem_type id2label label2id num_labels output_attentions output_hidden_states return_dict
    return_dict_in_generate output_scores torchscript use_bfloat16 tf_legacy_loss is_decoder
    chunk_size_feed_forward remove_invalid_values tie_encoder_decoder temperature top_k top_p typical_p do_sample
    max_length min_length max_new_tokens num_beams num_beam_groups num_return_sequences diversity_penalty
    early_stopping length_penalty repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
    exponential_decay_length_penalty cache_implementation classifier_dropout
"""
IGNORED = frozenset(_IGNORED.split())

# Fields of any family that would change what is computed.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    "auto_map": (None,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
}

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
_PRE_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_POST_NORMS = {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}
_BOTH_NORMS = {"input_layernorm": "attention_norm", "pre_feedforward_layernorm": "mlp_norm", **_POST_NORMS}
_QKV_ROWS = _fused(_queries, _keys, _keys)
_GATE_UP_ROWS = _fused(_inner, _inner)


def _tensors(norms: Mapping[str, str], *, fused: bool = False) -> tuple[Tensor, ...]:
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
_NEOX_TENSORS = (
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


def _types(sliding: Iterable[Any]) -> list[str]:
    return ["sliding_attention" if windowed else "full_attention" for windowed in sliding]


def _types_of(cfg: ModelConfig) -> list[str]:
    return _types(cfg.window_of(layer) for layer in range(cfg.num_hidden_layers))


def _every_layer(default: int | None) -> Layerwise:
    """The window is that of all layers; `default`: where the field is left out."""
    return Layerwise(
        frozenset({"sliding_window"}),
        lambda config, read: {"sliding_window": config.get("sliding_window", default)},
        lambda cfg: {"sliding_window": cfg.sliding_window},
    )


def _read_switched(config: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    types = _types(window is not None and layer >= first for layer in range(read["num_hidden_layers"]))
    return {"sliding_window": window, "layer_types": config.get("layer_types") or types}


def _write_switched(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": cfg.sliding_window is not None,
        "sliding_window": cfg.sliding_window,
        "layer_types": _types_of(cfg),
    }


_SWITCHED = Layerwise(  # layers from `max_window_layers` on, or those that `layer_types` names, if `use_sliding_window`
    frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
    _read_switched,
    _write_switched,
)


def _read_unturned(config: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    every = config.get("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers") or [
        int((layer + 1) % every != 0) for layer in range(read["num_hidden_layers"])
    ]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = _types(window is not None and not turn for turn in turned)
    return {"no_rope_layers": turned, "sliding_window": window, "layer_types": config.get("layer_types") or types}


_UNTURNED = Layerwise(  # SmolLM3: every fourth layer is without rotary embeddings, and may have a window
    _SWITCHED.fields | {"no_rope_layers", "no_rope_layer_interval"},
    _read_unturned,
    lambda cfg: {
        **_write_switched(cfg),
        "no_rope_layers": list(cfg.no_rope_layers) or [1] * cfg.num_hidden_layers,
    },
)


def _alternating(period: int) -> Layerwise:
    """All layers but every `period`-th, unless `layer_types` names them; `sliding_window_pattern` is the period."""

    def read(config: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        pattern = config.get("sliding_window_pattern") or period
        types = _types((layer + 1) % pattern for layer in range(found["num_hidden_layers"]))
        return {
            "sliding_window": config.get("sliding_window", 4096),
            "layer_types": config.get("layer_types") or types,
        }

    def write(cfg: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": cfg.sliding_window or 4096, "layer_types": _types_of(cfg)}

    return Layerwise(
        frozenset({"sliding_window", "sliding_window_pattern", "sliding_window_size", "layer_types"}), read, write
    )


_GEMMA = dict(
    norm_offset=1.0,
    embedding_multiplier=lambda read: read["hidden_size"] ** 0.5,
)


def _softcap(name: str, default: float | None) -> Field:
    return Field(name, float, default, null=None)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(  # Llama 2, 3, 3.1 and 3.2, TinyLlama, SmolLM 1 and 2
            name="llama",
            architecture="LlamaForCausalLM",
            tensors=_tensors(_PRE_NORMS),
            fields=_fields(_ATTENTION_BIAS, _MLP_BIAS),
        ),
        Family(
            name="mistral",
            architecture="MistralForCausalLM",
            tensors=_tensors(_PRE_NORMS),
            fields=_fields(longest=131072),
            layerwise=_every_layer(4096),
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            tensors=_tensors(_PRE_NORMS),
            fields=_fields(longest=32768),
            switches=dict(qkv_bias=True),
            layerwise=_SWITCHED,
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            tensors=_tensors(_PRE_NORMS),
            fields=_fields(_ATTENTION_BIAS, head_dim=128, longest=32768),
            switches=dict(qk_norm="head"),
            layerwise=_SWITCHED,
        ),
        Family(
            name="smollm3",
            architecture="SmolLM3ForCausalLM",
            tensors=_tensors(_PRE_NORMS),
            fields=_fields(_ATTENTION_BIAS, _MLP_BIAS, longest=32768, tied=True),
            rope=Rope(default_theta=2000000.0),
            layerwise=_UNTURNED,
        ),
        Family(
            name="gemma",
            architecture="GemmaForCausalLM",
            tensors=_tensors(_PRE_NORMS),
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
            tensors=_tensors(_BOTH_NORMS),
            fields=_fields(
                _ATTENTION_BIAS,
                Field("query_pre_attn_scalar", int, 256),
                _softcap("attn_logit_softcapping", 50.0),
                _softcap("final_logit_softcapping", 30.0),
                act=_HIDDEN_ACTIVATION,
                head_dim=256,
                longest=8192,
                tied=True,
            ),
            switches=_GEMMA | dict(post_norm=True),
            ignored=frozenset({"hidden_act"}),
            layerwise=_alternating(2),
        ),
        Family(
            name="gemma3_text",
            architecture="Gemma3ForCausalLM",
            tensors=_tensors(_BOTH_NORMS),
            fields=_fields(
                _ATTENTION_BIAS,
                Field("query_pre_attn_scalar", int, 256),
                _softcap("attn_logit_softcapping", None),
                _softcap("final_logit_softcapping", None),
                act=_HIDDEN_ACTIVATION,
                head_dim=256,
                longest=131072,
                tied=True,
            ),
            switches=_GEMMA | dict(post_norm=True, qk_norm="head"),
            ignored=frozenset({"hidden_act"}),
            rope=Rope(default_theta=1e6, local_theta="rope_local_base_freq"),
            layerwise=_alternating(6),
        ),
        Family(
            name="phi3",
            architecture="Phi3ForCausalLM",
            tensors=_tensors(_PRE_NORMS, fused=True),
            fields=_fields(eps=1e-5, longest=4096),
            required_values={
                "attention_bias": (False, None),
                "embd_pdrop": (0.0, None),
                "resid_pdrop": (0.0, None),
            },
            ignored=frozenset({"original_max_position_embeddings"}),
            rope=Rope(partial="partial_rotary_factor", types=("default",)),
            layerwise=_every_layer(None),
        ),
        Family(
            name="olmo2",
            architecture="Olmo2ForCausalLM",
            tensors=_tensors(_POST_NORMS),
            fields=_fields(_ATTENTION_BIAS, eps=1e-5),
            switches=dict(pre_norm=False, post_norm=True, qk_norm="width"),
        ),
        Family(  # Pythia
            name="gpt_neox",
            architecture="GPTNeoXForCausalLM",
            tensors=_NEOX_TENSORS,
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
