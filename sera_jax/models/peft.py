"""PEFT's names and folders: which kernels its `target_modules` mean, and adapters as it writes and reads them."""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import abstract_params
from sera_jax.models.families import family_of
from sera_jax.models.folder import read_object, some, whole_or_nothing, write_json
from sera_jax.models.huggingface import copy_tokenizer
from sera_jax.models.lora import KERNEL, A, B, Lora
from sera_jax.models.parts import Tree, nested, paths

ALL_LINEAR = "all-linear"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields of adapter_config.json that change what an adapter computes, with the values under which they do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
}


def modules(cfg: ModelConfig) -> dict[str, str]:
    """Path of every kernel of the layers -> PEFT's name of the module, with `{layer}` in it."""
    there = paths(abstract_params(cfg))
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
        ValueError: an adapted kernel is one of several in a tensor of the family's files.
        FileExistsError: the folder exists and is not empty.
    """
    names, leaves = modules(cfg), paths(jax.device_get(adapters))
    if fused := [path for path in lora.kernels if list(names.values()).count(names[path]) > 1]:
        raise ValueError(
            f"{names[fused[0]]} is one module for PEFT and several kernels here ({', '.join(fused)}), each with an "
            "adapter of its own; write the whole model: --merged"
        )
    tensors: dict[str, np.ndarray] = {}
    for kernel in lora.kernels:
        beside = kernel.removesuffix(KERNEL)
        for layer in range(cfg.num_hidden_layers):
            module = _PREFIX + names[kernel].format(layer=layer)
            for ours, theirs in ((A, "lora_A"), (B, "lora_B")):
                tensors[f"{module}.{theirs}.weight"] = np.ascontiguousarray(
                    leaves[beside + ours][layer].T.astype(dtype)
                )
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.use_rslora,
        "target_modules": _short(cfg, lora.kernels),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with whole_or_nothing(pathlib.Path(path), overwrite=False) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / CONFIG, written)
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
    config = _read_config(folder)
    rank, names = int(config["r"]), modules(cfg)
    kernels = paths(abstract_params(cfg))
    with safe_open(folder / WEIGHTS, framework="np") as file:
        there = set(file.keys())
        wanted: dict[str, list[str]] = {}
        for kernel, name in names.items():
            for ours, theirs in ((A, "lora_A"), (B, "lora_B")):
                tensors = [f"{_PREFIX}{name}.{theirs}.weight".format(layer=i) for i in range(cfg.num_hidden_layers)]
                if there & set(tensors):
                    wanted[kernel.removesuffix(KERNEL) + ours] = tensors
        asked = {tensor for tensors in wanted.values() for tensor in tensors}
        if bad := sorted(asked ^ there):
            raise ValueError(f"{folder / WEIGHTS} does not fit the model: missing or unexpected tensors: {some(bad)}")
        leaves = {leaf: np.stack([file.get_tensor(t).T.astype(np.float32) for t in ts]) for leaf, ts in wanted.items()}
    for leaf, value in leaves.items():
        layers, inputs, outputs = kernels[f"{leaf.rpartition('/')[0]}/{KERNEL}"].shape
        shape = (layers, inputs, rank) if leaf.endswith(A) else (layers, rank, outputs)
        if value.shape != shape or not np.isfinite(value).all():
            raise ValueError(f"{folder / WEIGHTS}: {leaf} is {value.shape}, not {shape}, or holds nan or infinity")
    adapted = tuple(kernel for kernel in names if kernel.removesuffix(KERNEL) + A in leaves)
    return Lora(rank, float(config["lora_alpha"]), adapted, bool(config.get("use_rslora"))), nested(leaves)


def _read_config(folder: pathlib.Path) -> Mapping[str, Any]:
    config = read_object(folder / CONFIG)
    for name, plain in _PLAIN.items():
        if name in config and config[name] not in plain:
            raise ValueError(
                f"{folder / CONFIG}: {name}={config[name]!r} is not supported; merge the adapter with PEFT "
                "(merge_and_unload, save_pretrained) and give that folder"
            )
    if not isinstance(config.get("r"), int) or not math.isfinite(config.get("lora_alpha", math.nan)):
        raise ValueError(f"{folder / CONFIG} lacks r or lora_alpha; it is no adapter that PEFT wrote")
    return config


def _short(cfg: ModelConfig, kernels: Sequence[str]) -> list[str]:
    """The shortest names that mean these kernels and no others."""
    names = [modules(cfg)[path] for path in kernels]
    last = sorted({name.rpartition(".")[2] for name in names})
    return last if kernels_of(cfg, last) == tuple(kernels) else sorted({n.partition("{layer}.")[2] for n in names})
