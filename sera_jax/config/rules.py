"""The rules that join fields whatever the method; those of one method stand with it, in `experiment.methods`."""

from __future__ import annotations

import re

from sera_jax.config.groups import Config


def check_together(config: Config) -> None:
    """Raises ValueError, with the way out, where fields contradict each other."""
    if not config.workdir:
        raise ValueError(
            "config.workdir is empty; give a folder for checkpoints and results: --config.workdir=runs/NAME"
        )
    _check_folders(config)
    _check_lengths(config)
    _check_chunks(config)
    _check_parts(config)
    _check_pattern(config.eval.answer_pattern)
    _check_temperatures(config.eval.temperatures)
    if config.eval.gold and config.world.name:
        raise ValueError(
            f"config.eval.gold={config.eval.gold!r} and config.world.name={config.world.name!r}: the embedded world "
            "has a gold reward of its own; empty one of them"
        )
    if config.world.heldout_tasks and not config.world.name:
        raise ValueError(
            f"config.world.heldout_tasks={config.world.heldout_tasks!r} is not read without config.world.name, as real "
            "rows have no tasks; empty it, or name a world"
        )


def _check_folders(config: Config) -> None:
    """Folders are of a file system: an address would be made one of, by the name of its scheme."""
    fields = {f"model.{name}": getattr(config.model, name) for name in _MODEL_FOLDERS} | {"workdir": config.workdir}
    for name, folder in fields.items():
        if "://" in folder:
            raise ValueError(
                f"config.{name}={folder} is an address and no folder; mount the bucket (gcsfuse, say) on every host "
                "and give the folder where it lies"
            )


_MODEL_FOLDERS = ("model_name_or_path", "sft_model_path", "tokenizer_name_or_path")


def _check_lengths(config: Config) -> None:
    sampling, data = config.sampling, config.data
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise ValueError(
            f"config.sampling.min_new_tokens={sampling.min_new_tokens} exceeds max_new_tokens={sampling.max_new_tokens}"
        )
    if data.max_prompt_length >= data.row_tokens:
        raise ValueError(
            f"config.data.max_prompt_length={data.max_prompt_length} leaves no room for a response in rows of "
            f"config.data.row_tokens={data.row_tokens}; raise row_tokens or lower max_prompt_length"
        )


def _check_chunks(config: Config) -> None:
    asked = config.train.logits_chunk_tokens
    for name in ("pretrain", "sft", "reward_model"):
        value = getattr(config, name).logits_chunk_tokens
        if value not in (0, asked):
            raise ValueError(
                f"config.{name}.logits_chunk_tokens={value} is not read: every phase takes that of train, "
                f"config.train.logits_chunk_tokens={asked}; set that one"
            )


def _check_parts(config: Config) -> None:
    for name in ("pretrain", "sft", "train", "reward_model"):
        patterns = getattr(config, name).trainable
        if patterns and config.lora.rank and name != "pretrain":
            raise ValueError(
                f"config.lora.rank={config.lora.rank} and config.{name}.trainable={patterns!r}: adapters are trained "
                "in place of parameters of the model; set rank to 0, or empty trainable"
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"config.{name}.trainable={pattern!r} is no regular expression: {error}") from error
    if config.lora.dropout >= 1:
        raise ValueError(f"config.lora.dropout={config.lora.dropout} drops everything; give a share below 1")
    if not config.lora.target_modules:
        raise ValueError("config.lora.target_modules is empty; give all-linear, or names such as q_proj")


def _check_temperatures(asked: tuple[float, ...]) -> None:
    if min(asked, default=0.0) < 0 or len({f"{t:g}" for t in asked}) != len(asked):
        raise ValueError(f"config.eval.temperatures={asked!r}; give each of them once, and none below 0")


def _check_pattern(pattern: str) -> None:
    if not pattern:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"config.eval.answer_pattern={pattern!r} is no regular expression: {error}") from error
    if groups != 1:
        raise ValueError(
            f"config.eval.answer_pattern={pattern!r} has {groups} groups; mark the answer with exactly one"
        )
