"""Self-Rewarding PPO in a made-up world with a known gold reward, in some minutes on two CPU cores.

    python -m sera_jax.main --config=configs/quickstart_srppo.py

The base and the SFT model are those of configs/quickstart.py: a model trained from scratch on the world's text, then
SFT on 200 demonstrations. From that SFT model: PPO with the coherent reward (`srppo`), mostly on prompts that no
demonstration has; and what it is to be compared with: more of the same SFT (`sft_longer`), as much SFT as PPO costs
(`sft_equal_compute`), the best of eight answers by the same reward (`best_of_n`), PPO with noise for a reward
(`random_reward`), and PPO without a critic (`reinforce`).

Learning rate and KL coefficient come from {1e-4, 3e-4} x {0.1, 0.2, 0.5, 1} (without 3e-4 at 0.1) on seeds 101 and 102
of the world `habits`: the point with the highest gold reward of `srppo`. With a coefficient of 0.05 and a rate of 1e-3
the reward rises while gold falls. The critic's rate and warm-up changed the gold by less than 0.01, and what it
explains by more.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    c: Any = base()
    c.method = "srppo"
    c.workdir = "runs/quickstart_srppo"

    c.world.name = "wrong_habits"
    c.world.pretrain = 16000
    c.world.prompts = 2000
    c.world.preferences = 0  # the method needs none
    c.world.heldout_preferences = 300  # what is held out is that of configs/quickstart.py, and so is the base
    c.world.heldout_prompts = 400
    c.world.heldout_demonstrations = 400

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

    c.pretrain.batch_size = 64
    c.pretrain.learning_rate = 5e-3
    c.pretrain.max_steps = 1000

    c.sft.batch_size = 32
    c.sft.learning_rate = 6e-4
    c.sft.max_steps = 40

    c.sampling.temperature = 1.0  # rollouts come from the distribution that is scored
    c.sampling.min_new_tokens = 0  # likewise
    c.sampling.max_new_tokens = 32
    c.sampling.slots = 128

    c.train.batch_size = 128  # responses of an iteration
    c.train.learning_rate = 1e-4  # with kl_coef, from the grid above

    c.ppo.arms = ("srppo", "sft_longer", "best_of_n", "random_reward", "reinforce", "sft_equal_compute")
    c.ppo.iterations = 60
    c.ppo.eval_iterations = 20
    c.ppo.prompt_overlap = 0.1
    c.ppo.kl_coef = 0.2
    c.ppo.critic_warmup_iterations = 5
    c.ppo.critic_learning_rate = 1e-3  # with the warm-up, makes the critic explain more; gold hardly moves

    c.reward_model.batch_size = 32  # of the arm ppo_reward_model, which is not among these and needs world.preferences
    c.reward_model.num_train_epochs = 3
    c.reward_model.learning_rate = 1e-3

    c.eval.num_prompts = 400  # all of the world's
    c.eval.temperature = 1.0
    c.eval.temperatures = (0.0, 0.5, 1.0)  # a gain at 1 alone may be mere sharpening

    c.log.logging_steps = 5
    return c
