"""`python -m sera_jax.export --checkpoint=DIR --out=DIR`: a checkpoint as a folder that transformers loads."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import jax

from sera_jax.experiment.saved import open_policy
from sera_jax.mesh import make_mesh
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params
from sera_jax.models.folder import DTYPES
from sera_jax.models.huggingface import MAX_SHARD_BYTES, read_source, save_pretrained


def export(
    params: Params,
    cfg: ModelConfig,
    out: str | os.PathLike,
    *,
    dtype: str | None = None,
    source: str | os.PathLike | None = None,
    tokenizer_dir: str | os.PathLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> pathlib.Path:
    """Write `out` as a Hugging Face folder: weights, config.json, tokenizer files.

    Args:
        dtype: dtype of the weights; default that of the weights the model was loaded from (`cfg.export_dtype`).
        source: the Hugging Face folder that the model was loaded from, if at hand: its config.json is kept, and the
            tensors get its names and dtypes one by one.
        tokenizer_dir: folder whose tokenizer files and generation_config.json are copied.
        overwrite: replace an existing folder.

    Raises:
        ValueError, FileExistsError: as `huggingface.save_pretrained`.
    """
    described = read_source(source) if source is not None else None
    return save_pretrained(
        out,
        cfg,
        params,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer_dir=tokenizer_dir,
        source_config=described and described.config,
        source_dtypes=described and described.dtypes,
        overwrite=overwrite,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, export, say what was written."""
    parser = argparse.ArgumentParser(prog="python -m sera_jax.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="WORKDIR/phases/NAME, or a Hugging Face folder")
    parser.add_argument("--out", required=True, help="folder to write; it appears whole or not at all")
    parser.add_argument("--dtype", choices=list(DTYPES.values()), help="default: that of the weights trained from")
    parser.add_argument("--source", help="Hugging Face folder trained from: keep its config.json, names and dtypes")
    parser.add_argument("--tokenizer", help="folder with the tokenizer's files; default: the checkpoint's")
    parser.add_argument("--max_shard_bytes", type=int, default=MAX_SHARD_BYTES, help="begin a new file beyond this")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)

    try:
        cfg, params, tokenizer_dir = open_policy(args.checkpoint, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        out = export(
            params,
            cfg,
            args.out,
            dtype=args.dtype,
            source=args.source,
            tokenizer_dir=args.tokenizer or tokenizer_dir,
            max_shard_bytes=args.max_shard_bytes,
            overwrite=args.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"wrote {count:,} parameters to {out}; load them with AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
