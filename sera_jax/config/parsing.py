"""From a ConfigDict to a Config: types, choices, ranges, and rules that join fields. Errors name the way out."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from sera_jax.config.groups import Config
from sera_jax.config.rules import check_together

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("sera", "srppo"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.logits_dtype": ("float32", "bfloat16"),
    "model.remat": ("auto", "none", "full", "dots"),
    "model.attn_implementation": ("xla",),
    "data.truncation_mode": ("keep_end", "keep_start", "drop"),
    "sera.selection": ("top", "bottom", "middle", "threshold", "random", "none"),
    "sera.curriculum": ("none", "easy_to_hard", "hard_to_easy"),
    "sera.pairing": ("best_worst", "all"),
    "sera.reference": ("fixed", "previous"),
    "reward.placement": ("eos", "token"),
    "reward.missing_eos": ("penalty", "subtract", "keep"),
    "ppo.kl_estimator": ("k1", "k2", "k3"),
    "ppo.kl_in": ("reward", "loss"),
    "ppo.kl_controller": ("fixed", "adaptive"),
    "ppo.critic": ("model", "head"),
    "world.name": ("", "habits"),
    **{f"{g}.optim": ("adamw", "adafactor", "lion") for g in ("pretrain", "sft", "train")},
    **{f"{g}.lr_scheduler_type": ("linear", "cosine", "constant") for g in ("pretrain", "sft", "train")},
}
# field -> (lowest, highest, lowest itself allowed)
RANGES: dict[str, tuple[float, float, bool]] = {
    "seed": (0, 2**31 - 1, True),
    "data.eval_fraction": (0, 0.9, True),
    "data.max_prompt_length": (1, math.inf, True),
    "data.max_completion_length": (1, math.inf, True),
    "data.row_tokens": (2, math.inf, True),
    "data.max_row_shapes": (1, math.inf, True),
    "data.max_bad_fraction": (0, 1, True),
    "data.label_noise": (0, 1, True),
    "loss.beta": (0, math.inf, False),
    "loss.tau": (0, math.inf, False),
    "loss.delta": (0, math.inf, False),
    "loss.gamma_beta_ratio": (0, math.inf, True),
    "loss.label_smoothing": (0, 0.5, True),
    "loss.nll_coef": (0, math.inf, True),
    "sera.rounds": (1, math.inf, True),
    "sera.keep_fraction": (0, 1, True),
    "sera.bootstrap_fraction": (0, math.inf, True),
    "sera.bootstrap_prompts": (0, math.inf, True),
    "sera.num_samples": (2, math.inf, True),
    "sera.ensemble_gamma": (0, 1, True),
    "reward.missing_eos_penalty": (0, math.inf, True),
    "reward.clip": (0, math.inf, False),
    "ppo.iterations": (1, math.inf, True),
    "ppo.eval_iterations": (0, math.inf, True),
    "ppo.num_samples": (1, math.inf, True),
    "ppo.num_ppo_epochs": (1, math.inf, True),
    "ppo.num_mini_batches": (1, math.inf, True),
    "ppo.prompt_overlap": (0, 1, True),
    "ppo.gamma": (0, 1, True),
    "ppo.lam": (0, 1, True),
    "ppo.cliprange": (0, 1, False),
    "ppo.cliprange_value": (0, math.inf, False),
    "ppo.entropy_coef": (0, math.inf, True),
    "ppo.kl_coef": (0, math.inf, True),
    "ppo.kl_target": (0, math.inf, False),
    "ppo.kl_horizon": (1, math.inf, True),
    "ppo.vf_coef": (0, math.inf, False),
    "ppo.critic_learning_rate": (0, math.inf, False),
    "ppo.critic_warmup_iterations": (0, math.inf, True),
    "ppo.target_kl": (0, math.inf, False),
    "ppo.ratio_limit": (1, math.inf, False),
    "ppo.max_kl": (0, math.inf, False),
    "ppo.max_decode_score_gap": (0, math.inf, False),
    "ppo.sft_longer_factor": (2, math.inf, True),
    "ppo.best_of": (2, math.inf, True),
    "sampling.temperature": (0, math.inf, True),
    "sampling.top_p": (0, 1, False),
    "sampling.top_k": (0, math.inf, True),
    "sampling.max_new_tokens": (1, math.inf, True),
    "sampling.min_new_tokens": (0, math.inf, True),
    "sampling.slots": (1, math.inf, True),
    "eval.max_pairs": (0, math.inf, True),
    "eval.num_prompts": (0, math.inf, True),
    "eval.temperature": (0, math.inf, True),
    "eval.max_new_tokens": (0, math.inf, True),
    "eval.num_generations": (0, math.inf, True),
    "log.logging_steps": (1, math.inf, True),
    "log.rollout_iterations": (0, math.inf, True),
    **{
        f"{group}.{field}": bounds
        for group in ("pretrain", "sft", "train")
        for field, bounds in {
            "batch_size": (1, math.inf, True),
            "gradient_accumulation_steps": (0, math.inf, True),
            "num_train_epochs": (1, math.inf, True),
            "max_steps": (0, math.inf, True),
            "learning_rate": (0, math.inf, False),
            "warmup_ratio": (0, 1, True),
            "weight_decay": (0, math.inf, True),
            "adam_beta1": (0, 1, True),
            "adam_beta2": (0, 1, True),
            "adam_epsilon": (0, 1, False),
            "max_grad_norm": (0, math.inf, False),
            "logits_chunk_tokens": (0, math.inf, True),
            "save_steps": (0, math.inf, True),
            "save_total_limit": (1, math.inf, True),
        }.items()
    },
}


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields of `config`; unset optional fields are typed placeholders."""

    def convert(group: Any) -> ml_collections.ConfigDict:
        out = ml_collections.ConfigDict()
        hints = typing.get_type_hints(type(group))
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if dataclasses.is_dataclass(value):
                value = convert(value)
            elif value is None:
                kind = _plain_type(hints[field.name])
                value = config_dict.placeholder(typing.get_origin(kind) or kind)
            out[field.name] = value
        return out

    return convert(config).lock()


def parse(raw: ml_collections.ConfigDict) -> Config:
    """The frozen Config of a ConfigDict.

    Raises:
        ValueError: for an unknown or missing field, a wrong type, a value out of range, or fields that contradict each
            other; the message names the field, the value and the choices.
    """
    config = _parse_group(Config, raw, "")
    for name, choices in CHOICES.items():
        value = _get(config, name)
        if value not in choices:
            raise ValueError(f"config.{name}={value!r} is not a choice; choose one of {', '.join(map(repr, choices))}")
    for name, (low, high, closed) in RANGES.items():
        value = _get(config, name)
        if value is None:
            continue
        if not (low <= value <= high) or (value == low and not closed):
            sign = "<=" if closed else "<"
            raise ValueError(f"config.{name}={value!r} is out of range; it must be {low} {sign} {name} <= {high}")
    check_together(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, for JSON."""
    return dataclasses.asdict(config)


def check_field(path: str) -> None:
    """Raise ValueError, with the nearest name, where `path` (such as `train.batch_size`) is not a field or a group."""
    kind: Any = Config
    prefix = ""
    for part in path.split("."):
        if not dataclasses.is_dataclass(kind):
            raise ValueError(f"config.{path} is not a field; config.{prefix[:-1]} has no parts")
        names = [field.name for field in dataclasses.fields(kind)]
        if part not in names:
            near = difflib.get_close_matches(part, names, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"fields here: {', '.join(names)}"
            raise ValueError(f"config.{prefix}{part} is not a field; {hint}")
        kind, prefix = typing.get_type_hints(kind)[part], f"{prefix}{part}."


def _parse_group(cls: type, raw: ml_collections.ConfigDict, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in raw:
        check_field(f"{prefix}{key}")
    values = {}
    for name in names:
        if name not in raw:
            raise ValueError(f"config.{prefix}{name} is missing; start from configs/base.py, which has every field")
        kind = hints[name]
        value = raw[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, ml_collections.ConfigDict):
                raise ValueError(f"config.{prefix}{name}={value!r} must be a group of fields")
            values[name] = _parse_group(kind, value, f"{prefix}{name}.")
        else:
            values[name] = _parse_value(kind, value, prefix + name)
    return cls(**values)


def _parse_value(kind: Any, value: Any, name: str) -> Any:
    plain = _plain_type(kind)
    if value is None and isinstance(kind, types.UnionType):
        return None
    if typing.get_origin(plain) is tuple:
        parts = typing.get_args(plain)
        if isinstance(value, str):
            value = (value,)
        if not isinstance(value, tuple | list):
            raise ValueError(f"config.{name}={value!r} must be a tuple")
        if parts[0] is str:  # --config.sera.arms=daa,sera arrives as one string, or as a tuple that holds it
            value = tuple(part.strip() for text in value for part in str(text).split(",") if part.strip())
        if parts[-1] is not Ellipsis and len(value) != len(parts):
            raise ValueError(f"config.{name}={value!r} must hold {len(parts)} values")
        return tuple(_parse_value(parts[0], part, name) for part in value)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not plain:
        raise ValueError(f"config.{name}={value!r} is a {type(value).__name__}; it must be a {plain.__name__}")
    if plain is float and not math.isfinite(value):
        raise ValueError(f"config.{name}={value!r} is not a finite number")
    return value


def _plain_type(kind: Any) -> Any:
    """float of `float | None`; the type itself otherwise."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _get(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value
