"""From a ConfigDict to a Config: types, choices, ranges, and rules that join fields. Errors name the way out."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections import config_dict

from sera_jax.config.fields import CHOICES, RANGE
from sera_jax.config.groups import Config
from sera_jax.config.rules import check_together

MAX_INT = 2**31 - 1  # devices count steps, positions and rows in 32 bits
_hints = functools.cache(typing.get_type_hints)  # asked for every field of every config
UNSET = ("None", "unset")  # words for an optional field's value on the command line


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields of `config`; unset optional fields are typed placeholders."""

    def convert(group: Any) -> ml_collections.ConfigDict:
        out = ml_collections.ConfigDict()
        hints = _hints(type(group))
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


def parse_fields(raw: ml_collections.ConfigDict) -> Config:
    """The frozen Config of a ConfigDict.

    Raises:
        ValueError: for an unknown or missing field, a wrong type, a value out of range, or fields that contradict each
            other whatever the method; the message names the field, the value and the choices.
    """
    config = _parse_group(Config, raw, "")
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
            elsewhere = [f for f in _leaves(Config) if path.endswith(part) and f.endswith(f".{part}")]
            near = elsewhere or [prefix + name for name in difflib.get_close_matches(part, names, n=1)]
            hint = f"did you mean {' or '.join(near)}?" if near else f"fields here: {', '.join(names)}"
            raise ValueError(f"config.{prefix}{part} is not a field; {hint}")
        kind, prefix = _hints(kind)[part], f"{prefix}{part}."


def last_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What the command line says of each field last, since a list of values would add up.

    Returns:
        The arguments without earlier values of a field and without `--config.FIELD=None` of optional fields; and those
        fields, which are to be unset.

    Raises:
        ValueError: an argument names no field.
    """
    last: dict[str, int] = {}
    for place, argument in enumerate(arguments):
        if argument.startswith("--config."):
            field = argument.removeprefix("--config.").split("=")[0]
            check_field(field)
            last[field] = place
    kept, unset = [], []
    for place, argument in enumerate(arguments):
        field, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            kept.append(argument)
        elif place == last[field]:
            if value in UNSET and isinstance(_leaves(Config).get(field), types.UnionType):
                unset.append(field)
            else:
                kept.append(argument)
    return kept, unset


def _leaves(kind: Any, prefix: str = "") -> dict[str, Any]:
    """path -> type of every field that is no group."""
    leaves: dict[str, Any] = {}
    for name, hint in _hints(kind).items():
        leaves |= _leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return leaves


def _parse_group(cls: type, raw: ml_collections.ConfigDict, prefix: str) -> Any:
    hints = _hints(cls)
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
    for field in dataclasses.fields(cls):
        _check_value(f"{prefix}{field.name}", values[field.name], field.metadata)
    return cls(**values)


def _check_value(name: str, value: Any, allowed: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that its field's choices or range do not hold."""
    if CHOICES in allowed and value not in allowed[CHOICES]:
        choices = ", ".join(map(repr, allowed[CHOICES]))
        raise ValueError(f"config.{name}={value!r} is not a choice; choose one of {choices}")
    if RANGE in allowed and value is not None:
        low, high, closed = allowed[RANGE]
        if not (low <= value <= high) or (value == low and not closed):
            sign = "<=" if closed else "<"
            raise ValueError(f"config.{name}={value!r} is out of range; it must be {low} {sign} {name} <= {high}")
    if type(value) is int and abs(value) > MAX_INT:
        raise ValueError(f"config.{name}={value} is more than devices count to; it must be at most {MAX_INT}")


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
