"""Every option of a run, written once: frozen dataclasses whose defaults are the defaults.

`configs/*.py` build an ml_collections ConfigDict from them (`to_config_dict`), the command line overrides it, and
`experiment.methods.parse` turns it back: `parse_fields` checks every field and the rules that join fields whatever the
method, the method its own. Nothing else reads a ConfigDict.
"""

from sera_jax.config.groups import (
    Config,
    DataGroup,
    EvalGroup,
    LogGroup,
    LossGroup,
    MeshGroup,
    PpoGroup,
    RewardGroup,
    SamplingGroup,
    SeraGroup,
    TrainGroup,
)
from sera_jax.config.lora import LoraGroup
from sera_jax.config.model import ModelGroup
from sera_jax.config.parsing import check_field, last_overrides, parse_fields, to_config_dict, to_dict
from sera_jax.config.world import WorldGroup

__all__ = [
    "Config",
    "DataGroup",
    "EvalGroup",
    "LogGroup",
    "LoraGroup",
    "LossGroup",
    "MeshGroup",
    "ModelGroup",
    "PpoGroup",
    "RewardGroup",
    "SamplingGroup",
    "SeraGroup",
    "TrainGroup",
    "WorldGroup",
    "check_field",
    "last_overrides",
    "parse_fields",
    "to_config_dict",
    "to_dict",
]
