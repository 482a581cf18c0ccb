"""A transformers tokenizer from a folder or a hub id, without any code of its own."""

from __future__ import annotations

import os
import pathlib
from typing import Any


def from_pretrained(path_or_id: str | pathlib.Path) -> Any:
    """The tokenizer; raises ValueError with the way out."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch, which nothing needs
    import transformers  # here, since it takes a second to import and most of the data layer does not need it

    name = str(path_or_id)
    folder = pathlib.Path(name).expanduser()
    local = folder.is_dir()
    if not local and (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"tokenizer {name!r} is not a folder; give the folder that holds tokenizer.json, or a hub id")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder) if local else name, trust_remote_code=False, local_files_only=local
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "custom code" in reason:
            way_out = "code that comes with a tokenizer is never run here; give a folder with a plain tokenizer.json"
        elif local:
            way_out = "the folder needs tokenizer.json and tokenizer_config.json"
        else:
            way_out = (
                "check the name and the network (or HF_HUB_OFFLINE), or download the repository and give its folder"
            )
        raise ValueError(f"tokenizer {name!r} cannot be loaded: {reason}; {way_out}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer {name!r} has no tokenizer.json form; convert it to a fast tokenizer first")
    return tokenizer
