"""Hugging Face folders that a config names: what tells them apart, and that a base and its SFT model fit together."""

from __future__ import annotations

import concurrent.futures
import hashlib
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

from sera_jax.checkpoint.arrays import sum_in_pieces
from sera_jax.checkpoint.papers import is_whole, read_json, sealed, write_json
from sera_jax.config import ModelGroup
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.models.folder import ADAPTER_CONFIG, is_adapter, open_weights, read_config, read_object, weight_files

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_READERS = min(8, os.cpu_count() or 1)
_WORTH_A_WORD = 10**9  # bytes


def folder_identity(path: str, record: pathlib.Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """What tells one Hugging Face folder, of a model or an adapter, from another: its config, and of every tensor
    dtype, shape and checksum.

    Args:
        path: the folder; where it lies, and how its files are cut, does not count.
        record: a JSON file that remembers what was read, for files whose size, times and header stay as they were.
        say: takes a line for the user where weights are read.

    Raises:
        ValueError, FileNotFoundError: the folder cannot be read.
    """
    folder = pathlib.Path(path)
    files = weight_files(folder)
    looks = {file.name: _look(file) for file in files}
    known = read_json(record)
    known = known if is_whole(known) else {}
    here = os.path.abspath(path)
    if not isinstance(known.get(here), dict) or known[here].get("files") != looks or "tensors" not in known[here]:
        size = sum(file.stat().st_size for file in files)
        if size >= _WORTH_A_WORD:
            say(f"reading {size / 1e9:.1f} GB of weights in {path}, to know them again")
        known[here] = {"files": looks, "tensors": _tensor_sums(folder)}
        known.pop("digest", None)
        write_json(record, sealed(known))
    config = read_object(folder / ADAPTER_CONFIG) if is_adapter(folder) else read_config(folder)
    return {"tensors": known[here]["tensors"], "config": config}


def _look(file: pathlib.Path) -> list[Any]:
    """What another content hardly leaves as it is, and what costs nothing to see."""
    about = file.stat()
    with file.open("rb") as weights:
        header = weights.read(int.from_bytes(weights.read(8), "little") if about.st_size > 8 else 0)
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, hashlib.sha256(header).hexdigest()]


def _tensor_sums(folder: pathlib.Path) -> dict[str, str]:
    with open_weights(folder) as files, concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return dict(zip(files, readers.map(_tensor_sum, files.values(), files), strict=True))


def _tensor_sum(file: Any, name: str) -> str:
    """dtype, shape and checksum of a tensor as it is stored, read in pieces."""
    tensor = file.get_slice(name)
    shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
    read = (lambda begin, end: tensor[begin:end]) if shape else (lambda *_: file.get_tensor(name))
    total = sum_in_pieces(read, shape)
    return f"{kind} {list(shape)} {total[0]:08x}{total[1]:08x}"


def has_tokenizer(path: str) -> bool:
    """Whether the folder holds a tokenizer; False for no folder."""
    return bool(path) and any((pathlib.Path(path) / name).is_file() for name in TOKENIZER_FILES)


def check_two_models(model: ModelGroup, say: Callable[[str], None]) -> None:
    """Raises ValueError where base and SFT model, both given as folders, cannot make a coherent reward.

    They must be two, or the reward log pi_sft - log pi_base is 0 everywhere; and a token must mean the same to both.
    Where `tokenizer_name_or_path` says which tokenizer is used, only their vocabularies are compared.
    """
    base, sft = model.model_name_or_path, model.sft_model_path
    if not base or not sft:
        return
    if pathlib.Path(base).resolve() == pathlib.Path(sft).resolve():
        raise ValueError(
            f"config.model.sft_model_path={sft!r} is the folder of config.model.model_name_or_path: "
            "log pi_sft - log pi_base, the reward, is 0 everywhere; name the base it was trained from, or empty "
            "sft_model_path to train the SFT model here"
        )
    if not (has_tokenizer(base) and has_tokenizer(sft)):
        alone = base if has_tokenizer(sft) else sft
        say(f"warning: {alone} holds no tokenizer to compare; it is taken to be that of the other model")
        return
    ours, theirs = Tokenizer.load(base, "none"), Tokenizer.load(sft, "none")
    difference = _first_difference(ours, theirs, special=not model.tokenizer_name_or_path)
    if difference:
        raise ValueError(
            f"config.model.model_name_or_path={base!r} and config.model.sft_model_path={sft!r} have different "
            f"tokenizers: {difference}; base and SFT model must read the same tokens. Name the base it was trained from"
            ", or, where only special tokens differ, the tokenizer to use in config.model.tokenizer_name_or_path"
        )


def _first_difference(base: Tokenizer, sft: Tokenizer, *, special: bool) -> str:
    """What differs first, by id in the base; "" where nothing does."""
    ours, theirs = base.vocabulary(), sft.vocabulary()
    differ = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if differ:
        token = min(differ, key=lambda t: (ours.get(t, math.inf), theirs.get(t, math.inf)))
        there, here = (f"id {v[token]}" if token in v else "absent" for v in (ours, theirs))
        return f"token {token!r} is {there} in the base and {here} in the SFT model"
    for name in ("bos_id", "eos_id") if special else ():
        if getattr(base, name) != getattr(sft, name):
            return f"{name} is {getattr(base, name)} in the base and {getattr(sft, name)} in the SFT model"
    return ""
