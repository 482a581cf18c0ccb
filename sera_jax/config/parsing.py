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

ARMS = ("sera", "daa", "random", "selection_only", "bootstrap_only")
CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.logits_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots"),
    "model.attn_implementation": ("xla",),
    "data.truncation_mode": ("keep_end", "keep_start", "drop"),
    "sera.selection": ("top", "bottom", "middle", "threshold", "random", "none"),
    "sera.curriculum": ("none", "easy_to_hard", "hard_to_easy"),
    "sera.pairing": ("best_worst", "all"),
    "sera.reference": ("fixed", "previous"),
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
    **{
        f"{group}.{field}": bounds
        for group in ("pretrain", "sft", "train")
        for field, bounds in {
            "batch_size": (1, math.inf, True),
            "gradient_accumulation_steps": (1, math.inf, True),
            "num_train_epochs": (1, math.inf, True),
            "max_steps": (0, math.inf, True),
            "learning_rate": (0, math.inf, False),
            "warmup_ratio": (0, 1, True),
            "weight_decay": (0, math.inf, True),
            "adam_beta1": (0, 1, True),
            "adam_beta2": (0, 1, True),
            "adam_epsilon": (0, 1, False),
            "max_grad_norm": (0, math.inf, False),
            "logits_chunk_tokens": (1, math.inf, True),
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
    _check_together(config)
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


def _check_together(config: Config) -> None:
    """The rules that join fields."""
    if not config.workdir:
        raise ValueError(
            "config.workdir is empty; give a folder for checkpoints and results: --config.workdir=runs/NAME"
        )
    unknown = [arm for arm in config.sera.arms if arm not in ARMS]
    if unknown or not config.sera.arms or len(set(config.sera.arms)) != len(config.sera.arms):
        raise ValueError(
            f"config.sera.arms={config.sera.arms!r}; give each of {', '.join(ARMS)} at most once, and one at least"
        )
    if not config.world.name and not config.data.train:
        raise ValueError("config.data.train is empty; name preference rows: --config.data.train=pairs.jsonl")
    if config.world.name and config.data.train:
        raise ValueError(
            f"config.data.train={config.data.train!r} and config.world.name={config.world.name!r} are both set; "
            "the embedded world writes its own rows: empty one of them"
        )
    band = config.sera.band
    if band is not None and not 0 <= band[0] < band[1] <= 1:
        raise ValueError(f"config.sera.band={band!r}; it must be two quantiles 0 <= low < high <= 1")
    if config.sera.selection == "threshold" and config.sera.threshold is None:
        raise ValueError("config.sera.selection='threshold' needs config.sera.threshold (nats)")
    for field, rule in (("threshold", "threshold"), ("band", "middle")):
        value = getattr(config.sera, field)
        if value is not None and config.sera.selection != rule:
            raise ValueError(
                f"config.sera.{field}={value} is read by selection={rule!r} only, "
                f"but selection={config.sera.selection!r}; change one of them"
            )
    sampling = config.sampling
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise ValueError(
            f"config.sampling.min_new_tokens={sampling.min_new_tokens} exceeds max_new_tokens={sampling.max_new_tokens}"
        )
    if config.data.max_prompt_length >= config.data.row_tokens:
        raise ValueError(
            f"config.data.max_prompt_length={config.data.max_prompt_length} leaves no room for a response in rows of "
            f"config.data.row_tokens={config.data.row_tokens}; raise row_tokens or lower max_prompt_length"
        )
    sera, data = config.sera, config.data
    if sera.rounds > 1 and sera.bootstrap_fraction > 0 and set(sera.arms) - {"daa", "selection_only"}:
        prompts = 1 if data.share_prompt else 2
        longest = prompts * data.max_prompt_length + 2 * sampling.max_new_tokens
        if longest > data.row_tokens:
            raise ValueError(
                f"config.sampling.max_new_tokens={sampling.max_new_tokens}: a sampled pair may have {longest} tokens "
                f"(config.data.max_prompt_length={data.max_prompt_length}), but config.data.row_tokens="
                f"{data.row_tokens}; raise row_tokens, or lower one of the others"
            )


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
