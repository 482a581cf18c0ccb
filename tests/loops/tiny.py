"""The smallest run that has every phase: the embedded world, a few thousand parameters, four updates a round."""

from typing import Any

from configs.base import get_config
from sera_jax.config import Config, parse

PAIRS, BATCH = 64, 16
TINY: dict[str, Any] = {
    "world.name": "habits",
    "world.pretrain": 300,
    "world.demonstrations": 32,
    "world.preferences": PAIRS,
    "world.heldout_preferences": 30,
    "world.heldout_prompts": 16,
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.head_dim": 8,
    "model.max_position_embeddings": 128,
    "data.row_tokens": 128,
    "data.max_prompt_length": 32,
    "data.max_completion_length": 40,
    "data.max_row_shapes": 1,
    "data.label_noise": 0.25,
    "pretrain.batch_size": 32,
    "pretrain.learning_rate": 1e-2,
    "sft.batch_size": 16,
    "sft.learning_rate": 3e-3,
    "train.batch_size": BATCH,
    "train.learning_rate": 1e-3,
    "sampling.temperature": 1.0,
    "sampling.max_new_tokens": 16,
    "sampling.slots": 32,
    "sera.require_eos": False,
    "log.tensorboard": False,
    "log.report": False,
    "log.logging_steps": 1,
}


def tiny_config(workdir: Any, **changes: Any) -> Config:
    """The parsed config; `changes` are full field names with `__` for the dot."""
    raw = get_config()
    fields = {name.replace("__", "."): value for name, value in changes.items()}
    raw.update_from_flattened_dict({**TINY, "workdir": str(workdir), **fields})
    return parse(raw)


def tiny_flags(workdir: Any, **changes: Any) -> list[str]:
    """The same as command-line flags."""
    fields = {**TINY, "workdir": str(workdir), **{name.replace("__", "."): value for name, value in changes.items()}}
    return ["--config=configs/base.py", *(f"--config.{name}={value}" for name, value in fields.items())]
