"""What ends an answer, said once: for sampling, for training, for what is exported and for the user."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from sera_jax.data.tokenizing import Tokenizer
from sera_jax.models.folder import read_object

GENERATION = "generation_config.json"
Folder = str | os.PathLike[str]


def end_ids(tokenizer: Tokenizer, *folders: Folder) -> tuple[int, ...]:
    """Every id that ends an answer, sorted: the tokenizer's own (`Tokenizer.stop_ids`), and what the folders name.

    Args:
        folders: of the model, or of a run's tokenizer; "" is none. An id that they name and the tokenizer does not have
            is left out: it cannot be sampled.

    Raises:
        ValueError: as `named_ends`.
    """
    known = set(tokenizer.vocabulary().values())
    return tuple(sorted({*tokenizer.stop_ids, *(named_ends(*folders) & known)}))


def named_ends(*folders: Folder) -> set[int]:
    """The ids that the folders' generation_config.json and config.json name as `eos_token_id`: one, or a list.

    Raises:
        ValueError: a file is not JSON, or names something else than ids.
    """
    named: set[int] = set()
    for folder in filter(None, folders):
        for file in (pathlib.Path(folder) / GENERATION, pathlib.Path(folder) / "config.json"):
            value = read_object(file).get("eos_token_id") if file.is_file() else None
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(id) is int and id >= 0 for id in ids):
                raise ValueError(f"{file}: eos_token_id={value!r} should be a token id or a list of them; correct it")
            named |= set(ids)
    return named


def generation_config(ends: Sequence[int], *folders: Folder) -> dict[str, Any]:
    """A generation_config.json that ends answers at `ends`; other fields are those of the first folder that has one."""
    files = [pathlib.Path(folder) / GENERATION for folder in folders if folder]
    kept = next((read_object(file) for file in files if file.is_file()), {})
    return kept | {"eos_token_id": list(ends) if len(ends) > 1 else ends[0]}


def ends_in_words(tokenizer: Tokenizer, ends: Sequence[int]) -> str:
    """One line for the user: where answers end, each id with its token; ordinary text among them is pointed at."""
    names = {id: token for token, id in tokenizer.vocabulary().items()}
    shown = ", ".join(f"{id} {names[id]!r}" for id in ends)
    line = f"answers end at {shown}, in training, sampling and exports"
    if text := [id for id in ends if tokenizer.decode([id])]:
        line += (
            f"; warning: {', '.join(map(str, text))} is ordinary text to the tokenizer, named as eos_token_id in the "
            f"model's {GENERATION} or config.json; correct it there if answers should not end at it"
        )
    return line
