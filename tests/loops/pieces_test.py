"""A phase of scoring or sampling that is stopped or killed within goes on from what is done, to the same bytes."""

import contextlib
import itertools

import numpy as np
import pytest

from sera_jax.checkpoint import pieces
from sera_jax.config import SamplingGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout
from sera_jax.loops import runtime
from sera_jax.loops.endings import NonFinite, Preempted
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from tests.loops.tiny import one_device_runtime

CFG = ModelConfig(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)
BATCHES, ROW = 6, 16
NAME = "base/round1/pool"
HOW = SamplingGroup(max_new_tokens=12, slots=2, temperature=1.0)
PROGRAMS = {}  # of all runs


class Killed(BaseException):
    """What leaves no time to keep anything."""


def items():
    """As many as there are batches: each fills more than half of a row."""
    rng = np.random.default_rng(0)
    answers = [np.append(rng.integers(3, 16, n), 2).astype(np.int32) for n in rng.integers(8, 12, BATCHES)]
    return [Item(f"r{i}", np.array([1, 4 + i], np.int32), (answer,)) for i, answer in enumerate(answers)]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(runtime, "CPU_SCORE_TOKENS", ROW)


@pytest.fixture
def start(tmp_path):
    """Starts a run of a phase in a folder, and returns what it made; `asked` counts how often it may be stopped."""

    def start(act, folder, stop_requested=lambda: False):
        with one_device_runtime(tmp_path / folder, CFG, layout=Layout(ROW), stop_requested=stop_requested) as run:
            run._compiled = PROGRAMS
            base = run.store("base", {}, lambda: init_params(CFG, key_for(0, Stream.INIT)))
            return act(run, base)

    return start


class Scoring:
    """A phase of it; `worked` has the batches that were computed."""

    product = "logps.npy"
    total = BATCHES

    def __init__(self):
        self.worked = []

    def __call__(self, run, base):
        make = run.scorer

        def scorer(*key):
            score = make(*key)
            return lambda params, rows: self.worked.append(rows.tokens.sum()) or score(params, rows)

        run.scorer = scorer
        run.score(NAME, base, items())
        return (run.workdir.root / "phases" / NAME / self.product).read_bytes()


class Sampling:
    """A phase of it; `worked` has the answers that were drawn."""

    product = "samples.jsonl"
    total = 2 * BATCHES

    def __init__(self):
        self.worked = []

    def __call__(self, run, base):
        draw = run.generate

        def generate(*args, on_progress, drawn, **how):
            seen = len(drawn)
            self.worked = []

            def progress(samples, tokens):
                self.worked = list(samples[seen:])
                on_progress(samples, tokens)

            return draw(*args, on_progress=progress, drawn=drawn, **how)

        run.generate = generate
        run.sample(NAME, base, items(), 2, HOW, round_=1)
        return (run.workdir.root / "phases" / NAME / self.product).read_bytes()


def stop_at(number, kind=None):
    """Asked for the `number`-th time it says yes, or raises."""
    asked = itertools.count(1)

    def stop():
        if next(asked) < number:
            return False
        if kind is not None:
            raise kind
        return True

    return stop


BOTH = pytest.mark.parametrize("phase", [Scoring, Sampling])


@BOTH
@pytest.mark.parametrize("at", [2, 4])
def test_a_stopped_phase_does_only_the_rest_and_ends_in_the_same_bytes(start, tmp_path, phase, at):
    whole = start(phase(), "whole")
    first, second = phase(), phase()
    with pytest.raises(Preempted, match="the same command goes on with it from what is done"):
        start(first, "stopped", stop_at(at))
    assert 0 < len(first.worked) < phase.total
    assert start(second, "stopped") == whole
    assert len(second.worked) == phase.total - len(first.worked)
    assert pieces.files(tmp_path / "stopped") == []
    assert not list((tmp_path / "stopped" / "checkpoints" / "pieces").iterdir()), "what led to a whole product goes"


@BOTH
def test_a_phase_may_be_stopped_again_and_again(start, phase):
    whole, worked, found = start(phase(), "whole"), 0, None
    while found is None:
        once = phase()
        with contextlib.suppress(Preempted):
            found = start(once, "stopped", stop_at(2))
        worked += len(once.worked)
    assert found == whole
    assert worked == phase.total


@BOTH
def test_a_kill_loses_what_came_after_the_newest_piece(start, tmp_path, phase, monkeypatch):
    whole, first, second = start(phase(), "whole"), phase(), phase()
    monkeypatch.setattr(pieces, "SECONDS", 0.0)
    monkeypatch.setattr(pieces.Pieces, "kept", lambda self: contextlib.nullcontext())
    with pytest.raises(Killed):
        start(first, "killed", stop_at(4, Killed))
    assert pieces.files(tmp_path / "killed")
    assert start(second, "killed") == whole
    assert 0 < phase.total - len(second.worked) <= len(first.worked)


@BOTH
def test_a_short_phase_writes_no_piece(start, tmp_path, phase):
    there = []
    start(phase(), "whole", lambda: there.append((tmp_path / "whole" / "checkpoints").exists()))
    assert there and not any(there)


def test_what_was_kept_by_another_plan_or_of_other_inputs_is_left_alone_until_the_phase_is_done(
    start, tmp_path, monkeypatch
):
    whole, again = start(Scoring(), "whole"), Scoring()
    with pytest.raises(Preempted):
        start(Scoring(), "stopped", stop_at(3))
    monkeypatch.setattr(runtime, "CPU_SCORE_TOKENS", 2 * ROW)
    found = np.frombuffer(start(again, "stopped")[-4 * BATCHES :], np.float32)
    assert len(again.worked) == BATCHES // 2, "all of them, two rows at a time"
    np.testing.assert_allclose(found, np.frombuffer(whole[-4 * BATCHES :], np.float32), rtol=1e-5)
    assert pieces.files(tmp_path / "stopped") == []


@BOTH
def test_a_damaged_piece_is_refused_in_a_line_and_without_it_its_part_is_done_again(start, tmp_path, phase):
    whole = start(phase(), "whole")
    with pytest.raises(Preempted):
        start(phase(), "stopped", stop_at(3))
    (piece,) = pieces.files(tmp_path / "stopped")
    assert list(pieces.damages_of_piece(piece)) == []
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.write_bytes(data)
    (line,) = pieces.damages_of_piece(piece)
    with pytest.raises(ValueError, match=f"^{piece} is not what was written; delete it and start the same command"):
        start(phase(), "stopped")
    assert line.startswith(f"{piece} is not what was written")
    piece.unlink()
    assert start(phase(), "stopped") == whole


def test_a_batch_whose_scores_are_not_finite_is_not_kept(start, monkeypatch):
    """Where the machine was at fault, the same command ends as if it had not been."""
    whole, wrong, again = start(Scoring(), "whole"), Scoring(), Scoring()
    monkeypatch.setattr(pieces, "SECONDS", 0.0)

    def faulty(run, base):
        make = run.scorer
        run.scorer = lambda *key: lambda *given: make(*key)(*given) * (np.nan if len(wrong.worked) == 2 else 1)
        return wrong(run, base)

    with pytest.raises(NonFinite, match="is not finite"):
        start(faulty, "faulty")
    assert start(again, "faulty") == whole
    assert len(again.worked) == 1
