"""Self-Rewarding PPO on grade-school mathematics (GSM8K), from scratch, within an hour on two CPU cores.

A BPE of 4096 pieces and a model of about 2.4 M parameters are trained on the questions and answers of the training rows
(the base), then SFT on the answers, then PPO on the same questions with the coherent reward. The data:
https://github.com/openai/grade-school-math (MIT), as JSONL rows `prompt/response`:

    python -m sera_jax.main --config=configs/gsm8k_small.py \\
        --config.data.demonstrations=gsm8k_train.jsonl.gz --config.data.eval=gsm8k_test.jsonl.gz

A model of this size does not learn to calculate: expect next to no right answers. What the run shows on real text is
the likelihood of held-out answers, their form (`wellformed_fraction`: a number after `####`) and what PPO does to
their length.

Lengths are cut for the CPU: 99 % of the questions have at most 160 tokens, 96 % of the answers at most 192; what is
longer is cut and counted when the rows are read.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    c: Any = base()
    c.method = "srppo"
    c.workdir = "runs/gsm8k_small"

    c.model.vocab_size = 4096
    c.model.hidden_size = 192
    c.model.intermediate_size = 512
    c.model.num_hidden_layers = 4
    c.model.num_attention_heads = 6
    c.model.num_key_value_heads = 2
    c.model.head_dim = 32
    c.model.max_position_embeddings = 512
    c.model.tie_word_embeddings = True

    c.data.demonstrations = "gsm8k_train.jsonl.gz"
    c.data.eval = "gsm8k_test.jsonl.gz"
    c.data.pretrain = ""  # the whole texts of the demonstrations, questions included
    c.data.row_tokens = 384
    c.data.max_prompt_length = 160  # 99 % of the questions
    c.data.max_completion_length = 192  # 96 % of the answers
    c.data.max_row_shapes = 2

    c.pretrain.batch_size = 32
    c.pretrain.learning_rate = 2e-3
    c.pretrain.max_steps = 400

    c.sft.batch_size = 32
    c.sft.learning_rate = 5e-4
    c.sft.max_steps = 60

    c.sampling.temperature = 1.0  # rollouts come from the distribution that is scored
    c.sampling.min_new_tokens = 0  # likewise
    c.sampling.max_new_tokens = 192
    c.sampling.slots = 64

    c.train.batch_size = 64  # responses of an iteration
    c.train.learning_rate = 1e-4

    c.ppo.arms = ("srppo", "sft_longer", "best_of_n")
    c.ppo.iterations = 30
    c.ppo.eval_iterations = 10
    c.ppo.prompt_overlap = 1.0
    c.ppo.kl_coef = 0.2
    c.ppo.lam = 1.0  # the reward comes at the end of 100 tokens: with 0.95 answers get shorter for no reason of it
    c.ppo.critic_warmup_iterations = 3
    c.ppo.critic_learning_rate = 5e-4
    c.ppo.best_of = 4
    c.ppo.sft_longer_factor = 2

    c.eval.max_pairs = 256
    c.eval.num_prompts = 128
    c.eval.temperature = 1.0
    c.eval.answer_pattern = r"####\s*(-?[\d,]+)"
    return c
