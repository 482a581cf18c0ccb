"""Hugging Face folders in and out: config.json and safetensors, nothing that can hold code."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sera_jax.hub import TOKENIZER_FILES
from sera_jax.mesh import make_mesh, path_name, placed_shapes
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params, abstract_params
from sera_jax.models.families import config_from_hf, config_to_hf, family_of, mathematics
from sera_jax.models.family import Tensor
from sera_jax.models.folder import (
    DTYPES,
    INDEX,
    SINGLE,
    dtype_of,
    open_weights,
    read_config,
    some,
    whole_or_nothing,
    write_json,
    write_tensors,
)
from sera_jax.models.places import Place, leaf_at, places_of

MAX_SHARD_BYTES = 5 * 10**9
_TIED_ROWS = 4096  # of two tables that are compared at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """What an export must know of the folder the weights came from to write the same names and bytes.

    Attributes:
        config: the parsed config.json.
        dtypes: tensor name -> dtype, for every tensor of the files that is a parameter.
    """

    config: dict[str, Any]
    dtypes: dict[str, str]


def read_source(path: str | os.PathLike) -> Source:
    """Config and tensor dtypes of a Hugging Face folder, without reading the weights."""
    path = pathlib.Path(path)
    config = read_config(path)
    with open_weights(path) as files:
        _check_names(config_from_hf(config), files, path)
        buffers = family_of(config["model_type"]).buffers
        dtypes = {name: dtype_of(file, name) for name, file in files.items() if not _matches(buffers, name)}
    return Source(config=config, dtypes=dtypes)


def load_pretrained(
    path: str | os.PathLike, *, mesh: Mesh | None = None, param_dtype: str = "float32", **precision: Any
) -> tuple[ModelConfig, Params]:
    """Read a Hugging Face folder: config.json and safetensors (single, or sharded with an index).

    The files are mapped, not read: one parameter after the other, each device is given its own part and no more.

    Args:
        path: the folder.
        mesh: where the parameters go, by its sharding rules; default the first device alone.
        param_dtype: dtype of the returned parameters, whatever the files hold.
        precision: further ModelConfig fields that config.json does not speak of: dtype, logits_dtype, remat,
            attn_implementation.

    Returns:
        (config, parameters on the mesh). `config.export_dtype` is the dtype of the files.

    Raises:
        ValueError: not safetensors; a tensor is missing, unexpected or of another shape or dtype than config.json
            says; a tied output projection differs from the embedding; a config field is not supported; the mesh does
            not divide a parameter; a tensor holds nan or infinity.
        FileNotFoundError: the folder or a shard is missing.
    """
    path = pathlib.Path(path)
    cfg = config_from_hf(read_config(path), param_dtype=param_dtype, **precision)
    shapes = placed_shapes(mesh or make_mesh(devices=jax.devices()[:1]), abstract_params(cfg))
    with open_weights(path) as files:
        places = _check_names(cfg, files, path)
        dtypes = [dtype_of(files[name], name) for name in places]
        _check_tied_copy(cfg, files, path)
        names: dict[Tensor, list[str]] = {}
        for name, place in places.items():
            for tensor in place.tensors:
                names.setdefault(tensor, []).append(name)
        tensors = family_of(cfg.family).paths

        def read(where: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            tensor = tensors[path_name(where)]
            rows = None if tensor.rows is None else tensor.rows(cfg)
            return _read_leaf(path, files, names[tensor], tensor, rows, leaf)

        params = jax.tree_util.tree_map_with_path(read, shapes)
    most = max(set(dtypes), key=dtypes.count)
    return dataclasses.replace(cfg, export_dtype=most), params


def save_pretrained(
    path: str | os.PathLike,
    cfg: ModelConfig,
    params: Params,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_dir: str | os.PathLike | None = None,
    source_config: Mapping[str, Any] | None = None,
    source_dtypes: Mapping[str, str] | None = None,
    generation: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Write a folder that transformers loads; it appears whole or not at all.

    Args:
        path: the folder to make.
        params: arrays that this process can read whole (jax or numpy); one tensor after the other is, so that no second
            copy of them is held.
        dtype: dtype of the files; default that of the source, tensor by tensor where `source_dtypes` is given,
            else `cfg.export_dtype`.
        max_shard_bytes: a file is begun anew when it would grow beyond this.
        tokenizer_dir: folder whose tokenizer files and generation_config.json are copied.
        source_config: config.json of the folder the weights came from; kept but for its dtype.
        source_dtypes: tensor name -> dtype of that folder (`read_source`); decides also whether a tied output
            projection is written as a copy.
        generation: what generation_config.json shall hold, in place of a copy.
        overwrite: replace an existing folder.

    Raises:
        ValueError: the parameters do not fit the config, a value does not fit `dtype`, or `source_config` describes
            another model.
        FileExistsError: the folder exists and `overwrite` is off.
    """
    path = pathlib.Path(path)
    _check_params(cfg, params)
    dtypes = _export_dtypes(cfg, dtype, source_dtypes)
    config = _export_config(cfg, dtypes, source_config, tokenizer_dir)
    with whole_or_nothing(path, overwrite=overwrite) as partial:
        _write_weights(partial, cfg, params, dtypes, max_shard_bytes)
        write_json(partial / "config.json", config)
        if tokenizer_dir is not None:
            copy_tokenizer(pathlib.Path(tokenizer_dir), partial)
        if generation is not None:
            write_json(partial / "generation_config.json", generation)
    return path


def _check_names(cfg: ModelConfig, files: Mapping[str, Any], path: pathlib.Path) -> dict[str, Place]:
    """The places of all tensors; raises ValueError where names or shapes of the files differ from them."""
    family, places = family_of(cfg.family), places_of(cfg)
    allowed = {*places, family.tied[0]} if cfg.tie_word_embeddings else set(places)
    missing = [name for name in places if name not in files]
    unexpected = [name for name in files if name not in allowed and not _matches(family.buffers, name)]
    problems = []
    if missing:
        problems.append(f"missing tensors: {some(missing)}")
    if unexpected:
        problems.append(f"unexpected tensors: {some(unexpected)}")
    wrong = []
    for name in set(allowed) & set(files):
        shape = tuple(files[name].get_slice(name).get_shape())
        wanted = places[name if name in places else family.tied[1]].shape
        if shape != wanted:
            wrong.append(f"{name} is {list(shape)}, config.json says {list(wanted)}")
    if wrong:
        problems.append(f"wrong shapes: {some(sorted(wrong))}")
    if problems:
        raise ValueError(f"{path}: the weights do not fit config.json: {'; '.join(problems)}")
    return places


def _read_leaf(
    path: pathlib.Path,
    files: Mapping[str, Any],
    names: list[str],
    tensor: Tensor,
    rows: np.ndarray | None,
    leaf: jax.ShapeDtypeStruct,
) -> jax.Array:
    """One parameter, on its shards; of the tensors (`names`, by layer) only what a device holds is read and cast.

    Args:
        rows: which rows of the tensor are the parameter's, in our order; None: all.
    """

    def tensor_part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(reversed(index)) if tensor.transpose else index
        whole = files[name].get_slice(name)
        if rows is None:
            value = whole[index]
        else:
            runs = [whole[slice(run[0], run[-1] + 1), *index[1:]] for run in _runs(rows[index[0]])]
            value = np.concatenate(runs) if runs else whole[0:0, *index[1:]]
        if not np.isfinite(value).all():  # told here, or it looks like a training that diverged
            raise ValueError(f"{path}: tensor {name} holds nan or infinity, so the model is damaged; copy it again")
        return (value.T if tensor.transpose else value).astype(leaf.dtype)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        index = tuple(slice(*i.indices(size)) for i, size in zip(index, leaf.shape, strict=True))
        if not tensor.stacked:
            return tensor_part(names[0], index)
        out = np.empty([i.stop - i.start for i in index], leaf.dtype)
        for layer, name in enumerate(names[index[0]]):
            out[layer] = tensor_part(name, index[1:])
        return out

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _runs(rows: np.ndarray) -> list[np.ndarray]:
    """The rows cut where one is not the next."""
    return np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []


def _check_tied_copy(cfg: ModelConfig, files: Mapping[str, Any], path: pathlib.Path) -> None:
    head, embed = family_of(cfg.family).tied
    if not cfg.tie_word_embeddings or head not in files:
        return
    ours, theirs = files[embed].get_slice(embed), files[head].get_slice(head)
    blocks = itertools.pairwise([*range(0, cfg.vocab_size, _TIED_ROWS), cfg.vocab_size])
    if not all(np.array_equal(ours[start:end], theirs[start:end]) for start, end in blocks):
        raise ValueError(
            f"{path}: config.json says tie_word_embeddings=true, but {head} differs from {embed}; set it to false "
            f"there if {head} is meant, or take {head} out of the file"
        )


def _check_params(cfg: ModelConfig, params: Params) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    wanted, given = shapes(abstract_params(cfg)), shapes(params)
    problems = []
    if set(wanted) - set(given):
        problems.append(f"missing: {some(sorted(set(wanted) - set(given)))}")
    if set(given) - set(wanted):
        problems.append(f"unexpected: {some(sorted(set(given) - set(wanted)))}")
    wrong = [name for name in wanted if name in given and wanted[name] != given[name]]
    if wrong:
        problems.append(
            "wrong shapes: " + some([f"{name} is {given[name]}, the config says {wanted[name]}" for name in wrong])
        )
    if problems:
        raise ValueError(f"the parameters do not fit their config: {'; '.join(problems)}")


def _export_dtypes(cfg: ModelConfig, dtype: str | None, source_dtypes: Mapping[str, str] | None) -> dict[str, str]:
    """Tensor name -> dtype for every tensor to write, in order."""
    names = list(places_of(cfg))
    head, _ = family_of(cfg.family).tied
    if source_dtypes is not None and head in source_dtypes and head not in names:
        names.append(head)
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} cannot be written; choose one of {', '.join(DTYPES.values())}")
    return {name: dtype or (source_dtypes or {}).get(name, cfg.export_dtype) for name in names}


def _export_config(
    cfg: ModelConfig,
    dtypes: Mapping[str, str],
    source_config: Mapping[str, Any] | None,
    tokenizer_dir: str | os.PathLike | None,
) -> dict[str, Any]:
    kinds = list(dtypes.values())
    dtype = max(set(kinds), key=kinds.count)
    if source_config is None:
        return {**config_to_hf(cfg, dtype=dtype), **_special_ids(tokenizer_dir)}
    ours, theirs = mathematics(cfg), mathematics(config_from_hf(source_config))
    differing = [f"{name}={theirs[name]!r} (ours {ours[name]!r})" for name in ours if ours[name] != theirs[name]]
    if differing:
        raise ValueError(f"the source's config.json describes another model: {', '.join(differing)}; export without it")
    key = "dtype" if "dtype" in source_config else "torch_dtype"
    return {**source_config, key: dtype}


def _special_ids(tokenizer_dir: str | os.PathLike | None) -> dict[str, int | None]:
    """Ids of the tokenizer's BOS, EOS and padding; null where it has none, lest transformers assume Llama's own."""
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    folder = pathlib.Path(tokenizer_dir) if tokenizer_dir is not None else None
    if folder is None or not (folder / "tokenizer.json").is_file():
        return ids
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {token["content"]: token["id"] for token in model.get("added_tokens", [])}
    pieces = model.get("model", {}).get("vocab", {})
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    for key in ids:
        token = settings.get(key.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            ids[key] = vocab.get(token, pieces.get(token) if isinstance(pieces, dict) else None)
    return ids


def _write_weights(
    folder: pathlib.Path, cfg: ModelConfig, params: Params, dtypes: Mapping[str, str], max_shard_bytes: int
) -> None:
    places = places_of(cfg)
    head, embed = family_of(cfg.family).tied
    places.setdefault(head, places[embed])  # written only where `dtypes` names it
    sizes = {name: math.prod(places[name].shape) * np.dtype(kind).itemsize for name, kind in dtypes.items()}
    shards = _split(sizes, max_shard_bytes)
    for number, names in enumerate(shards, start=1):
        # in the order of safetensors' own writer, so that the files are the same to the byte: wide ones first, by name
        ordered = sorted(names, key=lambda name: (-np.dtype(dtypes[name]).itemsize, name))
        about = {name: (dtypes[name], places[name].shape) for name in ordered}
        tensors = (_tensor(params, cfg, places[name], name, dtypes[name]) for name in ordered)
        write_tensors(folder / _shard_name(number, len(shards)), about, tensors)
    if len(shards) > 1:
        weight_map = {name: _shard_name(n, len(shards)) for n, names in enumerate(shards, 1) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _tensor(params: Params, cfg: ModelConfig, place: Place, name: str, dtype: str) -> np.ndarray:
    """One tensor as it lies in the file; of a device's arrays it alone is brought to the host."""
    out = np.empty(place.shape, dtype)
    for tensor in place.tensors:
        value = leaf_at(params, tensor.path)
        value = value if place.layer is None else value[place.layer]
        shape = value.shape[::-1] if tensor.transpose else value.shape
        into = out if tensor.rows is None else np.empty(shape, dtype)
        with np.errstate(over="ignore"):
            for index, part in _on_host(value):
                (into.T if tensor.transpose else into)[index] = part
        if dtype == "float16" and np.isinf(into).any() and not any(np.isinf(part).any() for _, part in _on_host(value)):
            raise ValueError(f"tensor {name} has values beyond float16's 65504; export as bfloat16 or float32")
        if tensor.rows is not None:
            out[tensor.rows(cfg)] = into
    return out


def file_tensors(cfg: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float32 value of every tensor of a checkpoint with these parameters, or of what lies as they do."""
    for name, place in places_of(cfg).items():
        yield name, _tensor(params, cfg, place, name, "float32")


def _on_host(value: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """(where, values) of every part of an array, as it lies on its devices: an array as a whole would keep a copy."""
    if not isinstance(value, jax.Array):
        yield ..., value
        return
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, np.asarray(shard.data)


def _split(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """The files of a tokenizer, from one folder to another."""
    if not source.is_dir():
        raise FileNotFoundError(f"tokenizer folder {source} does not exist")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
