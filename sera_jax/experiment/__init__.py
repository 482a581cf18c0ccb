"""One run from config to summary: the composition root, and the only module that reads the whole config."""

from __future__ import annotations

import contextlib
import json
import pathlib
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from sera_jax import compiling, hosts, processor, stamps
from sera_jax import config as config_lib
from sera_jax.checkpoint import Workdir, outputs
from sera_jax.checkpoint.lock import ADDRESSED
from sera_jax.checkpoint.shared import SharedPhases
from sera_jax.config import Config
from sera_jax.evaluation import report
from sera_jax.evaluation.report import Report
from sera_jax.experiment import brought
from sera_jax.experiment.assembly import (
    base_model,
    check_positions,
    check_sources,
    layout_of,
    read_corpus,
    tried_attention,
)
from sera_jax.experiment.card import card
from sera_jax.experiment.ends import end_ids, ends_in_words
from sera_jax.experiment.method import Experiment
from sera_jax.experiment.methods import METHODS
from sera_jax.experiment.needs import batches_in_words, check_memory
from sera_jax.experiment.parts import with_adapters
from sera_jax.experiment.phases import Phases
from sera_jax.experiment.saved import describe, export
from sera_jax.experiment.start import START_PHASES, params_sha256, starting_policy
from sera_jax.experiment.start import phases as start_phases
from sera_jax.experiment.verifying import OUTPUTS
from sera_jax.loops.runtime import NonFinite, Policy, Preempted, Runtime
from sera_jax.mesh import fetch, make_mesh, meet
from sera_jax.models.lora import merged
from sera_jax.ops.backends import AUTO, Asked, choose
from sera_jax.sampling import mesh_for
from sera_jax.writer import MetricWriter


def run(
    config: Config,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
    allow_other_versions: bool = False,
    shared_phases: str = "",
    progress_dir: str = "",
) -> dict[str, Any]:
    """Run, or go on with, the experiment of `config`; returns the summary that it also writes to the work directory.

    Args:
        stop_requested: asked between steps; True stops with everything saved.
        allow_other_versions: go on with what other versions made (`Workdir`).
        shared_phases: a folder where tokens and the phases up to the SFT model are looked for, and left; "": none.
        progress_dir: where each of several processes keeps its sign of life; "": in the work directory.

    Raises:
        ValueError: what was asked for cannot be done; the message says the way out.
        Preempted: stopped on request, with everything saved.
    """
    method, root, fields = METHODS[config.method], pathlib.Path(config.workdir), config_lib.to_dict(config)
    workdir = Workdir(root, fields, allow_other_versions=allow_other_versions, keeps_states=config.log.keep_states)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    meet(mesh)
    text = json.dumps(fields, indent=1, default=str)
    found = brought.survey(config, root)
    asked, config = config, found.config
    check_sources(config.data, config.model)
    check_memory(config, mesh)
    if shared_phases:
        workdir.shared = _shared(shared_phases, config, mesh)
    with (
        stamps.kept(pathlib.Path(progress_dir or root / stamps.FOLDER), hosts.index(), hosts.count()),
        MetricWriter(root, is_host0=hosts.is_first(), tensorboard=config.log.tensorboard, config_text=text) as writer,
        compiling.said(writer.announce),
        jax.set_mesh(mesh),
    ):
        for note in workdir.notes:
            writer.announce(note)
        writer.announce(method.announce(config))
        brought.bring(found, root, writer.announce)
        corpus = read_corpus(config, workdir, writer.announce)
        cfg, make_base = base_model(config.model, corpus.tokenizer, config.seed)
        check_positions(config, cfg)
        cfg, lora = with_adapters(config, cfg)
        mesh_for(cfg, mesh, config.mesh.decode_tensor)
        base_folder, sft_folder = config.model.model_name_or_path, config.model.sft_model_path
        ends = end_ids(corpus.tokenizer, sft_folder, base_folder)
        writer.announce(ends_in_words(corpus.tokenizer, ends))
        for line in (*tried_attention(config, cfg, mesh), *batches_in_words(config, corpus)):
            writer.announce(line)
        runtime = Runtime(
            cfg=cfg,
            mesh=mesh,
            workdir=workdir,
            writer=writer,
            seed=config.seed,
            layout=layout_of(config.data, mesh),
            chunk_tokens=config.train.logits_chunk_tokens,
            stop_ids=ends,
            decode_tensor=config.mesh.decode_tensor,
            logging_steps=config.log.logging_steps,
            stop_requested=stop_requested,
            lora=lora,
        )
        workdir.begin()
        hosts.on_first(lambda: describe(root, cfg, corpus.tokenizer, base_folder, sft_folder))
        workdir.watch = phases = Phases([*start_phases(config), *method.phases(config, corpus)], writer.announce)
        with _writing_behind(workdir, mesh):
            base, start = starting_policy(config, runtime, corpus, make_base)
            if workdir.taken:
                writer.announce(f"taken from {shared_phases}: {', '.join(workdir.taken)}")
            final, facts = method.run(Experiment(config, runtime, corpus, start, base))
        phases.end()
        summary = {**facts, **_of_the_run(asked, found, runtime, final), "held_out_rows": corpus.held_out_rows}
        summary["contamination"] = corpus.contamination
        finish(config, method.report, runtime, final, summary)
    hosts.on_first(lambda: outputs.record(root, OUTPUTS))  # now that metrics and TensorBoard files are closed
    return summary


@contextlib.contextmanager
def _writing_behind(workdir: Workdir, mesh: Mesh) -> Iterator[None]:
    """Within, devices go on while arrays are written, except on CPUs, where what is written is no copy. All are on disk
    at the end, also where the run stops or fails; but where one of several processes fails by itself it waits for none:
    the others may be in the middle of a computation."""
    workdir.writes_behind = mesh.devices.flat[0].platform != "cpu"
    try:
        yield
    except (Preempted, NonFinite):
        workdir.settle()
        raise
    except Exception:
        if hosts.count() == 1:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                workdir.settle()
        raise
    workdir.settle()


def _of_the_run(config: Config, found: brought.Brought, runtime: Runtime, final: dict[str, Policy]) -> dict[str, Any]:
    """What the summary of any method holds: what the run took, what it made, and what it was made by."""
    workdir = runtime.workdir
    return {
        "wall_seconds": {name: product.seconds for name, product in workdir.done.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "params_sha256": {arm: params_sha256(policy) for arm, policy in final.items()},
        "compilations": runtime.compilations(),
        "config": config_lib.to_dict(config),
        **({"hub": found.commits} if found.commits else {}),
        "seed": config.seed,
        "versions": workdir.code[-1],
        "earlier_versions": workdir.code[:-1],
    }


def finish(config: Config, shown: Report, runtime: Runtime, final: dict[str, Policy], summary: dict[str, Any]) -> None:
    """Write summary.json, report.png and, if asked for, Hugging Face folders of the last policies; print the table."""
    root, say = runtime.workdir.root, runtime.writer.report
    if hosts.is_first():
        report.write_summary(root / "summary.json", summary, shown)
    say(f"{report.table(summary, shown)}\n\n{report.legend(summary, shown)}\n")
    if config.log.report and hosts.is_first():
        shown.draw(summary, root / "report.png")
        say(f"picture: {root / 'report.png'}")
    if config.log.hf_export:
        for arm, policy in final.items():
            params = merged(runtime.cfg, runtime.params(policy))
            params = fetch(params) if hosts.count() > 1 else params  # of several, each holds them whole for it
            if hosts.is_first():
                out = export(
                    params,
                    runtime.cfg,
                    root / "huggingface" / arm,
                    source=config.model.model_name_or_path or None,
                    tokenizer_dir=root / "tokenizer",
                    overwrite=True,
                    card=card(root, policy.path),
                )
                say(f"Hugging Face checkpoint of {arm}: {out}")
    say(f"summary: {root / 'summary.json'}")


def _shared(folder: str, config: Config, mesh: Mesh) -> SharedPhases:
    return SharedPhases(pathlib.Path(folder), (*START_PHASES, ADDRESSED), _besides_inputs(config, mesh))


def _besides_inputs(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What a trained model's bytes depend on besides the inputs of its phase: how rows are laid out, which is the same
    within a work directory, and the machine, which sets the order of sums."""
    layout = ("share_prompt", "row_multiple", "max_row_shapes")
    attention, usual = config.model.attn_implementation, AUTO  # usual: what folders that do not name it were made by
    if mesh.devices.flat[0].platform == "cpu":
        usual = "xla"
        if attention == AUTO:
            asked = Asked("cpu", config.model.dtype, config.model.head_dim, config.data.row_tokens)
            attention, _ = choose(AUTO, asked)
    return {
        "model": brought.named(config.model),
        "layout": {name: getattr(config.data, name) for name in layout},
        "mesh": dict(mesh.shape),
        "device": mesh.devices.flat[0].device_kind,
        "processor": processor.model(),
        **({} if attention == usual else {"attention": attention}),
        **({"processes": hosts.count()} if hosts.count() > 1 else {}),
        "cores": processor.cores(),
    }


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far (and the device's own peak, where it reports one)."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = jax.local_devices()[0].memory_stats() or {}
    return max(host, int(stats.get("peak_bytes_in_use", 0)))
