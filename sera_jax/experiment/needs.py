"""What a config surely needs of memory, from its numbers alone: refused before anything is read where it cannot fit.

Every need is a lower bound, so that nothing is refused that could run; where a machine does not say what it has,
nothing is.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from sera_jax import memory
from sera_jax.config import Config
from sera_jax.data.stored import pair_counts
from sera_jax.experiment.assembly import precision_of
from sera_jax.experiment.corpus import Corpus
from sera_jax.experiment.start import phases as start_phases
from sera_jax.mesh import row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.families import config_from_hf
from sera_jax.models.folder import read_config
from sera_jax.sampling.engine import check_room

PIECE_BYTES = 48  # what the trainer of a BPE sets aside for each piece: a place in its table and one in its list
MOMENTS = {"adamw": 2, "lion": 1, "adafactor": 0}  # float32 copies of the parameters in the optimiser's state


def check_memory(config: Config, mesh: Mesh) -> None:
    """Raises OutOfMemory, with the fields to lower, for what the devices or the host surely cannot hold."""
    cfg = _least_model(config)
    devices = list(mesh.devices.flat)
    _check_model(config, cfg, memory.device_bytes(devices), mesh.shape["data"])
    _check_cache(config, cfg, devices)
    _check_rows(config, cfg, memory.device_bytes(devices), row_shards(mesh))
    if not (config.model.tokenizer_name_or_path or _folder(config)):
        pieces = config.model.vocab_size
        memory.refuse_beyond(
            memory.host_bytes(),
            pieces * PIECE_BYTES,
            f"config.model.vocab_size={pieces}",
            "a table of pieces of",
            where="the host",
            way_out="lower it",
        )


def batches_in_words(config: Config, corpus: Corpus) -> list[str]:
    """A line for every training that is run and whose batch is larger than its data."""
    pairs = {"train": corpus.train, "reward_model": corpus.reward_pairs}
    counts = {name: (int(pair_counts(entries).sum()), "pairs") for name, entries in pairs.items()}
    if not config.model.sft_model_path:
        counts["sft"] = (len(corpus.demonstrations), "demonstrations")
    if "pretrain" in start_phases(config):
        counts["pretrain"] = (len(corpus.pretrain), "texts")
    sizes = {name: getattr(config, name).batch_size for name in counts}
    return [
        f"config.{name}.batch_size={sizes[name]} is more than the {count} {what} there are: "
        "every update takes all of them"
        for name, (count, what) in counts.items()
        if 0 < count < sizes[name]
    ]


def parameter_count(cfg: ModelConfig) -> int:
    """Of a decoder of this shape, without tracing it; biases and norms beyond Llama's are left out."""
    hidden, tables = cfg.hidden_size, 1 if cfg.tie_word_embeddings else 2
    layer = cfg.layer_parameters + 2 * hidden
    return tables * cfg.vocab_size * hidden + cfg.num_hidden_layers * layer + hidden


def _folder(config: Config) -> str:
    return config.model.model_name_or_path or config.model.sft_model_path


def _least_model(config: Config) -> ModelConfig:
    """The model's shape; from scratch with a vocabulary of one, since its size follows from the data."""
    model = config.model
    if _folder(config):
        return config_from_hf(read_config(pathlib.Path(_folder(config))), **precision_of(model))
    fields = {field.name for field in dataclasses.fields(ModelConfig)} & set(dataclasses.asdict(model))
    return ModelConfig(**{name: getattr(model, name) for name in fields} | {"vocab_size": 1})


def _check_model(config: Config, cfg: ModelConfig, have: int | None, copies: int) -> None:
    """Parameters, and for SFT, where it is run, gradients and optimiser; one copy on each part of `mesh.data`."""
    each, what = jnp.dtype(cfg.param_dtype).itemsize, ""
    if not config.model.sft_model_path and not config.lora.rank and not config.sft.trainable:
        each = 2 * each + 4 * MOMENTS[config.sft.optim]
        what = f" with gradients and the state of {config.sft.optim}"
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    shape = ", ".join(f"{name}={getattr(cfg, name)}" for name in names)
    memory.refuse_beyond(
        have,
        copies * parameter_count(cfg) * each,
        f"config.model.model_name_or_path={_folder(config)!r}" if _folder(config) else f"config.model: {shape}",
        f"{parameter_count(cfg):,} parameters{what}, at least",
        where="the devices",
        way_out="train a smaller model, lower config.mesh.data (a copy on each), or take more devices",
    )


def _check_cache(config: Config, cfg: ModelConfig, devices: Sequence[Any]) -> None:
    """The decode cache of held-out answers, where there are any. What else a method samples, the sampler checks."""
    held_out = config.world.heldout_prompts if config.world.name else config.data.eval or config.data.eval_fraction
    if not held_out or config.eval.num_prompts < 0:
        return
    slots, group = config.sampling.slots, "eval" if config.eval.max_new_tokens else "sampling"
    new = config.eval.max_new_tokens or config.sampling.max_new_tokens
    check_room(
        cfg,
        new,
        slots=slots,
        longest=1,
        devices=devices,
        fields=f"config.sampling.slots={slots} and config.{group}.max_new_tokens={new}",
        way_out="lower them",
    )


def _check_rows(config: Config, cfg: ModelConfig, have: int | None, shards: int) -> None:
    """The inputs of the layers of one row on each part of the mesh; and the rows of an update on the host."""
    tokens, size = config.data.row_tokens, jnp.dtype(cfg.dtype).itemsize
    memory.refuse_beyond(
        have,
        shards * tokens * cfg.hidden_size * cfg.num_hidden_layers * size,
        f"config.data.row_tokens={tokens}",
        "activations of a single row of",
        where="the devices",
        way_out="lower it",
    )
    parts, multiple = max(1, config.train.gradient_accumulation_steps), config.data.row_multiple
    memory.refuse_beyond(
        memory.host_bytes(),
        parts * multiple * tokens * 8,
        f"config.train.gradient_accumulation_steps={parts}, config.data.row_multiple={multiple} and "
        f"config.data.row_tokens={tokens}",
        f"an update of {parts * multiple} rows or more, at least",
        where="the host",
        way_out="lower one of them",
    )
