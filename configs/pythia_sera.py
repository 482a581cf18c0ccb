"""SeRA with DPO on Pythia-2.8B, on the rows and by the values of configs/tinyllama_sera.py.

    python -m sera_jax.main --config=configs/pythia_sera.py

Of the paper (Ko et al. 2025): the model, beside what that file says. It fits 8 chips of v6e, and by preflight's
estimate 2 H100 (docs/models.md, with expected hours):

    python -m sera_jax.preflight --config=configs/pythia_sera.py --topology=v6e:2x4
"""

from typing import Any

from ml_collections import ConfigDict

from configs.tinyllama_sera import get_config as tinyllama


def get_config() -> ConfigDict:
    c: Any = tinyllama()
    c.workdir = "runs/pythia_sera"
    c.model.model_name_or_path = "EleutherAI/pythia-2.8b"
    c.sampling.slots = 128  # a slot takes fourteen times that of configs/tinyllama_sera.py: no heads share keys
    return c
