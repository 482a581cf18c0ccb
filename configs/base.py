"""Every field with its default. Other configs start here and change a few.

What each means stands in sera_jax/config/groups.py.
"""

from ml_collections import ConfigDict

from sera_jax.config import Config, to_config_dict


def get_config() -> ConfigDict:
    return to_config_dict(Config())
