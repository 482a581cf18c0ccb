"""What can be said of a family of decoders: the form of a row of `models.family_table`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
