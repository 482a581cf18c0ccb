"""A training that is stopped and gone on with leaves the log of one that was not."""

import dataclasses
import itertools

import numpy as np
import pytest

from sera_jax.config import TrainGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.items import Item
from sera_jax.loops.runtime import Preempted
from sera_jax.loops.sft import sft
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from tests.loops.kills import metrics
from tests.loops.tiny import one_device_runtime

CFG = ModelConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)
UPDATES = 8


def items():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 12)
    answers = [np.append(rng.integers(3, 16, length), 2).astype(np.int32) for length in lengths]
    return [Item(f"r{i}", np.array([1, 4], np.int32), (answer,)) for i, answer in enumerate(answers)]


def train(workdir, stop_requested=lambda: False, cfg=CFG):
    """The digest of the trained policy; lines are due every third update and at the end."""
    with one_device_runtime(workdir, cfg, logging_steps=3, stop_requested=stop_requested) as run:
        base = run.store("base", {}, lambda: init_params(cfg, key_for(0, Stream.INIT)))
        group = TrainGroup(batch_size=4, max_steps=UPDATES, learning_rate=1e-2)
        return sft(run, "sft", base, items(), group).digest


def test_a_stop_between_two_lines_changes_no_line(tmp_path):
    whole = train(tmp_path / "whole")
    for stop_after in (2, 3):  # updates 2 and 5
        asked = itertools.count(1)
        with pytest.raises(Preempted):
            train(tmp_path / "stopped", lambda asked=asked, stop_after=stop_after: next(asked) >= stop_after)
    assert train(tmp_path / "stopped") == whole
    lines = metrics(tmp_path / "whole")
    assert [step for _, _, _, step in lines] == [3, 6, UPDATES]
    assert metrics(tmp_path / "stopped") == lines


def test_a_checkpoint_holds_the_master_copy_of_rounded_parameters(tmp_path):
    """Gone on with from the rounded ones, the masters would lose what no rounding shows yet, and the digest tells."""
    cfg = dataclasses.replace(CFG, param_dtype="bfloat16")
    asked = itertools.count(1)
    with pytest.raises(Preempted):
        train(tmp_path / "stopped", lambda: next(asked) >= 3, cfg)
    assert train(tmp_path / "stopped", cfg=cfg) == train(tmp_path / "whole", cfg=cfg)
