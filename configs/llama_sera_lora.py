"""SeRA with DPO on Llama-2-7B by adapters of rank 16 over all linear layers, for one GPU of 80 GB.

    python -m sera_jax.main --config=configs/llama_sera_lora.py

The repository is gated: accept its licence on the hub, and give HF_TOKEN. The base is frozen in bfloat16. No run of the
papers: rows and rounds of configs/tinyllama_sera.py; rank, alpha and rates are our choice. That it fits is preflight's
estimate (docs/models.md, with expected hours):

    python -m sera_jax.preflight --config=configs/llama_sera_lora.py --topology=gpu:h100:1
"""

from typing import Any

from ml_collections import ConfigDict

from configs.tinyllama_sera import get_config as tinyllama


def get_config() -> ConfigDict:
    c: Any = tinyllama()
    c.workdir = "runs/llama_sera_lora"

    c.model.model_name_or_path = "meta-llama/Llama-2-7b-hf"
    c.model.param_dtype = "bfloat16"

    c.lora.rank = 16
    c.lora.alpha = 32.0

    c.data.row_multiple = 1

    c.sft.learning_rate = 2e-4  # adapters take ten times the rates of whole models
    c.train.learning_rate = 5e-6

    c.sampling.slots = 32
    return c
