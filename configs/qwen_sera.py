"""SeRA with DPO from a chat model of another family, Qwen2.5-7B-Instruct, on UltraFeedback; no SFT is run.

    python -m sera_jax.main --config=configs/qwen_sera.py

No run of the papers: the method of configs/mistral_sera.py, whose rows and values these are. It fits 8 chips of v6e,
and by preflight's estimate 8 H100 (docs/models.md, with expected hours):

    python -m sera_jax.preflight --config=configs/qwen_sera.py --topology=v6e:2x4
"""

from typing import Any

from ml_collections import ConfigDict

from configs.mistral_sera import get_config as mistral


def get_config() -> ConfigDict:
    c: Any = mistral()
    c.workdir = "runs/qwen_sera"
    c.model.model_name_or_path = "Qwen/Qwen2.5-7B-Instruct"
    c.model.sft_model_path = "Qwen/Qwen2.5-7B-Instruct"
    return c
