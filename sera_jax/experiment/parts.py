"""What a config's trainings move: adapters, or parameters that patterns name."""

from __future__ import annotations

import dataclasses

import jax

from sera_jax.config import Config
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params
from sera_jax.models.lora import Lora
from sera_jax.models.parts import paths, split_layers
from sera_jax.models.peft import kernels_of

TRAININGS = ("pretrain", "sft", "train", "reward_model")


def with_adapters(config: Config, cfg: ModelConfig) -> tuple[ModelConfig, Lora | None]:
    """The model, with the scale of the run's adapters, and the adapters; None where its rank is 0.

    Raises:
        ValueError: a target that the model does not have; a pattern of `trainable` that matches no parameter.
    """
    _check_patterns(config, cfg)
    asked = config.lora
    if not asked.rank:
        return cfg, None
    kernels = kernels_of(cfg, asked.target_modules, "config.lora.target_modules")
    lora = Lora(asked.rank, asked.alpha, kernels, asked.use_rslora, asked.dropout)
    return dataclasses.replace(cfg, lora_scale=lora.scale, lora_dropout=lora.dropout), lora


def _check_patterns(config: Config, cfg: ModelConfig) -> None:
    model = abstract_params(cfg)
    for group in TRAININGS:
        for pattern in getattr(config, group).trainable:
            try:
                found, _ = jax.eval_shape(lambda params, pattern=pattern: split_layers(params, pattern), model)
            except ValueError as error:
                raise ValueError(f"config.{group}.trainable={pattern!r}: {error}") from error
            if not found:
                raise ValueError(
                    f"config.{group}.trainable={pattern!r} matches no parameter; the parameters are "
                    f"{', '.join(paths(model))}, and those of a layer, as layers/0/q/kernel"
                )
