"""Online DPO in the made-up world of configs/quickstart.py, in a few minutes on two CPU cores.

    python -m sera_jax.main --config=configs/online_dpo.py

After one pass of DPO over the offline pairs (20 % of their labels flipped), every update is on 32 prompts whose four
answers the policy has just sampled and ranked itself; `daa` makes as many updates on the offline pairs again.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.quickstart import get_config as quickstart


def get_config() -> ConfigDict:
    c: Any = quickstart()
    c.workdir = "runs/online_dpo"
    c.method = "online_dpo"

    c.online.arms = ("online_dpo", "daa")
    c.online.updates = 50  # two passes over the offline pairs
    c.online.eval_updates = 25

    c.data.label_noise = 0.2
    c.train.num_train_epochs = 1
    return c
