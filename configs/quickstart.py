"""SeRA in a made-up world with a known gold reward, in a few minutes on two CPU cores.

    python -m sera_jax.main --config=configs/quickstart.py            # 40 % of the labels flipped
    python -m sera_jax.main --config=configs/quickstart.py:noise20    # 20 %
    python -m sera_jax.main --config=configs/quickstart.py:clean      # none

A base model is trained from scratch on the world's text, then SFT on 200 demonstrations, then from that SFT model: DPO
alone (`daa`), SeRA as published (`sera`), and SeRA as we recommend it (`sera_recommended`), each for as many updates.

The regime is the paper's: noisy labels, and one epoch a round. How each arm does at other rates, epochs and shares of
flipped labels, over seeds that are not this one, is what studies/embedded_*.py measure. Held-out prompts are
answered greedily, since a gain at temperature 1 may be mere confidence.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base

LABEL_NOISE = {"": 0.4, "noise20": 0.2, "clean": 0.0}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in LABEL_NOISE:
        raise ValueError(f"configs/quickstart.py:{variant} is not a variant; choose one of :noise20, :clean, or none")
    c: Any = base()
    c.workdir = f"runs/quickstart{'_' if variant else ''}{variant}"

    c.world.name = "wrong_habits"
    c.world.pretrain = 16000
    c.world.heldout_preferences = 300
    c.world.heldout_prompts = 400

    c.model.hidden_size = 64
    c.model.intermediate_size = 176
    c.model.num_hidden_layers = 3
    c.model.num_attention_heads = 4
    c.model.num_key_value_heads = 4
    c.model.head_dim = 16
    c.model.max_position_embeddings = 128
    c.model.rope_theta = 1000.0
    c.model.initializer_range = 0.1  # a model this small learns to copy words only from a wide start

    c.data.row_tokens = 128
    c.data.max_prompt_length = 32
    c.data.max_completion_length = 40
    c.data.max_row_shapes = 2
    c.data.label_noise = LABEL_NOISE[variant]

    c.pretrain.batch_size = 64
    c.pretrain.learning_rate = 5e-3
    c.pretrain.max_steps = 1000

    c.sft.batch_size = 32
    c.sft.learning_rate = 6e-4
    c.sft.max_steps = 40

    c.train.batch_size = 32
    c.train.learning_rate = 3e-4
    c.train.num_train_epochs = 1

    c.sera.arms = ("daa", "sera", "sera_recommended")
    c.sera.rounds = 3

    c.sampling.max_new_tokens = 32
    c.sampling.slots = 128

    c.eval.num_prompts = 400  # all of the world's
    c.eval.temperature = 0.0
    c.eval.temperatures = (0.0, 0.5, 1.0)

    c.log.logging_steps = 5
    return c
