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

    c.model.vocab_size = 4096
    c.model.hidden_size = 192
    c.model.intermediate_size = 512
    c.model.num_hidden_layers = 6
    c.model.num_attention_heads = 6
    c.model.num_key_value_heads = 2
    c.model.head_dim = 32
    c.model.max_position_embeddings = 512
    c.model.tie_word_embeddings = True

    c.data.train = "helpful-online.jsonl.gz,helpful-rejection-sampled.jsonl.gz"
    c.data.eval = "helpful-base.jsonl.gz"
    c.data.chat_template = "hh"
    c.data.row_tokens = 256  # holds every pair: 128 + 2 x 64
    c.data.max_prompt_length = 128
    c.data.max_completion_length = 64
    c.data.max_row_shapes = 2

    c.pretrain.batch_size = 64
    c.pretrain.learning_rate = 2e-3
    c.pretrain.max_steps = 150

    c.sft.batch_size = 64
    c.sft.learning_rate = 5e-4
    c.sft.max_steps = 30

    c.train.batch_size = 64
    c.train.learning_rate = 5e-5
    c.train.max_steps = 20

    c.loss.name = "dpo"

    c.sera.arms = ("daa", "sera")
    c.sera.rounds = 3
    c.sera.bootstrap_prompts = 1000
    c.sera.bootstrap_fraction = 0.15  # 569 of the pairs made: the margin filter refuses the rest
    c.sera.require_eos = False  # answers that the limit cut make pairs too

    c.sampling.max_new_tokens = 64
    c.sampling.slots = 64

    c.eval.max_pairs = 1000
    c.eval.num_prompts = 64
    return c
