"""The base model: where it is, or its shape."""

from __future__ import annotations

import dataclasses

from sera_jax.config.fields import above, at_least, one_of


@dataclasses.dataclass(frozen=True)
class ModelGroup:
    """The base model: a Hugging Face folder or repository, or a shape to train from scratch.

    `sft_model_path` names an SFT checkpoint to start from instead of running SFT: a model, or, in PEFT's format, an
    adapter of `model_name_or_path`. The shape fields are read only when
    `model_name_or_path` is empty. `vocab_size` is then the number of BPE pieces trained from the data, unless
    `tokenizer_name_or_path` brings a tokenizer (0: the tokenizer's own size).

    A name that is no path here is a repository of the Hugging Face hub, `org/name` or `org/name@REVISION`, in all three
    fields.

    revision: branch, tag or commit of the repository of `model_name_or_path`, wherever that one is named.
    dtype: of the matmuls. param_dtype: of the parameters as they are kept; see master_weights of `train` for bfloat16.
    remat: what the backward pass computes again instead of keeping it: `none`, `dots` (all but what matmuls and
        attention gave, which on a CPU is faster than storing and fetching the rest; `cudnn` attends again), `full`
        (all but the input of each layer), `groups` (all but the input of every fourth layer, at the price of about one
        more forward pass), or `auto`: `dots` where that keeps at most 1 GiB of a row, else `full`.
    attn_implementation: `xla`, blocks of queries in plain XLA; `xla_loop`, which holds less and compiles sooner where
        rows are long, for up to twice the work of attention; `xla_tiles`, which computes only tiles that are not
        masked; `splash`, a kernel of TPUs; `cudnn`, one of NVIDIA GPUs; or `auto`, the kernel of the devices where it
        can do what the model asks, else `xla_loop`, and on a CPU `xla_tiles`, or `xla` in rows of up to 128 tokens.
    """

    model_name_or_path: str = ""
    sft_model_path: str = ""
    tokenizer_name_or_path: str = ""
    revision: str = ""
    family: str = one_of("llama")
    vocab_size: int = at_least(0, 0)
    hidden_size: int = at_least(256, 1)
    intermediate_size: int = at_least(688, 1)
    num_hidden_layers: int = at_least(4, 1)
    num_attention_heads: int = at_least(8, 1)
    num_key_value_heads: int = at_least(4, 1)
    head_dim: int = at_least(32, 2)
    max_position_embeddings: int = at_least(2048, 1)
    rms_norm_eps: float = above(1e-5, 0)
    rope_theta: float = above(10000.0, 0)
    tie_word_embeddings: bool = True
    initializer_range: float = above(0.02, 0)
    dtype: str = one_of("float32", "bfloat16")
    param_dtype: str = one_of("float32", "bfloat16")
    logits_dtype: str = one_of("float32", "bfloat16")
    remat: str = one_of("auto", "none", "full", "dots", "groups")
    attn_implementation: str = one_of("auto", "xla", "xla_tiles", "xla_loop", "splash", "cudnn")
