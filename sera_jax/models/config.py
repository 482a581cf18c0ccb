"""The shape of a decoder, independent of where its weights come from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A scaling of the rotary frequencies beyond the length that a model was trained on: config.json's `rope_scaling`.

    Attributes:
        factor: by which slow rotations are slowed further.
        low_freq_factor, high_freq_factor: `llama3`'s, in rotations within the original length.
        original_max_position_embeddings: that length, of `llama3` and `yarn`.
        rope_type: `llama3` (Llama 3.1 and later), `linear`, `yarn`, or `dynamic`, which within max_position_embeddings
            changes nothing.
        beta_fast, beta_slow, truncate: `yarn`'s bounds, in rotations, and whether they are rounded to dimensions.
        attention_factor: by which `yarn` multiplies cos and sin.
    """

    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position_embeddings: int = 0
    rope_type: str = "llama3"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Where Hugging Face's config.json has a field for something, it has that name here.

    What makes the mathematics of one family differ from another's are the switches below, and nothing else: the decoder
    never asks for the family. Their defaults are Llama's.

    Attributes:
        family: the names of its tensors in a file (`models.family_table`).
        norm: `rmsnorm` or `layernorm`, with a bias; its epsilon is `rms_norm_eps` for both.
        norm_offset: added to the stored scales of norms (Gemma: 1).
        pre_norm, post_norm: a norm before, and after, attention and feed-forward, within the residual branch.
        parallel_residual: both read the same residual stream.
        activation: `silu`, `gelu`, or `gelu_tanh`, its approximation; gated_mlp: act(gate(x)) * up(x) instead of
            act(up(x)).
        qkv_bias, out_bias, mlp_bias: of the linear layers.
        qk_norm: of queries and keys before they are rotated: `none`, `head` by head, or over the whole `width`.
        partial_rotary_factor: share of a head's dimensions that is rotated.
        no_rope_layers: for every layer 1 if it rotates, 0 if not (config.json's field, which says the contrary of its
            name); empty: all do.
        rope_local_base_freq: base of the angles in layers with a sliding window, which are not scaled; None: as others.
        embedding_multiplier: of the embeddings, before the first layer.
        query_pre_attn_scalar: scores are divided by its root; None: head_dim.
        attn_logit_softcapping, final_logit_softcapping: c * tanh(x / c) of scores and of logits; None: no.
        sliding_window: tokens that a token sees, itself included; None: all before it.
        layer_types: for every layer `sliding_attention` or `full_attention`; empty: all have the window, if any.
        dtype: compute dtype of the matmuls; `param_dtype` that of the stored parameters; `logits_dtype` that of
            the vocabulary projection's output. Log-probs and sums over tokens are float32 always.
        export_dtype: dtype that an export writes unless told otherwise: that of the file the weights came from.
        remat: what the backward pass recomputes: `none`, `full` (keep only layer inputs), `dots` (keep matmuls
            and what attention gave, but of `cudnn`), `groups` (keep only the input of every fourth layer), or `auto`,
            the fastest that bounds memory (`models.activations`).
        attn_implementation: a name in `ops.backends.ATTENTION`, or `auto`.
        absent_ids: ranges [first, last) of ids that the tokenizer does not have (padded embeddings): they have no
            probability, for who samples and for who scores alike. Not part of the model: an export knows nothing of it.
        lora_scale: what adapters' products are multiplied by, where parameters have them (`models.lora`);
            lora_dropout: the share of their inputs that is dropped, where keys lie beside them.
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
    norm: str = "rmsnorm"
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    parallel_residual: bool = False
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    partial_rotary_factor: float = 1.0
    no_rope_layers: tuple[int, ...] = ()
    rope_local_base_freq: float | None = None
    embedding_multiplier: float = 1.0
    query_pre_attn_scalar: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    initializer_range: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    logits_dtype: str = "float32"
    export_dtype: str = "float32"
    remat: str = "none"
    attn_implementation: str = "auto"
    absent_ids: tuple[tuple[int, int], ...] = ()
    lora_scale: float = 0.0
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "absent_ids", tuple((first, last) for first, last in self.absent_ids))
        object.__setattr__(self, "no_rope_layers", tuple(self.no_rope_layers))
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        for name in SIZES:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; give a positive number")
        for name, kinds in LAYERWISE.items():
            given = getattr(self, name)
            if given and (len(given) != self.num_hidden_layers or not set(given) <= set(kinds)):
                raise ValueError(
                    f"{name}={list(given)} should name {' or '.join(map(repr, kinds))} for each of the "
                    f"num_hidden_layers={self.num_hidden_layers} layers"
                )
        for name, kinds in KINDS.items():
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(kinds)}")
        if not self.rope_theta > 0 or not self.rms_norm_eps >= 0:
            raise ValueError(
                f"rope_theta={self.rope_theta}, rms_norm_eps={self.rms_norm_eps}: with a base of angles that is not "
                "above 0, or an epsilon below it, every logit is nan"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}; choose one that divides it"
            )
        if self.head_dim % 2 or self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim}, of which partial_rotary_factor={self.partial_rotary_factor} is rotated: "
                "both must be even numbers of dimensions, and the second not 0 or more than the first"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError(
                "layer_types names layers of 'sliding_attention', but there is no sliding_window; give one"
            )

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, or None."""
        return None if self.layer_types and self.layer_types[layer] == "full_attention" else self.sliding_window

    @property
    def layer_parameters(self) -> int:
        """Numbers in the matrices of a layer."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * (heads * self.head_dim + (3 if self.gated_mlp else 2) * self.intermediate_size)


REMAT = ("auto", "none", "full", "dots", "groups")
DTYPES = ("float32", "bfloat16", "float16")
KINDS = {
    "norm": ("rmsnorm", "layernorm"),
    "activation": ("silu", "gelu", "gelu_tanh"),
    "qk_norm": ("none", "head", "width"),
    "remat": REMAT,
    **dict.fromkeys(("dtype", "param_dtype", "logits_dtype", "export_dtype"), DTYPES),
}
LAYERWISE = {"layer_types": ("full_attention", "sliding_attention"), "no_rope_layers": (0, 1)}
# Fields that decide no logit: how numbers are held, and what is computed again.
UNMATHEMATICAL = (
    "dtype",
    "param_dtype",
    "logits_dtype",
    "export_dtype",
    "remat",
    "attn_implementation",
    "absent_ids",
    "lora_scale",
    "lora_dropout",
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
