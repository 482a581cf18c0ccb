"""From a config to tokens and a base model: what is refused before any work."""

import dataclasses

import pytest

from sera_jax.config import Config, DataGroup, EvalGroup, SamplingGroup
from sera_jax.experiment.assembly import check_positions
from sera_jax.models.config import ModelConfig

CFG = ModelConfig(max_position_embeddings=64)
FITS = Config(
    data=DataGroup(max_prompt_length=40, max_completion_length=24),
    sampling=SamplingGroup(max_new_tokens=24),
    eval=EvalGroup(max_new_tokens=24),
)


@pytest.mark.parametrize(
    "group, field", [("data", "max_completion_length"), ("sampling", "max_new_tokens"), ("eval", "max_new_tokens")]
)
def test_lengths_for_which_the_model_has_no_positions_are_refused_by_field(group, field):
    check_positions(FITS, CFG)
    long = dataclasses.replace(FITS, **{group: dataclasses.replace(getattr(FITS, group), **{field: 25})})
    with pytest.raises(ValueError, match=rf"max_prompt_length=40 and config.{group}.{field}=25 .*=64 together"):
        check_positions(long, CFG)
