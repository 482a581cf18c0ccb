"""SeRA with DPO on Llama-2-7B shapes: 64 pairs a step, of at most 1024 + 2 x 1024 tokens, in rows of 3072.

Name the weights and the rows on the command line:

    python -m sera_jax.main --config=configs/llama_dpo.py --config.workdir=runs/llama_dpo \\
        --config.model.model_name_or_path=models/Llama-2-7b-hf --config.data.train=rows/ultrafeedback.jsonl

Without `model_name_or_path` the same shape starts from scratch, which serves to compile and to measure. All parameters,
gradients and moments are split over `mesh.fsdp`; the compute dtype is bfloat16, parameters, log-probs and sums are
float32. Every phase fits 16 chips of v5e (docs/preflight.md):

    python -m sera_jax.preflight --config=configs/llama_dpo.py --topology=v5e:4x4
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    c: Any = base()
    c.workdir = "runs/llama_dpo"

    c.model.tokenizer_name_or_path = ""
    c.model.vocab_size = 32000
    c.model.hidden_size = 4096
    c.model.intermediate_size = 11008
    c.model.num_hidden_layers = 32
    c.model.num_attention_heads = 32
    c.model.num_key_value_heads = 32
    c.model.head_dim = 128
    c.model.max_position_embeddings = 4096
    c.model.tie_word_embeddings = False
    c.model.dtype = "bfloat16"
    c.model.remat = "full"

    c.data.train = "ultrafeedback.jsonl"
    c.data.row_tokens = 3072  # holds every pair, its prompt laid once; 4096 with data.share_prompt=False
    c.data.row_multiple = 16  # chips of the smallest pod that it is meant for, so that no row is filling
    c.data.max_prompt_length = 1024
    c.data.max_completion_length = 1024

    c.loss.name = "dpo"

    c.sampling.max_new_tokens = 1024
    c.sampling.slots = 128  # a slot of 2048 tokens takes 1 GiB, of all devices together

    c.sft.batch_size = 64
    c.sft.learning_rate = 2e-5

    c.train.batch_size = 64
    c.train.logits_chunk_tokens = 512
    c.train.learning_rate = 5e-7

    c.mesh.data = 1
    c.mesh.fsdp = -1  # all devices
    c.mesh.tensor = 1
    return c
