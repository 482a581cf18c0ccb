"""`python -m sera_jax.evaluate --checkpoint=DIR --reference=DIR --pairs=heldout.jsonl --out=DIR`: facts of a policy.

Reward accuracy and margin on held-out pairs beside the length-only baseline; and with --world=habits, the gold reward
of its answers to the embedded world's held-out prompts and the win rate against the reference.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from sera_jax import world
from sera_jax.checkpoint import Workdir, tree_digest
from sera_jax.checkpoint.phases import write_json
from sera_jax.config import EvalGroup, SamplingGroup
from sera_jax.data.items import Item, PairItem
from sera_jax.data.loading import Limits, load_preferences, load_prompts
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.assembly import world_judge
from sera_jax.experiment.evaluator import Evaluator
from sera_jax.experiment.saved import open_policy
from sera_jax.loops.runtime import Runtime
from sera_jax.losses.preference import resolve
from sera_jax.mesh import make_mesh
from sera_jax.models.families import mathematics
from sera_jax.writer import MetricWriter


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and evaluate; 2 where something is refused."""
    args = _parser().parse_args(argv)
    try:
        facts = _run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=1))
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    if not args.pairs and not args.world:
        raise ValueError("nothing to evaluate on; give --pairs=heldout.jsonl, or --world=habits, or both")
    mesh = make_mesh(1, -1, 1)
    cfg, params, tokenizer_dir = open_policy(args.checkpoint, mesh)
    reference_cfg, reference, _ = open_policy(args.reference, mesh)
    if mathematics(cfg) != mathematics(reference_cfg):
        raise ValueError(f"--reference={args.reference} is not of the shape of --checkpoint={args.checkpoint}")
    tokenizer = Tokenizer.load(args.tokenizer or tokenizer_dir, args.chat_template)
    root = pathlib.Path(args.out)
    with MetricWriter(root, tensorboard=False) as writer, jax.set_mesh(mesh):
        workdir = Workdir(root, {k: v for k, v in vars(args).items() if k != "out"})
        pairs, prompts = _read(args, tokenizer, workdir)
        run = Runtime(
            cfg=cfg,
            mesh=mesh,
            workdir=workdir,
            writer=writer,
            seed=args.seed,
            row_tokens=args.row_tokens,
            share_prompt=True,
            chunk_tokens=2048,
            stop_ids=tokenizer.stop_ids,
        )
        policies = {
            name: run.store(name, {"params": tree_digest(tree)}, lambda tree=tree: tree)
            for name, tree in (("policy", params), ("reference", reference))
        }
        evaluator = Evaluator(
            run=run,
            loss=resolve(args.loss),
            pairs=pairs,
            prompts=prompts,
            decode=tokenizer.decode,
            judge=world_judge(tokenizer) if args.world else None,
            reference=policies["reference"],
            settings=EvalGroup(temperature=args.temperature),
            sampling=SamplingGroup(max_new_tokens=args.max_new_tokens, slots=args.slots),
        )
        facts = evaluator.of_arm(policies["policy"])
    write_json(root / "evaluation.json", facts)
    return facts


def _read(args: argparse.Namespace, tokenizer: Tokenizer, workdir: Workdir) -> tuple[list[PairItem], list[Item]]:
    limits = Limits(args.max_prompt_length, args.max_new_tokens, args.row_tokens)
    pairs: list[PairItem] = []
    prompts: list[Item] = []
    if args.pairs:
        pairs, report = load_preferences(args.pairs, tokenizer, limits=limits, name="pairs", workdir=workdir.root)
        print(report.table(), file=sys.stderr)
    if args.world:
        spec = world.WorldSpec(seed=args.seed)
        product = workdir.phase(
            "world", {"seed": args.seed}, lambda folder: world.write_world(spec, folder / "files") and None
        )
        files = product.path / "files" / "heldout_prompts.jsonl"
        prompts, _ = load_prompts(str(files), tokenizer, limits=limits, name="heldout_prompts")
    return pairs, prompts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sera_jax.evaluate", description=(__doc__ or "").split(":")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="WORKDIR/phases/NAME, or a Hugging Face folder")
    add("--reference", required=True, help="the SFT model, in either form")
    add("--pairs", default="", help="held-out preference rows")
    add("--world", default="", choices=("", "habits"), help="gold reward in the embedded world")
    add("--out", required=True, help="folder for the results; an interrupted evaluation goes on from there")
    add("--loss", default="dpo", help="whose implicit reward to use")
    add("--tokenizer", default="", help="tokenizer folder (default: the checkpoint's)")
    add("--chat_template", default="", help="'' the tokenizer's own, 'none', 'hh', or a Jinja file")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--max_new_tokens", type=int, default=256, help="also the longest response of a pair that is read whole")
    add("--max_prompt_length", type=int, default=512)
    add("--row_tokens", type=int, default=1024)
    add("--slots", type=int, default=64)
    add("--seed", type=int, default=0, help="of the world, and of sampling")
    return parser


if __name__ == "__main__":
    sys.exit(main())
