"""The table of methods. A row says everything that the rest of the house asks of a method; nothing else knows its name.

To add one, see docs/adding-a-method.md.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from sera_jax.config import Config, parse_fields
from sera_jax.experiment.method import Method
from sera_jax.experiment.methods.online_dpo import ONLINE_DPO
from sera_jax.experiment.methods.sera import SERA
from sera_jax.experiment.methods.srppo import SRPPO

METHODS: dict[str, Method] = {method.name: method for method in (SERA, SRPPO, ONLINE_DPO)}


def parse(raw: ml_collections.ConfigDict) -> Config:
    """The frozen Config of a ConfigDict, checked by its method too.

    Raises:
        ValueError: as `config.parse_fields`; an unknown method or arm; or what the method's own rules refuse.
    """
    config = parse_fields(raw)
    if config.method not in METHODS:
        choices = ", ".join(map(repr, METHODS))
        raise ValueError(f"config.method={config.method!r} is not a choice; choose one of {choices}")
    for method in METHODS.values():
        method.check_arms(config)
    METHODS[config.method].check(config)
    return config


def method_of(summary: dict[str, Any]) -> Method:
    """The method of a summary.json; the oldest name none, when there was only the first."""
    return METHODS[summary["config"].get("method", SERA.name)]
