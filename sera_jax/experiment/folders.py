"""Hugging Face folders that a config names: what tells them apart, and that a base and its SFT model fit together."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import Any

from sera_jax.config import ModelGroup
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.models.folder import read_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def folder_identity(path: str) -> dict[str, Any]:
    """What tells one Hugging Face folder from another without reading its weights: names, sizes and config."""
    folder = pathlib.Path(path)
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))} | {
        "path": path,
        "config": read_config(folder),
    }


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
