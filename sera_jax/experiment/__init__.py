"""One run from config to summary: the composition root, and the only module that reads the whole config."""

from __future__ import annotations

import dataclasses
import pathlib
import resource
import sys
from collections.abc import Callable
from typing import Any

import jax

from sera_jax import config as config_lib
from sera_jax.checkpoint import Workdir
from sera_jax.checkpoint.phases import file_digest, versions, write_jsonl
from sera_jax.config import Config
from sera_jax.evaluation import picture, report
from sera_jax.experiment.assembly import Corpus, base_model, check_positions, folder_identity, read_corpus, sft_model
from sera_jax.experiment.evaluator import Evaluator
from sera_jax.experiment.saved import describe, export
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.loops.sera import sera
from sera_jax.loops.sft import sft
from sera_jax.loops.study import Study
from sera_jax.losses.preference import ResolvedLoss, resolve
from sera_jax.mesh import make_mesh
from sera_jax.writer import MetricWriter


def run(config: Config, *, stop_requested: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run, or go on with, the experiment of `config`; returns the summary that it also writes to the work directory.

    Raises:
        ValueError: what was asked for cannot be done; the message says the way out.
        Preempted: stopped on request, with everything saved.
    """
    loss = resolve(**dataclasses.asdict(config.loss))
    root = pathlib.Path(config.workdir)
    workdir = Workdir(root, config_lib.to_dict(config))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with MetricWriter(root, tensorboard=config.log.tensorboard) as writer, jax.set_mesh(mesh):
        writer.announce(f"loss {loss}")
        corpus = read_corpus(config, workdir, writer.announce)
        cfg, make_base = base_model(config.model, corpus.tokenizer, config.seed)
        check_positions(config, cfg)
        runtime = Runtime(
            cfg=cfg,
            mesh=mesh,
            workdir=workdir,
            writer=writer,
            seed=config.seed,
            row_tokens=config.data.row_tokens,
            share_prompt=config.data.share_prompt,
            chunk_tokens=config.train.logits_chunk_tokens,
            stop_ids=corpus.tokenizer.stop_ids,
            stop_requested=stop_requested,
        )
        describe(root, cfg, corpus.tokenizer, config.model.model_name_or_path)
        start = starting_policy(config, runtime, corpus, make_base)
        evaluator, study = prepare_rounds(config, runtime, corpus, start, loss)
        arms: dict[str, dict[str, Any]] = {"sft": evaluator.of_arm(start)}
        rounds: list[dict[str, Any]] = []
        final = {"sft": start}
        for arm in config.sera.arms:
            final[arm], facts = sera(study, arm)
            rounds += facts
            arms[arm] = evaluator.of_arm(final[arm])
        summary = {
            "arms": arms,
            "rounds": rounds,
            "loss": loss.as_dict(),
            "wall_seconds": {name: product.seconds for name, product in workdir.done.items()},
            "peak_memory_bytes": peak_memory_bytes(),
            "params_sha256": {arm: params_sha256(policy) for arm, policy in final.items()},
            "compilations": runtime.compilations(),
            "config": config_lib.to_dict(config),
            "seed": config.seed,
            "versions": versions(),
        }
        finish(config, runtime, corpus, final, summary)
    return summary


def prepare_rounds(
    config: Config, runtime: Runtime, corpus: Corpus, start: Policy, loss: ResolvedLoss
) -> tuple[Evaluator, Study]:
    """What the rounds of every arm are given; evaluating a round also adds its answers to generations.jsonl."""
    evaluator = Evaluator(
        run=runtime,
        loss=loss,
        pairs=corpus.heldout,
        prompts=corpus.eval_prompts,
        tokenizer=corpus.tokenizer,
        judge=corpus.judge,
        reference=start,
        settings=config.eval,
        sampling=config.sampling,
    )
    shown: dict[str, list[dict[str, Any]]] = {}

    def evaluate(policy: Policy, round_: int) -> dict[str, Any]:
        shown[policy.name] = evaluator.show(policy)
        write_jsonl(runtime.workdir.root / "generations.jsonl", [row for rows in shown.values() for row in rows])
        return evaluator(policy, round_)

    evaluate(start, 0)
    study = Study(
        run=runtime,
        sft=start,
        loss=loss,
        settings=config.sera,
        train=config.train,
        sampling=config.sampling,
        pool=corpus.train,
        prompts=corpus.prompts,
        evaluate=evaluate,
        judge=corpus.judge,
        max_row_shapes=config.data.max_row_shapes,
        logging_steps=config.log.logging_steps,
    )
    return evaluator, study


def starting_policy(config: Config, runtime: Runtime, corpus: Corpus, make_base: Callable[[], Any]) -> Policy:
    """The SFT model: the checkpoint named, or SFT of the base on the demonstrations."""
    say = runtime.writer.announce
    if config.model.sft_model_path:
        say(f"SFT model: {config.model.sft_model_path}; no SFT is run")
        identity = folder_identity(config.model.sft_model_path)
        return runtime.store("sft", identity, lambda: sft_model(config.model, runtime.cfg))
    fresh = not config.model.model_name_or_path
    identity = {"model": dataclasses.asdict(config.model), "seed": config.seed}
    if not fresh:
        identity |= folder_identity(config.model.model_name_or_path)
    base = runtime.store("init" if fresh else "base", identity, make_base)
    shapes, steps = config.data.max_row_shapes, config.log.logging_steps
    if fresh:
        say(f"base model from scratch, on {len(corpus.pretrain)} texts")
        base = sft(
            runtime, "pretrain", base, corpus.pretrain, config.pretrain, max_row_shapes=shapes, logging_steps=steps
        )
    say(f"SFT on {len(corpus.demonstrations)} demonstrations: {corpus.demonstrations_are}")
    return sft(runtime, "sft", base, corpus.demonstrations, config.sft, max_row_shapes=shapes, logging_steps=steps)


def finish(
    config: Config,
    runtime: Runtime,
    corpus: Corpus,
    final: dict[str, Policy],
    summary: dict[str, Any],
) -> None:
    """Write summary.json, report.png and, if asked for, Hugging Face folders of the last policies; print the table."""
    root, say = runtime.workdir.root, runtime.writer.report
    report.write_summary(root / "summary.json", summary)
    say(f"{report.table(summary)}\n\n{report.legend(summary)}\n")
    if config.log.report:
        picture.report_png(summary, root / "report.png")
        say(f"picture: {root / 'report.png'}")
    if config.log.hf_export:
        for arm, policy in final.items():
            out = export(
                runtime.params(policy),
                runtime.cfg,
                root / "huggingface" / arm,
                source=config.model.model_name_or_path or None,
                tokenizer_dir=root / "tokenizer",
                overwrite=True,
            )
            say(f"Hugging Face checkpoint of {arm}: {out}")
    say(f"summary: {root / 'summary.json'}")


def params_sha256(policy: Policy) -> str:
    """Digest of a policy's parameters, from the checksums stored beside them."""
    return file_digest(policy.path / "params" / "checksums.json")


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far (and the device's own peak, where it reports one)."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = jax.local_devices()[0].memory_stats() or {}
    return max(host, int(stats.get("peak_bytes_in_use", 0)))
