"""config.json <-> ModelConfig, by the table of families.

Whatever a config.json says that the decoder does not compute is refused by name:

* a field of `Family.fields`, `layerwise` or `rope` becomes a field of ModelConfig;
* a field of `required_values` is accepted with the listed values only;
* a field of `IGNORED`, or one that begins with an underscore, does not touch the logits and is passed over;
* any other field is accepted while it is switched off (null, false, empty) and refused otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from sera_jax.models.config import DTYPES, UNMATHEMATICAL, ModelConfig, RopeScaling
from sera_jax.models.family import AS_ABSENT, IGNORED, REQUIRED, REQUIRED_VALUES, Family, Field
from sera_jax.models.family_table import FAMILIES

ROPE_FIELDS = ("rope_scaling", "rope_parameters")
_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor")
# What a scaling of each type must say, and what it may.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor",),
        (*_YARN, "mscale", "mscale_all_dim"),
    ),
}
_KINDS = {"original_max_position_embeddings": int, "truncate": bool}


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
        read |= dict.fromkeys(field.ours, _read_field(field, config, read))
    for name, value in family.switches.items():
        read[name] = value(read) if isinstance(value, Callable) else value
    _refuse_other_mathematics(family, config, read)
    if family.layerwise is not None:
        read |= _alike_unless_said(family.layerwise.read(config, read))
    read |= _read_rope(family, config, read)
    export_dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if export_dtype in DTYPES:
        precision.setdefault("export_dtype", export_dtype)
    return ModelConfig(family=family.name, **read, **precision)


def config_to_hf(cfg: ModelConfig, *, dtype: str | None = None) -> dict[str, Any]:
    """A config.json, as a dict, that transformers 4 and 5 both read as this model.

    Args:
        dtype: dtype of the weights beside it; default `cfg.export_dtype`.
    """
    family = family_of(cfg.family)
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **{field.name: _written(field, cfg) for field in family.fields},
        **(family.layerwise.write(cfg) if family.layerwise else {}),
        **_write_rope(family, cfg),
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype or cfg.export_dtype,
    }


def mathematics(cfg: ModelConfig) -> dict[str, Any]:
    """The fields of a ModelConfig that decide the logits; precision, remat and back ends left out."""
    return {
        field.name: getattr(cfg, field.name)
        for field in dataclasses.fields(cfg)
        if field.name not in (*UNMATHEMATICAL, "initializer_range")
    }


def _read_field(field: Field, config: Mapping[str, Any], read: Mapping[str, Any]) -> Any:
    value = config.get(field.name)
    if value is None:
        if field.name in config and field.null is not AS_ABSENT:
            return field.null
        if field.default is REQUIRED:
            raise ValueError(f"config.json has no {field.name}; add it")
        value = field.default(read) if isinstance(field.default, Callable) else field.default
        if value is None:
            return None
    value = _typed(field.name, value, field.kind)
    if field.values and value not in field.values:
        raise ValueError(
            f"config.json: {field.name}={value!r} is not supported; supported: "
            + ", ".join(repr(name) for name in field.values)
        )
    return field.values[value] if field.values else value


def _written(field: Field, cfg: ModelConfig) -> Any:
    value = getattr(cfg, field.ours[0])
    return next(name for name, ours in field.values.items() if ours == value) if field.values else value


def _alike_unless_said(found: dict[str, Any]) -> dict[str, Any]:
    """One way to say that all layers are alike: no list."""
    types, window = found.get("layer_types"), found["sliding_window"]
    if types and set(types) == {"full_attention"}:
        types, window = (), None
    elif types and set(types) == {"sliding_attention"} and window is not None:
        types = ()
    turned = found.get("no_rope_layers", ())
    return {
        "sliding_window": None if window is None else _typed("sliding_window", window, int),
        "layer_types": types or (),
        "no_rope_layers": () if all(turned) else turned,
    }


def _typed(name: str, value: Any, kind: type) -> Any:
    good = isinstance(value, (int, float) if kind is float else kind)
    if not good or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config.json: {name}={value!r} should be of type {kind.__name__}")
    return kind(value)


def _refuse_other_mathematics(family: Family, config: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    problems = []
    rope, layerwise = family.rope, family.layerwise.fields if family.layerwise else {"sliding_window"}
    known = {field.name for field in family.fields} | {*ROPE_FIELDS, rope.theta, rope.partial, rope.local_theta}
    known |= IGNORED | family.ignored | layerwise
    required = {name: values for name, values in REQUIRED_VALUES.items() if name not in known}
    required |= family.required_values
    for name, value in config.items():
        if name in required:
            allowed = required[name]
            if not any(type(value) is type(good) and value == good for good in allowed) and not _same_number(
                value, allowed
            ):
                shown = " or ".join(repr(good) for good in allowed)
                problems.append(f"{name}={value!r} would change the mathematics (supported: {shown})")
        elif name not in known and not name.startswith("_") and not _switched_off(value):
            problems.append(
                f"{name}={value!r} is unknown (if it cannot change the logits, take it out of config.json "
                "or add it to family.IGNORED)"
            )
    window, longest = config.get("sliding_window"), read["max_position_embeddings"]
    if not family.layerwise and window is not None and not (isinstance(window, int) and window >= longest):
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


def _read_rope(family: Family, config: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig about rotary embeddings, from `rope_theta` and `rope_scaling` (transformers 4) or
    `rope_parameters` (5)."""
    rope, name = family.rope, "rope_parameters"
    block, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if block is None:
        block, name = scaling, "rope_scaling"
    elif scaling is not None and scaling != block:
        raise ValueError(f"config.json: rope_scaling={scaling!r} contradicts rope_parameters={block!r}; keep one")
    block = {} if block is None else block
    if not isinstance(block, Mapping):
        raise ValueError(f"config.json: {name}={block!r} should be an object or null")

    found: dict[str, Any] = {}
    if rope.local_theta:
        block, local = _by_kind(block, name)
        of_local = _only(
            rope.local_theta, config.get(rope.local_theta), f"{name}.sliding_attention", local, "rope_theta"
        )
        found["rope_local_base_freq"] = rope.default_local_theta if of_local is None else of_local
        if other := [key for key in local if key not in ("rope_theta", "rope_type", "type")]:
            raise ValueError(
                f"config.json: {name}.sliding_attention.{other[0]} would change the mathematics; take it out"
            )
        if not {local.get("rope_type"), local.get("type")} <= {None, "default"}:
            raise ValueError(
                f"config.json: {name}.sliding_attention={dict(local)!r} is not supported; supported: 'default'"
            )
    theta = _only(rope.theta, config.get(rope.theta), name, block, "rope_theta")
    found["rope_theta"] = rope.default_theta if theta is None else theta
    if rope.partial:
        share = _only(rope.partial, config.get(rope.partial), name, block, "partial_rotary_factor")
        found["partial_rotary_factor"] = rope.default_partial if share is None else share
    elif block.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"config.json: {name}.partial_rotary_factor={block['partial_rotary_factor']!r} would change the "
            "mathematics (supported: 1.0)"
        )
    found["rope_scaling"] = _read_scaling(family, block, name, read["max_position_embeddings"])
    return found


def _by_kind(block: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What is said of layers with full attention, and of those with a window."""
    kinds = ("full_attention", "sliding_attention")
    if not set(kinds) & set(block):
        return block, {}
    if unknown := [key for key in block if key not in kinds]:
        raise ValueError(f"config.json: {name}.{unknown[0]} is not read beside {', '.join(kinds)}; take it out")
    full, sliding = (block.get(kind) or {} for kind in kinds)
    return full, sliding


def _only(outside: str, value: Any, name: str, block: Mapping[str, Any], inside: str) -> float | None:
    """The number that stands beside the block or in it; None: in neither."""
    found = [x for x in (block.get(inside), value) if x is not None]
    if len(set(found)) > 1:
        raise ValueError(f"config.json: {outside}={found[1]!r} contradicts {name}.{inside}={found[0]!r}; keep one")
    return _typed(outside, found[0], float) if found else None


def _read_scaling(family: Family, block: Mapping[str, Any], name: str, longest: int) -> RopeScaling | None:
    types = {block[key] for key in ("rope_type", "type") if block.get(key) is not None} or {"default"}
    if len(types) > 1 or not types <= set(family.rope.types):
        shown = " and ".join(repr(kind) for kind in sorted(types, key=str))
        supported = ", ".join(map(repr, family.rope.types))
        raise ValueError(f"config.json: {name} of type {shown} is not supported; supported: {supported}")
    kind = types.pop()
    needed, optional = SCALINGS[kind]
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *needed, *optional}
    unknown = [f"{name}.{key}={value!r}" for key, value in block.items() if key not in known and value is not None]
    if unknown:
        raise ValueError(f"config.json: {', '.join(unknown)} is not read by rope type {kind!r}; take it out")
    missing = [key for key in needed if block.get(key) is None]
    if missing:
        raise ValueError(f"config.json: {name} of type {kind!r} has no {', '.join(missing)}; add it")
    if kind == "default":
        return None
    said = {
        key: _typed(f"{name}.{key}", block[key], _KINDS.get(key, float))
        for key in (*needed, *optional)
        if block.get(key) is not None
    }
    multiplied = {key: said.pop(key) for key in ("mscale", "mscale_all_dim") if key in said}
    if kind == "yarn":
        said.setdefault("original_max_position_embeddings", longest)
        said.setdefault("attention_factor", _yarn_attention(said["factor"], multiplied))
    if kind == "dynamic":
        said.pop("original_max_position_embeddings", None)
    return RopeScaling(rope_type=kind, **said)


def _yarn_attention(factor: float, multiplied: Mapping[str, float]) -> float:
    """By which YaRN multiplies cos and sin where a config does not say it (section 3.4 of its paper)."""

    def of(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    if all(multiplied.get(key) for key in ("mscale", "mscale_all_dim")):
        return of(multiplied["mscale"]) / of(multiplied["mscale_all_dim"])
    return of(1.0)


def _write_rope(family: Family, cfg: ModelConfig) -> dict[str, Any]:
    rope, scaling = family.rope, None
    if cfg.rope_scaling is not None:
        kind = cfg.rope_scaling.rope_type
        names = (*SCALINGS[kind][0], *(_YARN if kind == "yarn" else ()))
        scaling = {"rope_type": kind, **{name: getattr(cfg.rope_scaling, name) for name in names}}
    return {
        rope.theta: cfg.rope_theta,
        **({rope.partial: cfg.partial_rotary_factor} if rope.partial else {}),
        **({rope.local_theta: cfg.rope_local_base_freq} if rope.local_theta else {}),
        "rope_scaling": scaling,
    }
