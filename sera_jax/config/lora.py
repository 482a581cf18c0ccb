"""Low-rank adapters."""

from __future__ import annotations

import dataclasses

from sera_jax.config.fields import at_least


@dataclasses.dataclass(frozen=True)
class LoraGroup:
    """Low-rank adapters, trained in place of the model's parameters by all but `pretrain`. The base is frozen, held
    once, and may be kept in model.param_dtype="bfloat16"; adapters and their optimiser state are float32.

    rank: r; 0: none, all parameters are trained. alpha: the adapters' product is multiplied by alpha / rank, or with
        use_rslora by alpha / sqrt(rank).
    target_modules: what is adapted, by PEFT's names: `all-linear` (every linear layer but the output projection), names
        such as `q_proj` or `self_attn.q_proj`, or, as one entry, a regular expression of whole names such as
        `model.layers.0.mlp.up_proj` (which takes all layers or none).
    dropout: share of an adapter's inputs that is dropped in the updates of SFT, direct alignment and reward models.
        PPO, whose ratios compare one function with itself, has none.
    """

    rank: int = at_least(0, 0)
    alpha: float = at_least(32.0, 0)
    target_modules: tuple[str, ...] = ("all-linear",)
    use_rslora: bool = False
    dropout: float = at_least(0.0, 0)
