"""Self-Rewarding PPO on Llama-3-8B shapes: 256 responses of up to 1024 tokens an iteration, rows of 4096.

Name the base, the demonstrations and prompts without answers on the command line:

    python -m sera_jax.main --config=configs/llama_srppo.py --config.workdir=runs/llama_srppo \\
        --config.model.model_name_or_path=models/Meta-Llama-3-8B \\
        --config.data.demonstrations=rows/tulu3_sft.jsonl --config.data.prompts=rows/ultrachat_prompts.jsonl

SFT is run first; an SFT model of one's own is named in `config.model.sft_model_path`. Without `model_name_or_path` the
same shape starts from scratch, which serves to compile and to measure.

Four models are in memory during PPO, all split over `mesh.fsdp`. Bytes per parameter, with AdamW and float32
parameters: policy 16 (parameters, gradient, two moments), critic 16 (as much, but no vocabulary), SFT model 4, base
4, and, while answers are sampled, 2 for a copy of the policy in bfloat16. For 8 B parameters that is about 330 GB
before activations: 32 chips of 16 GB, 16 of 32 GB or 8 of 80 GB at the least. The cache of 256 answers of 2048 tokens
takes another 69 GB while sampling (`sampling.slots` sets how many are drawn at a time). What makes it less:
`ppo.critic="head"` (a value head on the policy in place of the critic: 16 less) and `train.optim="lion"` (one moment:
4 less for each trained model).

Rows come in multiples of chips x `gradient_accumulation_steps`. A minibatch of 64 answers fills at most 32 rows, and
far fewer where answers are short: on few chips accumulate, on many raise `train.batch_size` with them, or most rows
are filling (`rollout/padding_fraction`). Each evaluation saves a policy and the whole training state, about 190 GB.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    c: Any = base()
    c.workdir, c.method = "runs/llama_srppo", "srppo"
    m = c.model
    m.vocab_size, m.hidden_size, m.intermediate_size, m.num_hidden_layers = 128256, 4096, 14336, 32
    m.num_attention_heads, m.num_key_value_heads, m.head_dim = 32, 8, 128
    m.max_position_embeddings, m.rope_theta, m.tie_word_embeddings = 8192, 500000.0, False
    m.dtype, m.remat = "bfloat16", "full"
    d = c.data
    d.row_tokens, d.max_prompt_length, d.max_completion_length = 4096, 1024, 1024
    d.demonstrations, d.prompts = "demonstrations.jsonl", "prompts.jsonl"
    c.sampling.temperature, c.sampling.min_new_tokens = 1.0, 0  # rollouts come from the distribution that is scored
    c.sampling.max_new_tokens, c.sampling.slots = 1024, 256
    c.sft.batch_size, c.sft.learning_rate, c.sft.num_train_epochs = 128, 1e-5, 2
    c.train.batch_size, c.train.learning_rate = 256, 1e-6
    c.train.save_steps = 10
    for group in (c.sft, c.train):  # as compiled for TPUs, whose memory takes more at a time than the defaults
        group.gradient_accumulation_steps, group.logits_chunk_tokens = 1, 2048
    p = c.ppo
    p.arms = ("srppo", "sft_longer", "best_of_n")
    p.iterations, p.eval_iterations, p.prompt_overlap = 200, 50, 0.5
    p.critic_learning_rate, p.critic_warmup_iterations = 5e-6, 10
    c.eval.max_pairs, c.eval.num_prompts, c.eval.temperature = 512, 256, 1.0
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1
    return c
