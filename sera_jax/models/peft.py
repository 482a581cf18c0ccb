"""PEFT's names and folders: which kernels its `target_modules` mean, and adapters as it writes and reads them.

Where several of our kernels are one module of PEFT's (Phi-3's qkv_proj), each with an adapter of rank r of its own, the
module's adapter is made of theirs, one beside the other: n kernels give rank n r, which `rank_pattern` and
`alpha_pattern` say. One that PEFT made for such a module, of rank r, has one A for all of them.
"""

from __future__ import annotations

import functools
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params
from sera_jax.models.families import family_of
from sera_jax.models.folder import (
    ADAPTER,
    ADAPTER_CONFIG,
    open_weights,
    read_object,
    some,
    whole_or_nothing,
    write_json,
)
from sera_jax.models.huggingface import copy_tokenizer
from sera_jax.models.lora import KERNEL, A, B, Lora
from sera_jax.models.parts import Tree, nested, paths

ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model."
MERGE = "merge the adapter with PEFT (merge_and_unload, save_pretrained) and give that folder"
# Fields of adapter_config.json that change what an adapter computes, with the values under which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
}


@functools.lru_cache(maxsize=4)
def _shapes(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter by its path. Kept, since tracing a model takes long and each kernel of each layer asks."""
    return paths(abstract_params(cfg))


def modules(cfg: ModelConfig) -> dict[str, str]:
    """Path of every kernel of the layers -> PEFT's name of the module, with `{layer}` in it."""
    there = _shapes(cfg)
    return {
        tensor.path: tensor.name.removesuffix(".weight")
        for tensor in family_of(cfg.family).tensors
        if tensor.path in there and tensor.stacked and tensor.path.endswith(f"/{KERNEL}")
    }


def kernels_of(cfg: ModelConfig, targets: Sequence[str], field: str = "target_modules") -> tuple[str, ...]:
    """The paths of the kernels that `target_modules` names, as PEFT matches them: `all-linear`, the end of a module's
    name, or a regular expression of the whole name.

    Raises:
        ValueError: an entry names no module, or not that of every layer; the message lists the names.
    """
    names, chosen = modules(cfg), []
    for target in targets:
        found = []
        for path, name in names.items():
            hits = [_is_meant(target, name.format(layer=layer)) for layer in range(cfg.num_hidden_layers)]
            if any(hits) and not all(hits):
                raise ValueError(
                    f"{field}={target!r} names {name} in some layers only; adapters lie in all: name it in every layer"
                )
            found += [path] if all(hits) else []
        if not found:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names.values()))
            raise ValueError(f"{field}={target!r} names no linear layer; give {ALL_LINEAR!r} or some of {known}")
        chosen += found
    return tuple(path for path in names if path in chosen)


def _is_meant(target: str, name: str) -> bool:
    if target == ALL_LINEAR or name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error:
        return False


def save_adapter(
    path: str | os.PathLike,
    cfg: ModelConfig,
    lora: Lora,
    adapters: Tree,
    *,
    base: str,
    dtype: str = "float32",
    tokenizer: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Write a folder that PEFT loads; it appears whole or not at all.

    Args:
        adapters: arrays that this process can read whole.
        base: what PEFT is to load the base model from: a folder or a hub id.
        tokenizer: a folder whose tokenizer files are copied.

    Raises:
        FileExistsError: the folder exists and is not empty.
    """
    leaves = paths(jax.device_get(adapters))
    tensors: dict[str, np.ndarray] = {}
    for name, kernels in _adapted(cfg, lora).items():
        for layer in range(cfg.num_hidden_layers):
            for theirs, value in _as_one(cfg, {k: _pair(leaves, k, layer) for k in kernels}).items():
                tensors[_tensor(name, layer, theirs)] = np.ascontiguousarray(value.astype(dtype))
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": list(target_modules(cfg, lora.kernels)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **_patterns(cfg, lora),
    }
    with whole_or_nothing(pathlib.Path(path), overwrite=False) as partial:
        save_file(tensors, partial / ADAPTER, metadata={"format": "pt"})
        write_json(partial / ADAPTER_CONFIG, written)
        if tokenizer is not None:
            copy_tokenizer(pathlib.Path(tokenizer), partial)
    return pathlib.Path(path)


def load_adapter(path: str | os.PathLike, cfg: ModelConfig) -> tuple[Lora, Tree]:
    """The adapters of a PEFT folder for a model of `cfg`, on the host in float32; and what they are.

    Raises:
        ValueError: a setting that would change what they compute, a tensor that is missing or unexpected or of another
            shape, a kernel that is adapted in some layers only, or one that holds nan or infinity.
    """
    folder = pathlib.Path(path)
    config = read_adapter_config(folder)
    names, depth = modules(cfg), range(cfg.num_hidden_layers)
    with open_weights(folder) as files:
        there = {
            name
            for name in names.values()
            if _tensor(name, 0, "lora_A") in files or _tensor(name, 0, "lora_B") in files
        }
        wanted = {_tensor(name, layer, part) for name in there for layer in depth for part in ("lora_A", "lora_B")}
        if bad := sorted(wanted ^ set(files)):
            raise ValueError(f"{folder / ADAPTER} does not fit the model: missing or unexpected tensors: {some(bad)}")
        tensors = {name: files[name].get_tensor(name).astype(np.float32) for name in wanted}
    kernels = tuple(kernel for kernel, name in names.items() if name in there)
    lora = Lora(int(config["r"]), float(config["lora_alpha"]), kernels, bool(config.get("use_rslora")))
    patterns = {name: config[name] for name in ("rank_pattern", "alpha_pattern") if config.get(name)}
    side_by_side = bool(patterns)
    if side_by_side and patterns != _patterns(cfg, lora):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: {patterns} is not supported; {MERGE}")
    leaves: dict[str, list[np.ndarray]] = {}
    for name, together in _adapted(cfg, lora).items():
        rank = lora.rank * (len(together) if side_by_side else 1)
        for layer in depth:
            a, b = (tensors[_tensor(name, layer, part)] for part in ("lora_A", "lora_B"))
            _check_shapes(cfg, folder, name, a, b, rank)
            for kernel, (own_a, own_b) in _apart(cfg, together, a, b, lora.rank if side_by_side else 0).items():
                for leaf, value in ((A, own_a), (B, own_b)):
                    leaves.setdefault(kernel.removesuffix(KERNEL) + leaf, []).append(value)
    return lora, nested({leaf: np.stack(values) for leaf, values in leaves.items()})


def _tensor(name: str, layer: int, part: str) -> str:
    return f"{_PREFIX}{name}.{part}.weight".format(layer=layer)


def _adapted(cfg: ModelConfig, lora: Lora) -> dict[str, list[str]]:
    """Every module that is adapted -> its kernels that are."""
    found: dict[str, list[str]] = {}
    for kernel, name in modules(cfg).items():
        if kernel in lora.kernels:
            found.setdefault(name, []).append(kernel)
    return found


def _rows(cfg: ModelConfig, kernel: str) -> np.ndarray:
    """Which rows of its module's weight [out, in] a kernel is."""
    of_part = family_of(cfg.family).paths[kernel].rows
    return np.arange(_shapes(cfg)[kernel].shape[2]) if of_part is None else of_part(cfg)


def _pair(leaves: Mapping[str, np.ndarray], kernel: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """lora_a [in, r] and lora_b [r, out] of a kernel in a layer."""
    beside = kernel.removesuffix(KERNEL)
    return leaves[beside + A][layer], leaves[beside + B][layer]


def _as_one(cfg: ModelConfig, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """lora_A [n r, in] and lora_B [out, n r] of a module, of the adapters of n of its kernels."""
    rank, name = next(iter(pairs.values()))[1].shape[0], modules(cfg)[next(iter(pairs))]
    out = sum(len(_rows(cfg, kernel)) for kernel, of in modules(cfg).items() if of == name)
    b = np.zeros((out, len(pairs) * rank), np.float32)
    for place, (kernel, (_, own)) in enumerate(pairs.items()):
        b[_rows(cfg, kernel), place * rank : (place + 1) * rank] = own.T
    return {"lora_A": np.concatenate([own.T for own, _ in pairs.values()]), "lora_B": b}


def _apart(
    cfg: ModelConfig, kernels: Sequence[str], a: np.ndarray, b: np.ndarray, rank: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The way back of `_as_one`; with rank 0, of a module whose kernels have one A."""
    parts = {}
    for place, kernel in enumerate(kernels):
        own = slice(place * rank, (place + 1) * rank) if rank else slice(None)
        parts[kernel] = a[own].T, b[_rows(cfg, kernel), own].T
    return parts


def _patterns(cfg: ModelConfig, lora: Lora) -> dict[str, dict[str, float]]:
    """What adapter_config.json says of modules of several kernels; nothing where there are none."""
    many = {name.rpartition(".")[2]: len(kernels) for name, kernels in _adapted(cfg, lora).items() if len(kernels) > 1}
    if not many:
        return {}
    return {
        "rank_pattern": {name: count * lora.rank for name, count in many.items()},
        "alpha_pattern": {
            name: lora.alpha * (math.sqrt(count) if lora.use_rslora else count) for name, count in many.items()
        },
    }


def _check_shapes(cfg: ModelConfig, folder: pathlib.Path, name: str, a: np.ndarray, b: np.ndarray, rank: int) -> None:
    of_model = _shapes(cfg)
    kernels = [kernel for kernel, of in modules(cfg).items() if of == name]
    wide = of_model[kernels[0]].shape[1], sum(of_model[kernel].shape[2] for kernel in kernels)
    for part, value, shape in (("lora_A", a, (rank, wide[0])), ("lora_B", b, (wide[1], rank))):
        if value.shape != shape or not np.isfinite(value).all():
            raise ValueError(
                f"{folder / ADAPTER}: {part} of {name} is {value.shape}, not {shape}, or holds nan or infinity"
            )


def read_adapter_config(folder: pathlib.Path) -> Mapping[str, Any]:
    """The adapter_config.json of a folder. Raises ValueError for what would change what its adapters compute."""
    config = read_object(folder / ADAPTER_CONFIG)
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {name}={config[name]!r} is not supported; {MERGE}")
    if not isinstance(config.get("r"), int) or not math.isfinite(config.get("lora_alpha", math.nan)):
        raise ValueError(f"{folder / ADAPTER_CONFIG} lacks r or lora_alpha; it is no adapter that PEFT wrote")
    return config


def target_modules(cfg: ModelConfig, kernels: Sequence[str]) -> tuple[str, ...]:
    """The shortest names that mean these kernels and no others."""
    names = [modules(cfg)[path] for path in kernels]
    last = sorted({name.rpartition(".")[2] for name in names})
    whole = sorted({name.partition("{layer}.")[2] for name in names})
    return tuple(last if kernels_of(cfg, last) == tuple(kernels) else whole)
