"""`python -m sera_jax.generate --checkpoint=DIR --prompts=prompts.jsonl --out=answers.jsonl`: prompts in, JSONL out.

One line per answer: the fields of the prompt's row as given (an answer that it had as `reference`), and sample,
response, finished, tokens, logp (the policy's own, summed over the tokens), rendered (the prompt's text as the policy
reads it, without control tokens). Rows and prompts so written may be trained on. One file beside it, OUT.manifest.json,
holds everything that the answers depend on. The same command gives the same answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from sera_jax import compile_cache, compiling, memory
from sera_jax.checkpoint.code import versions
from sera_jax.checkpoint.papers import file_digest, write_json, write_jsonl
from sera_jax.data.asked import read_asked
from sera_jax.data.columns import THOUGHTS
from sera_jax.data.items import Item
from sera_jax.data.loading import Limits, load_prompts
from sera_jax.data.tokenizing import ADD_BOS, Tokenizer
from sera_jax.experiment.assembly import with_vocabulary
from sera_jax.experiment.ends import ends_in_words
from sera_jax.experiment.saved import MAX_NEW_TOKENS, MAX_PROMPT_LENGTH, SavedPolicy, find_policy
from sera_jax.mesh import make_mesh
from sera_jax.progress import Progress
from sera_jax.sampling import Draws, Sample, SamplingParams, generate, mesh_for


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and answer every prompt; 2 where something is refused."""
    args = _parser().parse_args(argv)
    compile_cache.use()
    try:
        with memory.named(
            f"answering --prompts={args.prompts}", "lower --slots or --max_new_tokens, or take more devices"
        ):
            _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.num_samples < 1:
        raise ValueError(f"--num_samples={args.num_samples}; ask for at least 1 answer to each prompt")
    saved = find_policy(args.checkpoint, dtype=args.dtype)
    tokenizer = Tokenizer.load(args.tokenizer or saved.tokenizer_dir, args.chat_template, add_bos=args.add_bos)
    saved = dataclasses.replace(saved, cfg=with_vocabulary(saved.cfg, tokenizer, args.checkpoint, field="--tokenizer"))
    new, most = saved.lengths(args.max_new_tokens, args.max_prompt_length)
    ends = saved.ends(tokenizer)
    sampling = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=new,
        min_new_tokens=args.min_new_tokens,
        stop_ids=ends,
    )
    how: dict[str, Any] = {"name": "prompts", "reading": saved.reading(args.columns, args.thoughts)}
    items, report = load_prompts(args.prompts, tokenizer, limits=Limits(most, new, most + new), **how)
    print(f"{report.table()}\n{ends_in_words(tokenizer, ends)}", file=sys.stderr)
    asked = read_asked(args.prompts, **how)
    samples = _answer(args, saved, items, sampling)
    rows = [
        {
            **asked[items[s.prompt].id],
            "rendered": tokenizer.decode(items[s.prompt].prompt),
            "sample": s.sample,
            "response": tokenizer.decode_response(s.tokens),
            "finished": s.finished,
            "tokens": len(s.tokens),
            "logp": float(np.sum(s.logps)),
        }
        for s in samples
    ]
    out = pathlib.Path(args.out)
    write_jsonl(out, rows)
    manifest: dict[str, Any] = {
        "command": vars(args),
        "checkpoint": saved.digests(),
        "max_prompt_length": most,
        "reading": how["reading"].named(),
        "sampling": dataclasses.asdict(sampling),
        "tokenizer": tokenizer.fingerprint(),
        "sha256": file_digest(out),
        "versions": versions(),
    }
    write_json(out.with_name(out.name + ".manifest.json"), manifest)
    finished = sum(s.finished for s in samples) / len(samples)
    print(f"{len(rows)} answers to {len(items)} prompts, {100 * finished:.0f} % of them finished: {out}")


def _answer(
    args: argparse.Namespace, saved: SavedPolicy, items: Sequence[Item], sampling: SamplingParams
) -> list[Sample]:
    mesh = make_mesh(1, -1, 1)
    progress, before = Progress(), 0

    def update(done: Sequence[Sample], total: int, tokens: int) -> None:
        nonlocal before
        progress.update(len(done), tokens=tokens - before)
        before = tokens

    progress.say(f"reading the parameters of {args.checkpoint}")
    params = saved.params(mesh)
    count = len(items) * args.num_samples
    progress.say(f"{count} answers of at most {sampling.max_new_tokens} tokens, {min(args.slots, count)} at a time")
    progress.start("answers", count)
    try:
        with compiling.said(progress.say):
            return generate(
                saved.cfg,
                params,
                Draws.of_items(items, args.num_samples, seed=args.seed, round=0),
                sampling,
                slots=args.slots,
                mesh=mesh_for(saved.cfg, mesh, args.tensor),
                on_progress=update,
            )
    finally:
        progress.finish()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sera_jax.generate", description="Answer prompts with a policy.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="WORKDIR/phases/NAME, a Hugging Face folder, or org/name of the hub")
    add("--prompts", required=True, help="prompt rows: JSONL, JSONL.gz, Parquet, tfds:NAME or hub:NAME")
    add("--out", required=True, help="JSONL file to write; it appears whole or not at all")
    add("--tokenizer", default="", help="tokenizer folder (default: the checkpoint's)")
    add(
        "--chat_template",
        default="",
        help="'' the tokenizer's own (a run's policy: the run's), 'none', 'hh', or a file",
    )
    add(
        "--add_bos", default="tokenizer", choices=ADD_BOS, help="as config.data.add_bos; default: as the tokenizer does"
    )
    add("--num_samples", type=int, default=1, help="answers to each prompt")
    add("--columns", help="fields of other names, as config.data.columns; default: the run's")
    add("--thoughts", choices=THOUGHTS, help="as config.data.thoughts; default: the run's, else keep")
    add("--temperature", type=float, default=0.7, help="0 is greedy")
    add("--top_p", type=float, default=1.0)
    add("--top_k", type=int, default=0, help="0: no limit")
    add("--max_new_tokens", type=int, help=f"default: as in the policy's run, else {MAX_NEW_TOKENS}")
    add("--min_new_tokens", type=int, default=1)
    add(
        "--max_prompt_length",
        type=int,
        help=f"longer prompts lose their start; default: the run's, {MAX_PROMPT_LENGTH}",
    )
    add("--slots", type=int, default=64, help="answers decoded at a time")
    add("--seed", type=int, default=0)
    add(
        "--dtype", default="", choices=("", "float32", "bfloat16"), help="compute dtype; default: the run's, or float32"
    )
    add("--tensor", type=int, default=0, help="devices that share a copy of the model; 0: as its size asks for")
    return parser


if __name__ == "__main__":
    sys.exit(main())
