"""SeRA in a made-up world with a known gold reward, in a few minutes on two CPU cores.

    python -m sera_jax.main --config=configs/quickstart.py            20 % of the labels flipped
    python -m sera_jax.main --config=configs/quickstart.py:noise40    40 %
    python -m sera_jax.main --config=configs/quickstart.py:clean      none

A base model is trained from scratch on the world's text, then SFT on 200 demonstrations, then from that SFT model: DPO
alone (`daa`), SeRA (`sera`), and SeRA with random choices of the same size (`random`), each for as many updates.

Learning rate and epochs of the rounds, the same for all arms, come from the grid {1e-4, 3e-4, 1e-3} x {1, 3} on
seeds 101 and 102 at 20 % flips: the point with the highest gold reward averaged over `daa` and `sera`.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base

LABEL_NOISE = {"": 0.2, "noise40": 0.4, "clean": 0.0}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in LABEL_NOISE:
        raise ValueError(f"configs/quickstart.py:{variant} is not a variant; choose one of :noise40, :clean, or none")
    c: Any = base()
    c.workdir = f"runs/quickstart{'_' if variant else ''}{variant}"
    w = c.world
    w.name, w.pretrain, w.heldout_preferences, w.heldout_prompts = "habits", 16000, 300, 400
    m = c.model
    m.hidden_size, m.intermediate_size, m.num_hidden_layers = 64, 176, 3
    m.num_attention_heads, m.num_key_value_heads, m.head_dim = 4, 4, 16
    m.max_position_embeddings, m.rope_theta = 128, 1000.0
    m.initializer_range = 0.1  # a model this small learns to copy words only from a wide start
    d = c.data
    d.row_tokens, d.max_prompt_length, d.max_completion_length, d.max_row_shapes = 128, 32, 40, 2
    d.label_noise = LABEL_NOISE[variant]
    c.pretrain.batch_size, c.pretrain.learning_rate, c.pretrain.max_steps = 64, 5e-3, 1000
    c.sft.batch_size, c.sft.learning_rate, c.sft.max_steps = 32, 6e-4, 40
    c.train.batch_size, c.train.learning_rate, c.train.num_train_epochs = 32, 3e-4, 3
    c.sera.arms, c.sera.rounds = ("daa", "sera", "random"), 3
    c.sampling.max_new_tokens, c.sampling.slots = 32, 128
    c.eval.num_prompts, c.eval.temperature = 400, 1.0
    c.log.logging_steps = 5
    return c
