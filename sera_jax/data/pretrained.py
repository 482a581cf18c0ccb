"""A transformers tokenizer from a folder or a hub id, without any code of its own."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from sera_jax import hub


def from_pretrained(path_or_id: str | pathlib.Path) -> Any:
    """The tokenizer; raises ValueError with the way out."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch, which nothing needs
    import transformers  # here, since it takes a second to import and most of the data layer does not need it

    name = str(path_or_id)
    folder = pathlib.Path(name).expanduser()
    if not folder.is_dir():
        repository = hub.parse(name, bare=True)
        if repository is None:
            raise ValueError(
                f"tokenizer {name!r} is not a folder; give the folder that holds tokenizer.json, or a hub id"
            )
        folder = hub.look(repository, (*hub.TOKENIZER_FILES, "config.json")).folder
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "custom code" in reason:
            way_out = "code that comes with a tokenizer is never run here; give a folder with a plain tokenizer.json"
        else:
            way_out = "the folder needs tokenizer.json and tokenizer_config.json"
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {reason}; {way_out}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer {name!r} has no tokenizer.json form; convert it to a fast tokenizer first")
    return tokenizer
