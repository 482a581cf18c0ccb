"""Self-Rewarding PPO on Mistral-7B, by the rows and values of configs/llama_srppo.py.

    python -m sera_jax.main --config=configs/mistral_srppo.py

Of the paper (Zhang et al. 2025): the model, beside what that file says. It fits 16 chips of v6e, and by preflight's
estimate 8 H100 (docs/models.md, with expected hours):

    python -m sera_jax.preflight --config=configs/mistral_srppo.py --topology=v6e:4x4
"""

from typing import Any

from ml_collections import ConfigDict

from configs.llama_srppo import get_config as llama


def get_config() -> ConfigDict:
    c: Any = llama()
    c.workdir = "runs/mistral_srppo"
    c.model.model_name_or_path = "mistralai/Mistral-7B-v0.1"
    return c
