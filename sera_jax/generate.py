"""`python -m sera_jax.generate --checkpoint=DIR --prompts=prompts.jsonl --out=answers.jsonl`: prompts in, JSONL out.

One line per answer: id, prompt, sample, response, finished, tokens, logp (the policy's own, summed), and one file
beside it, OUT.manifest.json, with everything the answers depend on.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from sera_jax.checkpoint.phases import file_digest, versions, write_json, write_jsonl
from sera_jax.data.loading import Limits, load_prompts
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.saved import open_policy
from sera_jax.loops.runtime import stable_id
from sera_jax.mesh import make_mesh
from sera_jax.sampling import SamplingParams, generate


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and answer every prompt; 2 where something is refused."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    mesh = make_mesh(1, -1, args.tensor)
    cfg, params, tokenizer_dir = open_policy(args.checkpoint, mesh, dtype=args.dtype)
    tokenizer = Tokenizer.load(args.tokenizer or tokenizer_dir, args.chat_template)
    limits = Limits(args.max_prompt_length, args.max_new_tokens, args.max_prompt_length + args.max_new_tokens)
    items, report = load_prompts(args.prompts, tokenizer, limits=limits, name="prompts")
    print(report.table(), file=sys.stderr)
    sampling = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        stop_ids=tokenizer.stop_ids,
    )
    samples = generate(
        cfg,
        params,
        [item.prompt for item in items],
        prompt_ids=[stable_id(item.id) for item in items],
        num_samples=args.num_samples,
        sampling=sampling,
        seed=args.seed,
        round=0,
        slots=args.slots,
        mesh=mesh,
        on_progress=lambda done, total, tokens: print(f"{done}/{total} answers", end="\r", file=sys.stderr),
    )
    rows = [
        {
            "id": items[s.prompt].id,
            "prompt": tokenizer.decode(items[s.prompt].prompt),
            "sample": s.sample,
            "response": tokenizer.decode(s.tokens),
            "finished": s.finished,
            "tokens": len(s.tokens),
            "logp": float(np.sum(s.logps)),
        }
        for s in samples
    ]
    out = pathlib.Path(args.out)
    write_jsonl(out, rows)
    manifest = {"sampling": dataclasses.asdict(sampling), "tokenizer": tokenizer.fingerprint(), "versions": versions()}
    write_json(out.with_name(out.name + ".manifest.json"), vars(args) | manifest | {"sha256": file_digest(out)})
    print(f"{len(rows)} answers to {len(items)} prompts: {out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sera_jax.generate", description=(__doc__ or "").split(":")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="WORKDIR/phases/NAME, or a Hugging Face folder")
    add("--prompts", required=True, help="prompt rows: JSONL, JSONL.gz, Parquet or tfds:NAME")
    add("--out", required=True, help="JSONL file to write; it appears whole or not at all")
    add("--tokenizer", default="", help="tokenizer folder (default: the checkpoint's)")
    add("--chat_template", default="", help="'' the tokenizer's own, 'none', 'hh', or a Jinja file")
    add("--num_samples", type=int, default=1)
    add("--temperature", type=float, default=0.7, help="0 is greedy")
    add("--top_p", type=float, default=1.0)
    add("--top_k", type=int, default=0)
    add("--max_new_tokens", type=int, default=256)
    add("--min_new_tokens", type=int, default=1)
    add("--max_prompt_length", type=int, default=1024, help="longer prompts lose their start")
    add("--slots", type=int, default=64, help="answers decoded at a time")
    add("--seed", type=int, default=0)
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype of a Hugging Face folder")
    add("--tensor", type=int, default=1, help="devices that share one copy of the parameters' tensor axis")
    return parser


if __name__ == "__main__":
    sys.exit(main())
