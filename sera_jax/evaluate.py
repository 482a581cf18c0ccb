"""`python -m sera_jax.evaluate --checkpoint=DIR --reference=DIR --pairs=heldout.jsonl --out=DIR`: facts of a policy.

Reward accuracy and margin on held-out pairs beside the length-only baseline; and with --world=NAME, the gold reward of
its answers to that embedded world's held-out prompts and the win rate against the reference. What is not given is taken
from the run that trained the policy: the loss, lengths, the world.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from sera_jax import compile_cache, compiling, memory, world
from sera_jax.checkpoint import Workdir
from sera_jax.checkpoint.papers import file_digest, write_json
from sera_jax.config import EvalGroup, SamplingGroup
from sera_jax.data.columns import THOUGHTS, Reading
from sera_jax.data.items import Item, PairItem
from sera_jax.data.loading import Limits, load_preferences, load_prompts
from sera_jax.data.packing import Layout
from sera_jax.data.tokenizing import ADD_BOS, Tokenizer
from sera_jax.experiment.assembly import with_vocabulary, world_gold, world_tasks
from sera_jax.experiment.ends import ends_in_words
from sera_jax.experiment.evaluator import Evaluator
from sera_jax.experiment.phases import in_words
from sera_jax.experiment.saved import MAX_NEW_TOKENS, MAX_PROMPT_LENGTH, SavedPolicy, find_policy
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.losses.preference import ResolvedLoss, resolve
from sera_jax.mesh import make_mesh, row_shards
from sera_jax.models.families import mathematics
from sera_jax.models.lora import merged
from sera_jax.writer import MetricWriter

ROW_TOKENS = 1024  # where neither the command line nor a run says
_FLAGS = {  # what a run's message calls a field, and what it is called here
    "--config.workdir": "--out",
    "config.workdir": "--out",
    "config.sampling.slots": "--slots",
    "config.data.row_tokens": "--row_tokens",
    "data.columns=": "--columns=",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, evaluate, print the facts as JSON; 2 where something is refused."""
    args = _parser().parse_args(argv)
    compile_cache.use()
    try:
        with memory.named(f"evaluating --checkpoint={args.checkpoint}", memory.WAY_OUT):
            facts = _run(args)
    except (ValueError, OSError) as error:
        words = str(error)
        for field, flag in _FLAGS.items():
            words = words.replace(field, flag)
        print(f"error: {words}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=1))
    return 0


def _run(args: argparse.Namespace) -> dict[str, Any]:
    if not args.pairs and not args.world:
        worlds = ", ".join(world.AUTHORS)
        raise ValueError(f"nothing to evaluate on; give --pairs=heldout.jsonl, --world=NAME ({worlds}), or both")
    saved, reference = _open(args)
    tokenizer = Tokenizer.load(args.tokenizer or saved.tokenizer_dir, args.chat_template, add_bos=args.add_bos)
    saved = dataclasses.replace(saved, cfg=with_vocabulary(saved.cfg, tokenizer, args.checkpoint, field="--tokenizer"))
    loss = _loss(args.loss, saved)
    new, most = saved.lengths(args.max_new_tokens, args.max_prompt_length)
    row_tokens = args.row_tokens or saved.of_run("data.row_tokens", ROW_TOKENS)
    limits = Limits(
        min(most, row_tokens - 1), saved.of_run("data.max_completion_length", new), row_tokens, share_prompt=True
    )
    mesh = make_mesh(1, -1, args.tensor)
    root = pathlib.Path(args.out)
    asked = {name: value for name, value in vars(args).items() if name not in ("out", "allow_other_versions")}
    resolved = {"loss": str(loss), "max_new_tokens": new, "max_prompt_length": most, "row_tokens": row_tokens}
    reading = saved.reading(args.columns, args.thoughts)
    resolved |= {} if reading == Reading() else {"reading": reading.named()}
    workdir = Workdir(root, asked | resolved, allow_other_versions=args.allow_other_versions)
    with MetricWriter(root, tensorboard=False) as writer, compiling.said(writer.announce), jax.set_mesh(mesh):
        for note in workdir.notes:
            writer.announce(note)
        ends = saved.ends(tokenizer)
        writer.announce(ends_in_words(tokenizer, ends))
        pairs, prompts = _read(args, saved, tokenizer, limits, workdir, reading)
        run = Runtime(
            cfg=saved.cfg,
            mesh=mesh,
            workdir=workdir,
            writer=writer,
            seed=args.seed,
            layout=Layout(row_tokens, shards=row_shards(mesh)),
            chunk_tokens=0,
            stop_ids=ends,
        )
        workdir.begin()
        workdir.watch = lambda name, finished: None if finished else writer.announce(in_words(name))
        policies = {name: _policy(run, name, found) for name, found in (("policy", saved), ("reference", reference))}
        evaluator = Evaluator(
            run=run,
            loss=loss,
            pairs=pairs,
            prompts=prompts,
            tokenizer=tokenizer,
            gold=world_gold(tokenizer) if args.world else None,
            reference=policies["reference"],
            settings=EvalGroup(temperature=args.temperature, num_generations=len(prompts)),
            sampling=SamplingGroup(max_new_tokens=new, slots=args.slots),
            tasks=world_tasks(tokenizer, prompts),
            heldout_tasks=saved.of_run("world", {}).get("heldout_tasks", ()),
        )
        facts = {"loss": str(loss), "pairs": len(pairs), "prompts": len(prompts)}
        facts |= evaluator.of_arm(policies["policy"])
        if prompts:
            evaluator.show(policies["policy"])
    write_json(root / "evaluation.json", facts)
    return facts


def _open(args: argparse.Namespace) -> tuple[SavedPolicy, SavedPolicy]:
    """The policy and its reference, which must be of one shape and dtype."""
    saved = find_policy(args.checkpoint, dtype=args.dtype)
    reference = find_policy(args.reference, dtype=saved.cfg.dtype, param_dtype=saved.cfg.param_dtype)
    ours, theirs = mathematics(saved.cfg), mathematics(reference.cfg)
    differ = [name for name, value in ours.items() if theirs.get(name) != value]
    if saved.cfg.param_dtype != reference.cfg.param_dtype:
        differ.append("param_dtype")
    if differ:
        raise ValueError(
            f"--reference={args.reference} is not of the shape of --checkpoint={args.checkpoint} "
            f"({', '.join(differ)} differ); give the SFT model that the policy was trained from"
        )
    return saved, reference


def _loss(name: str, saved: SavedPolicy) -> ResolvedLoss:
    """The loss of that name with its defaults; where none is named, the loss that the run used, as it used it."""
    return resolve(name) if name else resolve(**saved.of_run("loss", {"name": "dpo"}))


def _policy(run: Runtime, name: str, saved: SavedPolicy) -> Policy:
    """A run's policy where it lies; a Hugging Face folder's parameters, and adapters of another scale than those of the
    policy that is evaluated, merged, are copied into the results' folder."""
    if saved.is_phase and saved.cfg.lora_scale in (0, run.cfg.lora_scale):
        over = None if saved.over is None else _policy(run, name, saved.over)
        digest = file_digest(saved.folder / "params" / "checksums.json")
        return Policy(name, saved.folder, digest, trained=saved.trained, over=over)
    return run.store(name, {"files": saved.digests()}, lambda: merged(saved.cfg, saved.params(run.mesh)))


def _read(
    args: argparse.Namespace,
    saved: SavedPolicy,
    tokenizer: Tokenizer,
    limits: Limits,
    workdir: Workdir,
    reading: Reading,
) -> tuple[list[PairItem], list[Item]]:
    pairs_from, prompts = args.pairs, []
    if args.world:
        given = saved.of_run("world", {}) | {"name": args.world, "seed": saved.of_run("seed", args.seed)}
        spec = world.WorldSpec(**given)

        def write(folder: pathlib.Path) -> None:
            world.write_world(spec, folder / "files")

        files = workdir.phase("world", {"spec": str(spec)}, write).path / "files"
        pairs_from = pairs_from or str(files / "heldout_preferences.jsonl")
        prompts, report = load_prompts(
            str(files / "heldout_prompts.jsonl"), tokenizer, limits=limits, name="heldout_prompts"
        )
        print(report.table(), file=sys.stderr)
    how: dict[str, Any] = {"name": "pairs", "workdir": workdir.root, "reading": reading}
    pairs, report = load_preferences(pairs_from, tokenizer, limits=limits, **how)
    print(report.table(), file=sys.stderr)
    return pairs, prompts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sera_jax.evaluate", description="Evaluate a policy against its SFT model.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="WORKDIR/phases/NAME, a Hugging Face folder, or org/name of the hub")
    add("--reference", required=True, help="the SFT model, in either form")
    add("--pairs", default="", help="held-out preference rows; with --world, default: the world's")
    add("--world", default="", choices=("", *world.AUTHORS), help="gold reward in this embedded world")
    add("--out", required=True, help="folder for the results; an interrupted evaluation goes on from there")
    add("--loss", default="", help="whose implicit reward to use; default: that of the policy's run, else dpo")
    add("--tokenizer", default="", help="tokenizer folder (default: the checkpoint's)")
    add(
        "--chat_template",
        default="",
        help="'' the tokenizer's own (a run's policy: the run's), 'none', 'hh', or a file",
    )
    add(
        "--add_bos", default="tokenizer", choices=ADD_BOS, help="as config.data.add_bos; default: as the tokenizer does"
    )
    add("--columns", help="fields of other names, as config.data.columns; default: the run's")
    add("--thoughts", choices=THOUGHTS, help="as config.data.thoughts; default: the run's, else keep")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--max_new_tokens", type=int, help=f"default: as in the policy's run, else {MAX_NEW_TOKENS}")
    add(
        "--max_prompt_length",
        type=int,
        help=f"longer prompts lose their start; default: the run's, {MAX_PROMPT_LENGTH}",
    )
    add("--row_tokens", type=int, help=f"length of packed rows; default: the run's, else {ROW_TOKENS}")
    add("--slots", type=int, default=64, help="answers decoded at a time")
    add("--seed", type=int, default=0, help="of sampling, and of the world where no run says")
    add(
        "--dtype", default="", choices=("", "float32", "bfloat16"), help="compute dtype; default: the run's, or float32"
    )
    add("--tensor", type=int, default=1, help="size of the mesh's tensor axis")
    add("--allow_other_versions", action="store_true", help="go on in a folder that other versions were at work in")
    return parser


if __name__ == "__main__":
    sys.exit(main())
