"""SeRA with DPO on Llama-2-7B shapes: 64 pairs of 2 x 2048 tokens a step, rows of 4096.

Name the weights and the rows on the command line:

    python -m sera_jax.main --config=configs/llama_dpo.py --config.workdir=runs/llama_dpo \\
        --config.model.model_name_or_path=models/Llama-2-7b-hf --config.data.train=rows/ultrafeedback.jsonl

Without `model_name_or_path` the same shape starts from scratch, which serves to compile and to measure. All parameters,
gradients and moments are split over `mesh.fsdp`; the compute dtype is bfloat16, parameters, log-probs and sums are
float32.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    c: Any = base()
    c.workdir = "runs/llama_dpo"
    m = c.model
    m.tokenizer_name_or_path = ""
    m.vocab_size, m.hidden_size, m.intermediate_size, m.num_hidden_layers = 32000, 4096, 11008, 32
    m.num_attention_heads, m.num_key_value_heads, m.head_dim = 32, 32, 128
    m.max_position_embeddings, m.tie_word_embeddings = 4096, False
    m.dtype, m.remat = "bfloat16", "full"
    c.data.row_tokens, c.data.max_prompt_length, c.data.max_completion_length = 4096, 1024, 1024
    c.data.train = "ultrafeedback.jsonl"
    c.loss.name = "dpo"
    c.sampling.max_new_tokens, c.sampling.slots = 1024, 256
    for group in (c.sft, c.train):
        group.batch_size, group.gradient_accumulation_steps = 64, 4
        group.logits_chunk_tokens = 2048
    c.sft.learning_rate, c.train.learning_rate = 2e-5, 5e-7
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1
    return c
