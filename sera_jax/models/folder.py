"""The files of a model folder: read safely, written whole or not at all. Knows nothing of models."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401 (teaches numpy, and so safetensors, the dtype bfloat16)
import numpy as np
import safetensors

from sera_jax import hub, whole

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of PEFT
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_SHOWN = 8  # names listed in one message before the rest is only counted


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The parsed config.json of a folder. Raises FileNotFoundError or ValueError that says what is wrong."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give one that holds config.json and {SINGLE}")
    file = path / "config.json"
    if is_adapter(path):
        raise ValueError(
            f"{path} is an adapter (PEFT), no model: give the model that it was trained from, and the adapter in "
            "config.model.sft_model_path"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json; give a folder in Hugging Face's format")
    return read_object(file)


def is_adapter(path: pathlib.Path) -> bool:
    """Whether a folder holds adapters in PEFT's format and no model."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def read_object(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ValueError that names the file where it holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} should hold a JSON object, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def open_weights(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Tensor name -> open safetensors file that holds it (`get_tensor`, `get_slice`), from one file or an index.

    Raises:
        ValueError: no safetensors, an unreadable file or index, a git-LFS pointer, a tensor that lies in two files.
        FileNotFoundError: a file that the index names is missing.
    """
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for shard in weight_files(path):
            handle = _open_file(stack, shard)
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if name in files:
                    raise ValueError(f"{path}: tensor {name} lies in two files; keep one")
                files[name] = handle
        yield files


def _open_file(stack: contextlib.ExitStack, file: pathlib.Path) -> Any:
    with file.open("rb") as start:
        if start.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a git-LFS pointer, not the weights; fetch them with `git lfs pull`")
    try:
        return stack.enter_context(safetensors.safe_open(file, framework="np"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); copy it again") from error


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The one file of the weights or adapters, or those that the index names; raises as `open_weights`."""
    if is_adapter(path):
        if not (path / ADAPTER).is_file():
            raise FileNotFoundError(f"{path} has {ADAPTER_CONFIG} but no {ADAPTER}; save the adapter again with PEFT")
        return [path / ADAPTER]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        others = sorted(
            file.name for file in path.glob("*") if file.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack")
        )
        found = f" (found {', '.join(others[:_SHOWN])}, which is not read)" if others else ""
        raise ValueError(
            f"{path} has neither {SINGLE} nor {INDEX}{found}; only safetensors are read: save the model again with "
            "transformers' save_pretrained"
        )
    names = indexed(path, f"{path / INDEX}")
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{path / INDEX} names {name!r}, which is not a file of its own folder")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path / INDEX} names files that are not there: {some(missing)}; fetch them")
    return [path / name for name in names]


def indexed(folder: pathlib.Path, called: str) -> list[str]:
    """The files that a folder's index names. Raises ValueError, which calls the index as said, where it is none."""
    try:
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{called} is not an index of safetensors files: {error!r}") from error


def dtype_of(file: Any, name: str) -> str:
    """numpy's name of a tensor's dtype, from the header. Raises ValueError for one that is not supported."""
    kind = file.get_slice(name).get_dtype()
    if kind not in DTYPES:
        raise ValueError(f"tensor {name} has dtype {kind}; supported: {', '.join(DTYPES)}")
    return DTYPES[kind]


@contextlib.contextmanager
def whole_or_nothing(path: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """Give a temporary folder to fill; it takes the name `path` when the block ends well and vanishes otherwise.

    Raises:
        FileExistsError: the folder exists, is not empty, and `overwrite` is off.
    """
    if path.exists() and not overwrite and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; give another folder or ask to overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    if partial.exists():  # left by a process that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        _swap(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_tensors(
    file: pathlib.Path, about: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[np.ndarray]
) -> None:
    """Write a safetensors file, one tensor after the other: none is held but the one that is written.

    Args:
        about: name -> (numpy's name of the dtype, shape) of every tensor, in order.
        tensors: their values, in that order.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in about.items():
        end = begin + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), value in zip(about.items(), tensors, strict=True):
            assert (value.dtype, value.shape) == (np.dtype(dtype), tuple(shape)), name
            out.write(np.ascontiguousarray(value).view(np.uint8).data if value.ndim else value.tobytes())


def write_json(file: pathlib.Path, value: Any) -> None:
    """Write JSON for people to read."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _flush(folder: pathlib.Path) -> None:
    """Bring the folder's files to the disk before its name appears, so that a crash leaves no empty file."""
    for file in [*folder.iterdir(), folder]:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Give the finished folder its name. An old folder is moved aside first and removed last."""
    if path.exists():
        old = path.parent / f".{path.name}.old"
        if old.exists():
            shutil.rmtree(old)
        whole.appear(path, old)
        whole.appear(partial, path, last="config.json")
        shutil.rmtree(old)
    else:
        whole.appear(partial, path, last="config.json")


def some(names: list[str]) -> str:
    """The first few names of a list, and how many more there are."""
    return hub.some(names, _SHOWN)
