"""The shape of a decoder, independent of where its weights come from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The `llama3` rotary scaling of Llama 3.1 and later (config.json `rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer of the Llama kind. Field names are those of Hugging Face's config.json.

    Attributes:
        dtype: compute dtype of the matmuls; `param_dtype` that of the stored parameters; `logits_dtype` that of
            the vocabulary projection's output. Log-probs and sums over tokens are float32 always.
        export_dtype: dtype that an export writes unless told otherwise: that of the file the weights came from.
        remat: what the backward pass recomputes: `none`, `full` (keep only layer inputs), `dots` (keep matmuls),
            `groups` (keep only the input of every fourth layer), or `auto`, the least that bounds memory
            (`models.activations`).
        attn_implementation: a name in `ops.attention.ATTENTION`.
        absent_ids: ranges [first, last) of ids that the tokenizer does not have (padded embeddings): they have no
            probability, for who samples and for who scores alike. Not part of the model: an export knows nothing of it.
        lora_scale: what adapters' products are multiplied by, where parameters have them (`models.lora`).
    """

    family: str = "llama"
    vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 176
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    logits_dtype: str = "float32"
    export_dtype: str = "float32"
    remat: str = "none"
    attn_implementation: str = "xla"
    absent_ids: tuple[tuple[int, int], ...] = ()
    lora_scale: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "absent_ids", tuple((first, last) for first, last in self.absent_ids))
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; give a positive number")
        if not self.rope_theta > 0 or not self.rms_norm_eps >= 0:
            raise ValueError(
                f"rope_theta={self.rope_theta}, rms_norm_eps={self.rms_norm_eps}: with a base of angles that is not "
                "above 0, or an epsilon below it, every logit is nan"
            )
        for name in ("dtype", "param_dtype", "logits_dtype", "export_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(DTYPES)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; choose one that divides it"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even number")
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is unknown; choose one of {', '.join(REMAT)}")


REMAT = ("auto", "none", "full", "dots", "groups")
DTYPES = ("float32", "bfloat16", "float16")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
