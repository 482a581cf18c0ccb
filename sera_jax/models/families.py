"""Families of decoders as data: config.json <-> ModelConfig, and names of tensors <-> our parameters.

A family adds no code, only tables. Whatever a config.json says that the decoder does not compute is refused by name:

* a field of `Family.fields` becomes a field of ModelConfig;
* a field of `Family.required_values` is accepted with the listed values only;
* a field of `IGNORED`, or one that begins with an underscore, does not touch the logits and is passed over;
* any other field is accepted while it is switched off (null, false, empty) and refused otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sera_jax.models.config import DTYPES, ModelConfig, RopeScaling

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of config.json that becomes the ModelConfig field of the same name.

    Attributes:
        kind: int, float or bool.
        default: what transformers takes where config.json leaves the field out or says null: a value, a function of
            the fields read so far, or REQUIRED.
    """

    name: str
    kind: type
    default: Any = REQUIRED


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor name. `{layer}` in it stands for the layers, which lie stacked in our parameter of that path.

    Attributes:
        name: name in the safetensors file.
        path: path in our parameters, `layers/block/q/kernel`.
        transpose: Hugging Face stores linear layers as [out, in], we as [in, out].
    """

    name: str
    path: str
    transpose: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes a family: nothing but names and defaults.

    Attributes:
        name: `model_type` of config.json; architecture: the class name in `architectures`.
        fields: read into ModelConfig, in the order config.json is written.
        required_values: fields that would change the mathematics, with the values under which they do not.
        tensors: every tensor of the checkpoint.
        tied: (name of the output projection, name of the embedding): with tied embeddings a file may hold the
            first as a copy of the second.
        buffers: patterns of tensors in old files that are not parameters; passed over when loading.
    """

    name: str
    architecture: str
    fields: tuple[Field, ...]
    required_values: Mapping[str, tuple[Any, ...]]
    tensors: tuple[Tensor, ...]
    tied: tuple[str, str]
    buffers: tuple[str, ...]


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
    exponential_decay_length_penalty
"""
IGNORED = frozenset(_IGNORED.split())

ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
LLAMA3_KEYS = tuple(field.name for field in dataclasses.fields(RopeScaling))

_LLAMA_LAYER = "model.layers.{layer}."

FAMILIES: dict[str, Family] = {
    "llama": Family(
        name="llama",
        architecture="LlamaForCausalLM",
        fields=(
            Field("vocab_size", int),
            Field("hidden_size", int),
            Field("intermediate_size", int),
            Field("num_hidden_layers", int),
            Field("num_attention_heads", int),
            Field("num_key_value_heads", int, lambda read: read["num_attention_heads"]),
            Field("head_dim", int, lambda read: read["hidden_size"] // max(1, read["num_attention_heads"])),
            Field("max_position_embeddings", int, 2048),
            Field("rms_norm_eps", float, 1e-6),
            Field("tie_word_embeddings", bool, False),
            Field("initializer_range", float, 0.02),
        ),
        required_values={
            "hidden_act": ("silu", "swish"),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
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
        },
        tensors=(
            Tensor("model.embed_tokens.weight", "embed"),
            Tensor(_LLAMA_LAYER + "input_layernorm.weight", "layers/block/attention_norm/scale"),
            Tensor(_LLAMA_LAYER + "self_attn.q_proj.weight", "layers/block/q/kernel", transpose=True),
            Tensor(_LLAMA_LAYER + "self_attn.k_proj.weight", "layers/block/k/kernel", transpose=True),
            Tensor(_LLAMA_LAYER + "self_attn.v_proj.weight", "layers/block/v/kernel", transpose=True),
            Tensor(_LLAMA_LAYER + "self_attn.o_proj.weight", "layers/block/o/kernel", transpose=True),
            Tensor(_LLAMA_LAYER + "post_attention_layernorm.weight", "layers/block/mlp_norm/scale"),
            Tensor(_LLAMA_LAYER + "mlp.gate_proj.weight", "layers/block/gate/kernel", transpose=True),
            Tensor(_LLAMA_LAYER + "mlp.up_proj.weight", "layers/block/up/kernel", transpose=True),
            Tensor(_LLAMA_LAYER + "mlp.down_proj.weight", "layers/block/down/kernel", transpose=True),
            Tensor("model.norm.weight", "final_norm/scale"),
            Tensor("lm_head.weight", "head", transpose=True),
        ),
        tied=("lm_head.weight", "model.embed_tokens.weight"),
        buffers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq"),
    )
}


def family_of(model_type: Any) -> Family:
    """The family of that `model_type`. Raises ValueError listing the known ones."""
    if model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not supported; the families are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def config_from_hf(config: Mapping[str, Any], **precision: Any) -> ModelConfig:
    """The ModelConfig of a parsed config.json, in the manner of transformers 4 or 5.

    Args:
        config: the parsed config.json.
        precision: ModelConfig fields that no config.json speaks of: dtype, param_dtype, logits_dtype, remat, ...

    Raises:
        ValueError: a field is missing, of the wrong type, or would change the mathematics; the message names it.
    """
    family = family_of(config.get("model_type"))
    architectures = config.get("architectures")
    if architectures is not None and list(architectures) != [family.architecture]:
        raise ValueError(
            f"config.json: architectures={architectures!r} is not supported; "
            f"model_type={family.name!r} is read as ['{family.architecture}']"
        )
    read: dict[str, Any] = {}
    for field in family.fields:
        read[field.name] = _read_field(field, config, read)
    _refuse_other_mathematics(family, config, read)
    theta, scaling = _read_rope(config)
    export_dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if export_dtype in DTYPES:
        precision.setdefault("export_dtype", export_dtype)
    return ModelConfig(family=family.name, **read, rope_theta=theta, rope_scaling=scaling, **precision)


def config_to_hf(cfg: ModelConfig, *, dtype: str | None = None) -> dict[str, Any]:
    """A config.json, as a dict, that transformers 4 and 5 both read as this model.

    Args:
        dtype: dtype of the weights beside it; default `cfg.export_dtype`.
    """
    family = family_of(cfg.family)
    scaling = cfg.rope_scaling and {"rope_type": "llama3", **dataclasses.asdict(cfg.rope_scaling)}
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{field.name: getattr(cfg, field.name) for field in family.fields},
        "hidden_act": family.required_values["hidden_act"][0],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "use_cache": True,
        "torch_dtype": dtype or cfg.export_dtype,
    }


def mathematics(cfg: ModelConfig) -> dict[str, Any]:
    """The fields of a ModelConfig that decide the logits; precision, remat and back ends left out."""
    names = [field.name for field in family_of(cfg.family).fields if field.name != "initializer_range"]
    return {name: getattr(cfg, name) for name in ["family", *names, "rope_theta", "rope_scaling"]}


def _read_field(field: Field, config: Mapping[str, Any], read: Mapping[str, Any]) -> Any:
    value = config.get(field.name)
    if value is None:
        if field.default is REQUIRED:
            raise ValueError(f"config.json has no {field.name}; add it")
        return field.default(read) if isinstance(field.default, Callable) else field.default
    return _typed(field.name, value, field.kind)


def _typed(name: str, value: Any, kind: type) -> Any:
    good = isinstance(value, (int, float) if kind is float else kind)
    if not good or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config.json: {name}={value!r} should be of type {kind.__name__}")
    return kind(value)


def _refuse_other_mathematics(family: Family, config: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    problems = []
    known = {field.name for field in family.fields} | {*ROPE_FIELDS, "sliding_window"} | IGNORED
    for name, value in config.items():
        if name in family.required_values:
            allowed = family.required_values[name]
            if not any(type(value) is type(good) and value == good for good in allowed) and not _same_number(
                value, allowed
            ):
                shown = " or ".join(repr(good) for good in allowed)
                problems.append(f"{name}={value!r} would change the mathematics (supported: {shown})")
        elif name not in known and not name.startswith("_") and not _switched_off(value):
            problems.append(
                f"{name}={value!r} is unknown (if it cannot change the logits, take it out of config.json "
                "or add it to families.IGNORED)"
            )
    window, longest = config.get("sliding_window"), read["max_position_embeddings"]
    if window is not None and not (isinstance(window, int) and window >= longest):
        problems.append(
            f"sliding_window={window!r} is shorter than max_position_embeddings={longest}, so it would change the "
            "mathematics (supported: null, or no shorter than that)"
        )
    if problems:
        raise ValueError("config.json describes a model that is not supported: " + "; ".join(problems))


def _same_number(value: Any, allowed: tuple[Any, ...]) -> bool:
    """0 stands for 0.0, but not for False."""
    return type(value) in (int, float) and any(type(good) is float and value == good for good in allowed)


def _switched_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) from `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    block, name = config.get("rope_parameters"), "rope_parameters"
    scaling = config.get("rope_scaling")
    if block is None:
        block, name = scaling, "rope_scaling"
    elif scaling is not None and scaling != block:
        raise ValueError(f"config.json: rope_scaling={scaling!r} contradicts rope_parameters={block!r}; keep one")
    block = {} if block is None else block
    if not isinstance(block, Mapping):
        raise ValueError(f"config.json: {name}={block!r} should be an object or null")

    thetas = [value for value in (block.get("rope_theta"), config.get("rope_theta")) if value is not None]
    if len(set(thetas)) > 1:
        raise ValueError(f"config.json: rope_theta={thetas[1]!r} contradicts {name}.rope_theta={thetas[0]!r}; keep one")
    theta = _typed("rope_theta", thetas[0], float) if thetas else 10000.0

    kinds = {block[key] for key in ("rope_type", "type") if block.get(key) is not None} or {"default"}
    if len(kinds) > 1 or not kinds <= {"default", "llama3"}:
        shown = " and ".join(repr(kind) for kind in sorted(kinds, key=str))
        raise ValueError(f"config.json: {name} of type {shown} is not supported; supported: 'default', 'llama3'")
    if block.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"config.json: {name}.partial_rotary_factor={block['partial_rotary_factor']!r} would change the "
            "mathematics (supported: 1.0)"
        )
    wanted = LLAMA3_KEYS if kinds == {"llama3"} else ()
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *wanted}
    unknown = [f"{name}.{key}={value!r}" for key, value in block.items() if key not in known and value is not None]
    if unknown:
        raise ValueError(f"config.json: {', '.join(unknown)} is not read by rope type {kinds.pop()!r}; take it out")
    missing = [key for key in wanted if block.get(key) is None]
    if missing:
        raise ValueError(f"config.json: {name} of type 'llama3' has no {', '.join(missing)}; add it")
    if not wanted:
        return theta, None
    kinds_by_key = dict.fromkeys(LLAMA3_KEYS, float) | {"original_max_position_embeddings": int}
    return theta, RopeScaling(**{key: _typed(f"{name}.{key}", block[key], kinds_by_key[key]) for key in LLAMA3_KEYS})
