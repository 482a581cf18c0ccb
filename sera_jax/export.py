"""`python -m sera_jax.export --checkpoint=DIR --out=DIR`: a checkpoint as a folder that transformers loads.

Where the policy was trained from a Hugging Face folder that is still there, or is one, that folder's config.json,
tensor names and dtypes are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax

from sera_jax import hub, memory
from sera_jax.experiment.saved import SavedPolicy, export, find_policy
from sera_jax.mesh import make_mesh
from sera_jax.models.folder import DTYPES
from sera_jax.models.huggingface import MAX_SHARD_BYTES
from sera_jax.models.lora import merged
from sera_jax.models.peft import save_adapter

__all__ = ["export", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, export, say what was written; 2 where something is refused."""
    args = _parser().parse_args(argv)
    try:
        if args.push_to_hub:
            hub.check_push(args.push_to_hub)
        saved = find_policy(args.checkpoint)
        if saved.trained.lora and not args.merged:
            print(_export_adapter(args, saved))
            return 0
        with memory.named(
            f"exporting --checkpoint={args.checkpoint}", "one device holds the whole model: take a larger"
        ):
            params = merged(saved.cfg, saved.params(make_mesh(1, 1, 1, devices=jax.devices()[:1])))
            out = export(
                params,
                saved.cfg,
                args.out,
                dtype=args.dtype,
                source=args.source or saved.source,
                tokenizer_dir=args.tokenizer or saved.tokenizer_dir,
                max_shard_bytes=args.max_shard_bytes,
                overwrite=args.overwrite,
                card=saved.card(),
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"wrote {count:,} parameters to {out}; load them with AutoModelForCausalLM.from_pretrained({str(out)!r})")
    if args.push_to_hub:
        try:
            print(f"pushed to {hub.push(out, args.push_to_hub)}; a repository that this made is private")
        except (ValueError, OSError) as error:
            print(f"error: {out} is written, but not pushed: {error}", file=sys.stderr)
            return 2
    return 0


def _export_adapter(args: argparse.Namespace, saved: SavedPolicy) -> str:
    """Write the adapters as PEFT does; a line for the user."""
    if args.overwrite or args.source or args.push_to_hub:
        raise ValueError(
            f"--checkpoint={args.checkpoint} is an adapter, for which --overwrite, --source and --push_to_hub are not "
            "read; take them out, or write the whole model with --merged"
        )
    base = args.base or saved.base
    if not base:
        raise ValueError(
            f"--checkpoint={args.checkpoint} is an adapter over a model that its run trained: write the whole model "
            "with --merged, or export that one first and name its folder with --base"
        )
    adapters = saved.part(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    assert saved.trained.lora is not None
    dtype, tokenizer = args.dtype or "float32", args.tokenizer or saved.tokenizer_dir
    out = save_adapter(args.out, saved.cfg, saved.trained.lora, adapters, base=base, dtype=dtype, tokenizer=tokenizer)
    return f"wrote an adapter of {base} to {out}; load it with AutoPeftModelForCausalLM.from_pretrained({str(out)!r})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sera_jax.export", description="Write a checkpoint as a Hugging Face folder.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="WORKDIR/phases/NAME, a Hugging Face folder, or org/name of the hub")
    add("--out", required=True, help="folder to write; it appears whole or not at all")
    add("--dtype", choices=list(DTYPES.values()), help="of the weights; default: that of the weights trained from")
    add("--source", default="", help="Hugging Face folder whose config.json, names and dtypes to keep; default: found")
    add("--tokenizer", default="", help="folder with the tokenizer's files; default: the checkpoint's")
    add("--max_shard_bytes", type=int, default=MAX_SHARD_BYTES, help="begin a new file beyond this")
    add("--merged", action="store_true", help="of adapters: the whole model with them added, in place of PEFT's folder")
    add("--base", default="", help="of adapters: the folder or hub id of their base model; default: that of the run")
    add("--push_to_hub", default="", help="org/name on the Hugging Face hub, where the folder is put, too; HF_TOKEN")
    add("--overwrite", action="store_true", help="replace the folder if it exists")
    return parser


if __name__ == "__main__":
    sys.exit(main())
