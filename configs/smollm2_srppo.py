"""Self-Rewarding PPO from a real chat model, SmolLM2-135M-Instruct, on two CPU cores.

The model and the rows are those of configs/smollm2_sera.py, the preferred answers being the demonstrations (each row
has its preferred answer as `response`, too). The chat model is the base here: SFT on about 100 demonstrations makes the
SFT model. Half of PPO's prompts are those of the demonstrations, half the others of the file.

    python -m sera_jax.main --config=configs/smollm2_srppo.py
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    c: Any = base()
    c.method = "srppo"
    c.workdir = "runs/smollm2_srppo"

    c.model.model_name_or_path = "models/SmolLM2-135M-Instruct"

    c.data.demonstrations = "runs/data/polite_pairs.jsonl=0.2"
    c.data.prompts = "runs/data/polite_pairs.jsonl"  # those that no demonstration has
    c.data.eval_fraction = 0.5
    c.data.row_tokens = 512
    c.data.max_prompt_length = 64  # the longest has 61 tokens
    c.data.max_completion_length = 64  # likewise
    c.data.max_row_shapes = 1

    c.sft.batch_size = 16
    c.sft.learning_rate = 2e-5
    c.sft.num_train_epochs = 2

    c.sampling.temperature = 1.0  # rollouts come from the distribution that is scored
    c.sampling.min_new_tokens = 0  # likewise
    c.sampling.max_new_tokens = 64
    c.sampling.slots = 64

    c.train.batch_size = 32  # responses of an iteration
    c.train.learning_rate = 2e-6

    c.ppo.arms = ("srppo", "sft_longer", "best_of_n")
    c.ppo.iterations = 8
    c.ppo.num_mini_batches = 2
    c.ppo.prompt_overlap = 0.5
    c.ppo.kl_coef = 0.2
    c.ppo.critic_learning_rate = 1e-5
    c.ppo.critic_warmup_iterations = 2
    c.ppo.best_of = 4

    c.eval.gold = "chrf"
    c.eval.temperature = 1.0
    c.eval.temperatures = (0.0, 0.5, 1.0)

    c.log.logging_steps = 2
    return c
