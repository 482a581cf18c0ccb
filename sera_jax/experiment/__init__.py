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
from sera_jax.checkpoint.phases import versions
from sera_jax.config import Config
from sera_jax.evaluation import picture, report
from sera_jax.experiment.assembly import base_model, check_positions, read_corpus
from sera_jax.experiment.saved import describe, export
from sera_jax.experiment.sera_arms import run_sera_arms
from sera_jax.experiment.srppo_arms import run_srppo_arms
from sera_jax.experiment.start import params_sha256, starting_policy
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.losses.preference import resolve
from sera_jax.mesh import make_mesh
from sera_jax.writer import MetricWriter


def run(config: Config, *, stop_requested: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run, or go on with, the experiment of `config`; returns the summary that it also writes to the work directory.

    Raises:
        ValueError: what was asked for cannot be done; the message says the way out.
        Preempted: stopped on request, with everything saved.
    """
    loss = resolve(**dataclasses.asdict(config.loss)) if config.method == "sera" else None
    root = pathlib.Path(config.workdir)
    workdir = Workdir(root, config_lib.to_dict(config))
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with MetricWriter(root, tensorboard=config.log.tensorboard) as writer, jax.set_mesh(mesh):
        for note in workdir.notes:
            writer.announce(note)
        writer.announce(f"loss {loss}" if loss is not None else f"coherent reward: {config.reward}")
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
        base, start = starting_policy(config, runtime, corpus, make_base)
        if loss is not None:
            final, facts = run_sera_arms(config, runtime, corpus, start, loss)
        else:
            assert base is not None, "Self-Rewarding PPO scores with the base"
            final, facts = run_srppo_arms(config, runtime, corpus, base, start)
        summary = {
            **facts,
            "wall_seconds": {name: product.seconds for name, product in workdir.done.items()},
            "peak_memory_bytes": peak_memory_bytes(),
            "params_sha256": {arm: params_sha256(policy) for arm, policy in final.items()},
            "compilations": runtime.compilations(),
            "config": config_lib.to_dict(config),
            "seed": config.seed,
            "versions": versions(),
        }
        finish(config, runtime, final, summary)
    return summary


def finish(
    config: Config,
    runtime: Runtime,
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


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far (and the device's own peak, where it reports one)."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = jax.local_devices()[0].memory_stats() or {}
    return max(host, int(stats.get("peak_bytes_in_use", 0)))
