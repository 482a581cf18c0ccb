"""SeRA against its loss alone in the embedded world, trained gently: one epoch a round, as the paper trains.

python -m sera_jax.study --config=studies/embedded_gentle.py

That of studies/embedded_plane.py with a third of the updates: the policy has not moved far from the SFT model.
"""

from sera_jax.studies.plan import Study
from studies.embedded_plane import like


def get_config() -> Study:
    return like({"train.num_train_epochs": 1})
