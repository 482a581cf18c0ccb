"""SeRA with DPO on TinyLlama-1.1B: SFT on UltraChat-200k, then three rounds on UltraFeedback.

    python -m sera_jax.main --config=configs/tinyllama_sera.py

Model and rows come from the hub; folders and files do as well. An SFT model of one's own saves the SFT:

    python -m sera_jax.main --config=configs/tinyllama_sera.py \\
        --config.model.model_name_or_path=models/sft --config.model.sft_model_path=models/sft

Of the paper (Ko et al. 2025): the model, UltraChat-200k for SFT, UltraFeedback, three rounds, selection of the largest
margins, one pair of each prompt by the ensemble of two rounds' rewards, the SFT model as reference. Its other values
could not be obtained: they, and all defaults, are our choice.

It fits 8 chips of v5e, and by preflight's estimate one H100 (docs/models.md, with expected hours):

    python -m sera_jax.preflight --config=configs/tinyllama_sera.py --topology=v5e:2x4
"""

from typing import Any

from ml_collections import ConfigDict

from configs.base import get_config as base

CHIPS = 8  # that it is meant for


def get_config() -> ConfigDict:
    c: Any = base()
    c.workdir = "runs/tinyllama_sera"

    c.model.model_name_or_path = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"

    c.data.demonstrations = "hub:HuggingFaceH4/ultrachat_200k:train_sft"
    c.data.train = "hub:HuggingFaceH4/ultrafeedback_binarized:train_prefs"
    c.data.eval = "hub:HuggingFaceH4/ultrafeedback_binarized:test_prefs"
    c.data.chat_template = "hh"  # the base has none of its own
    c.data.row_tokens = 3072  # holds every pair, its prompt laid once; 4096 with data.share_prompt=False
    c.data.row_multiple = CHIPS
    c.data.max_prompt_length = 1024
    c.data.max_completion_length = 1024  # with the prompt, the 2048 positions of the model

    c.sft.batch_size = 128
    c.sft.learning_rate = 2e-5

    c.train.batch_size = 64
    c.train.learning_rate = 5e-7

    c.loss.name = "dpo"

    c.sera.arms = ("daa", "sera")
    c.sera.rounds = 3

    c.sampling.max_new_tokens = 512
    c.sampling.slots = 256

    c.eval.max_pairs = 1000
    c.eval.num_prompts = 256
    return c
