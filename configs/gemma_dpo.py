"""DPO alone from a chat model of another family, Gemma-2-2B-it, on UltraFeedback: one epoch, no rounds, no SFT.

    python -m sera_jax.main --config=configs/gemma_dpo.py

The repository is gated: accept its licence on the hub, and give HF_TOKEN. No run of the papers: the baseline of
configs/mistral_sera.py, whose rows and values these are. It fits 8 chips of v6e, and by preflight's estimate 8 H100
(docs/models.md, with expected hours):

    python -m sera_jax.preflight --config=configs/gemma_dpo.py --topology=v6e:2x4
"""

from typing import Any

from ml_collections import ConfigDict

from configs.mistral_sera import get_config as mistral


def get_config() -> ConfigDict:
    c: Any = mistral()
    c.workdir = "runs/gemma_dpo"
    c.model.model_name_or_path = "google/gemma-2-2b-it"
    c.model.sft_model_path = "google/gemma-2-2b-it"
    c.sera.arms = ("daa",)
    c.sera.rounds = 1
    return c
