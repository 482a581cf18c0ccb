"""The smallest runs that have every phase: the embedded world, a few thousand parameters, four updates a round of SeRA,
four iterations of Self-Rewarding PPO."""

import contextlib
from typing import Any

import jax

from configs.base import get_config
from sera_jax.checkpoint import Workdir
from sera_jax.config import Config
from sera_jax.data.packing import Layout
from sera_jax.experiment.methods import parse
from sera_jax.loops.runtime import Runtime
from sera_jax.mesh import make_mesh
from sera_jax.writer import MetricWriter

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
TINY_SRPPO: dict[str, Any] = {
    **TINY,
    "method": "srppo",
    "world.preferences": 0,
    "world.heldout_preferences": 0,
    "world.heldout_demonstrations": 16,
    "data.label_noise": 0.0,
    "train.batch_size": BATCH,
    "ppo.arms": ("srppo",),
    "ppo.iterations": 4,
    "ppo.eval_iterations": 2,
    "ppo.num_mini_batches": 2,
    "sampling.min_new_tokens": 0,
    "eval.temperature": 1.0,
    "log.rollout_iterations": 2,
}


@contextlib.contextmanager
def one_device_runtime(workdir: Any, cfg: Any, **others: Any):
    """A Runtime of one device, seed 0 and the end id 2, in a work directory of its own; `others`: of its fields."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with MetricWriter(workdir, tensorboard=False) as writer, jax.set_mesh(mesh):
        fields = {"seed": 0, "layout": Layout(16), "chunk_tokens": 0, "stop_ids": (2,)} | others
        yield Runtime(cfg=cfg, mesh=mesh, workdir=Workdir(workdir, {}), writer=writer, **fields)


def tiny_config(workdir: Any, *, tiny: dict[str, Any] = TINY, **changes: Any) -> Config:
    """The parsed config; `changes` are full field names with `__` for the dot."""
    raw = get_config()
    raw.update_from_flattened_dict(_fields(workdir, tiny, changes))
    return parse(raw)


def tiny_srppo(workdir: Any, **changes: Any) -> Config:
    """The same for Self-Rewarding PPO."""
    return tiny_config(workdir, tiny=TINY_SRPPO, **changes)


def tiny_flags(workdir: Any, *, tiny: dict[str, Any] = TINY, **changes: Any) -> list[str]:
    """The fields as command-line flags."""
    fields = _fields(workdir, tiny, changes)
    values = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return ["--config=configs/base.py", *(f"--config.{name}={value}" for name, value in values.items())]


def _fields(workdir: Any, tiny: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "workdir": str(workdir), **{name.replace("__", "."): value for name, value in changes.items()}}
