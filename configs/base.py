"""Every field with its default. Other configs start here and change a few; meanings stand in sera_jax/config.py."""

from ml_collections import ConfigDict

from sera_jax.config import Config, to_config_dict


def get_config() -> ConfigDict:
    return to_config_dict(Config())
