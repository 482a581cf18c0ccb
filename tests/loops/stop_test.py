"""A training that is stopped and gone on with leaves the log of one that was not."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from jax._src.array import ArrayImpl

from sera_jax.checkpoint import CorruptCheckpoint
from sera_jax.config import TrainGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.items import Item
from sera_jax.loops.optimise import _Optimisation
from sera_jax.loops.runtime import NonFinite, Preempted
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


def train(workdir, stop_requested=lambda: False, cfg=CFG, logging_steps=3, rate=1e-2):
    """The digest of the trained policy; lines are due every third update and at the end."""
    with one_device_runtime(workdir, cfg, logging_steps=logging_steps, stop_requested=stop_requested) as run:
        base = run.store("base", {}, lambda: init_params(cfg, key_for(0, Stream.INIT)))
        group = TrainGroup(batch_size=4, max_steps=UPDATES, learning_rate=rate)
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


@pytest.mark.parametrize("stop_after", [None, 5])
def test_a_loss_that_is_not_finite_is_found_before_its_line_is_due_and_the_state_before_it_is_saved(
    tmp_path, stop_after
):
    """Lines are due every tenth update: what waits is looked at where it ends, and where it is stopped."""
    asked = itertools.count(1)
    with pytest.raises(NonFinite) as refused:
        train(tmp_path, lambda: next(asked) == stop_after, logging_steps=10, rate=1e30)
    (saved,) = [path.name for path in (tmp_path / "checkpoints" / "sft").iterdir() if path.name.isdigit()]
    assert f"The last good state (update {saved}) is saved in" in str(refused.value)
    assert int(saved) < 5


def test_between_two_lines_nothing_is_fetched_from_the_device(tmp_path, monkeypatch):
    """Host and device run side by side: an update waits for nothing. (A transfer guard sees nothing on a CPU.)"""
    value, at, fetched = ArrayImpl._value, [0], set()

    def watched(work, state, number, step=_Optimisation.step):
        at[0] = number
        state = step(work, state, number)
        at[0] = 0
        return state

    monkeypatch.setattr(ArrayImpl, "_value", property(lambda x: fetched.add(at[0]) or value.fget(x)))
    monkeypatch.setattr(_Optimisation, "step", watched)
    train(tmp_path)
    assert fetched - {0} == {3, 6}, "the lines that are due within the loop; the last one is written after it"


def test_how_often_lines_are_written_changes_no_product(tmp_path):
    assert train(tmp_path / "often") == train(tmp_path / "seldom", logging_steps=10)


def test_what_waits_in_a_checkpoint_is_vouched_for(tmp_path):
    asked = itertools.count(1)
    with pytest.raises(Preempted):
        train(tmp_path, lambda: next(asked) == 5, logging_steps=10)
    (notes,) = (tmp_path / "checkpoints" / "sft").glob("*/notes/metadata")
    notes.write_text(notes.read_text().replace('"number": ', '"number": 1', 1))
    with pytest.raises(CorruptCheckpoint, match="fail their checksum, first notes"):
        train(tmp_path, logging_steps=10)


def test_lines_that_were_changed_while_it_was_stopped_are_refused_and_the_way_out_ends_alike(tmp_path):
    whole = train(tmp_path / "whole")
    asked = itertools.count(1)
    with pytest.raises(Preempted):
        train(tmp_path / "stopped", lambda: next(asked) >= 4)
    log = tmp_path / "stopped" / "metrics.jsonl"
    log.write_text(log.read_text().replace('"num_tokens": ', '"num_tokens": 1', 1))
    with pytest.raises(CorruptCheckpoint, match="no longer has the lines of sft as they were") as refused:
        train(tmp_path / "stopped")
    folder = tmp_path / "stopped" / "checkpoints" / "sft"
    assert f"delete {folder} and start the same command again" in str(refused.value)
    shutil.rmtree(folder)
    assert train(tmp_path / "stopped") == whole
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
