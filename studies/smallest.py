"""The smallest study, to see what one is: models too small to learn much, two arms, two seeds.

python -m sera_jax.study --config=studies/smallest.py
"""

from sera_jax.studies.plan import Study

SMALL = {
    "world.pretrain": 300,
    "world.demonstrations": 32,
    "world.preferences": 64,
    "world.heldout_preferences": 30,
    "world.heldout_prompts": 16,
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "pretrain.max_steps": 20,
    "sft.max_steps": 5,
    "train.max_steps": 4,
    "train.batch_size": 16,
    "data.max_row_shapes": 1,
    "log.tensorboard": False,
    "log.report": False,
}


def get_config() -> Study:
    return Study(
        base="configs/quickstart.py",
        overrides={**SMALL, "sera.arms": ("daa", "sera"), "sera.rounds": 2, "eval.temperatures": (0.0,)},
        seeds=range(2),
        metrics=("gold_mean", "gold_by_temperature/0"),
        baseline="daa",
    )
