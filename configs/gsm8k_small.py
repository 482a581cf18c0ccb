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
    c.workdir, c.method = "runs/gsm8k_small", "srppo"
    m = c.model
    m.vocab_size, m.hidden_size, m.intermediate_size, m.num_hidden_layers = 4096, 192, 512, 4
    m.num_attention_heads, m.num_key_value_heads, m.head_dim = 6, 2, 32
    m.max_position_embeddings, m.tie_word_embeddings = 512, True
    d = c.data
    d.demonstrations, d.eval = "gsm8k_train.jsonl.gz", "gsm8k_test.jsonl.gz"
    d.pretrain = ""  # the whole texts of the demonstrations, questions included
    d.row_tokens, d.max_prompt_length, d.max_completion_length, d.max_row_shapes = 384, 160, 192, 2
    c.sampling.temperature, c.sampling.min_new_tokens = 1.0, 0
    c.sampling.max_new_tokens, c.sampling.slots = 192, 64
    c.pretrain.max_steps, c.pretrain.batch_size, c.pretrain.learning_rate = 400, 32, 2e-3
    c.sft.max_steps, c.sft.batch_size, c.sft.learning_rate = 60, 32, 5e-4
    c.train.batch_size, c.train.learning_rate = 64, 1e-4
    p = c.ppo
    p.arms = ("srppo", "sft_longer", "best_of_n")
    p.iterations, p.eval_iterations, p.prompt_overlap, p.kl_coef = 30, 10, 1.0, 0.2
    p.critic_warmup_iterations, p.critic_learning_rate = 3, 5e-4
    p.best_of, p.sft_longer_factor = 4, 2
    c.eval.max_pairs, c.eval.num_prompts, c.eval.temperature = 256, 128, 1.0
    c.eval.answer_pattern = r"####\s*(-?[\d,]+)"
    return c
