"""SeRA with DPO on Mistral-7B, from the model that HuggingFaceH4 tuned on UltraChat-200k; no SFT is run.

    python -m sera_jax.main --config=configs/mistral_sera.py

Of the paper (Ko et al. 2025): Mistral-7B after SFT on UltraChat-200k. That this is the SFT model it started from is our
guess. Rows and other values: configs/tinyllama_sera.py. It fits 8 chips of v6e, and by preflight's estimate 8 H100
(docs/models.md, with expected hours):

    python -m sera_jax.preflight --config=configs/mistral_sera.py --topology=v6e:2x4
"""

from typing import Any

from ml_collections import ConfigDict

from configs.tinyllama_sera import get_config as tinyllama


def get_config() -> ConfigDict:
    c: Any = tinyllama()
    c.workdir = "runs/mistral_sera"
    c.model.model_name_or_path = "HuggingFaceH4/mistral-7b-sft-beta"
    c.model.sft_model_path = "HuggingFaceH4/mistral-7b-sft-beta"
    c.data.demonstrations = ""
    c.data.chat_template = ""  # its own
    return c
