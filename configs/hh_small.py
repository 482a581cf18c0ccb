"""SeRA with DPO on real dialogues (Anthropic HH), from scratch, within an hour on two CPU cores.

A BPE of 4096 pieces and a model of about 4 M parameters are trained on the dialogues of the preference rows, then SFT
on the chosen responses, then three rounds of SeRA. The data: https://github.com/anthropics/hh-rlhf (MIT), as JSONL rows
`prompt/chosen/rejected`, or as its own `chosen/rejected` transcripts:

    python -m sera_jax.main --config=configs/hh_small.py \\
        --config.data.train=helpful-online.jsonl.gz,helpful-rejection-sampled.jsonl.gz \\
        --config.data.eval=helpful-base.jsonl.gz

Lengths are cut for the CPU: prompts to their last 128 tokens, responses to 64, so every pair fits a row of 256. Each
round trains on 20 x 64 = 1280 pairs, and samples 4 answers of at most 64 tokens to 1000 prompts.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    c: Any = base()
    c.workdir = "runs/hh_small"
    m = c.model
    m.vocab_size, m.hidden_size, m.intermediate_size, m.num_hidden_layers = 4096, 192, 512, 6
    m.num_attention_heads, m.num_key_value_heads, m.head_dim = 6, 2, 32
    m.max_position_embeddings, m.tie_word_embeddings = 512, True
    d = c.data
    d.train, d.eval = "helpful-online.jsonl.gz,helpful-rejection-sampled.jsonl.gz", "helpful-base.jsonl.gz"
    d.chat_template = "hh"
    d.row_tokens, d.max_prompt_length, d.max_completion_length, d.max_row_shapes = 256, 128, 64, 2
    c.loss.name = "dpo"
    s = c.sera
    s.arms, s.rounds, s.bootstrap_prompts, s.require_eos = ("daa", "sera"), 3, 1000, False
    c.sampling.max_new_tokens, c.sampling.slots = 64, 64
    c.pretrain.max_steps, c.pretrain.batch_size, c.pretrain.learning_rate = 150, 64, 2e-3
    c.sft.max_steps, c.sft.batch_size, c.sft.learning_rate = 30, 64, 5e-4
    c.train.max_steps, c.train.batch_size, c.train.learning_rate = 20, 64, 5e-5
    c.eval.max_pairs, c.eval.num_prompts = 1000, 64
    return c
