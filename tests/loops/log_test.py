"""A run that learns nothing is told so, with the way out; a run that learns is not; a round is a line of the log."""

import io
import types

import pytest

from sera_jax.loops.log import warn_of_still_margins, write_round
from sera_jax.loops.restartable import Span
from sera_jax.losses.preference import resolve
from sera_jax.progress import Progress
from sera_jax.writer import MetricWriter

TRAIN = Span("train", "sera", 2, 40)


@pytest.fixture
def run(tmp_path):
    """What the functions read of a runtime: its writer; and what the user sees, as `seen()`."""
    stream = io.StringIO()
    with MetricWriter(tmp_path, tensorboard=False, progress=Progress(stream)) as writer:
        yield types.SimpleNamespace(writer=writer, seen=lambda: stream.getvalue().splitlines())


def write(run, span, name, values):
    for step, value in enumerate(values, 1):
        run.writer.write(phase=span.phase, arm=span.arm, round=span.round, step=step, metrics={name: value})


def test_margins_that_stay_at_0_are_said_with_the_updates_the_rate_and_the_way_out(run):
    write(run, TRAIN, "rewards/margins", [0.0, 2e-5, -3e-5])
    warn_of_still_margins(run, TRAIN, resolve("dpo", beta=0.1), 1e-6)
    assert run.seen() == [
        "warning: 3 updates at 1e-06: the margins stayed at 0 (the mean was never above 0.0003 nats), so nothing was "
        "learnt; raise config.train.learning_rate or config.train.max_steps"
    ]


@pytest.mark.parametrize(
    ("margins", "loss"),
    [
        ([0.0, 1e-4, 5e-3], resolve("dpo", beta=0.1)),  # 0.05 nats
        ([0.0, 5e-4, 1e-6], resolve("dpo", beta=0.01)),  # 0.05 nats on the way
        ([0.0, 0.0, 3e-4], resolve("ipo", tau=0.1)),  # 0.003 nats a token
        ([0.0, 0.0], resolve("dpo")),  # too few to say: the second is of the policy after one update
        ([0.0, 0.0, 0.0], resolve("simpo")),  # no reference, from which margins would start at 0
        ([], resolve("dpo")),
    ],
)
def test_margins_that_move_are_not_said(run, margins, loss):
    write(run, TRAIN, "rewards/margins", margins)
    write(run, Span("train", "daa", 2), "rewards/margins", [0.0])  # another arm
    warn_of_still_margins(run, TRAIN, loss, 1e-6)
    assert run.seen() == []


def test_a_round_is_a_line_of_its_numbers_at_the_updates_of_its_arm(run):
    write_round(run, {"arm": "sera", "round": 2, "kept": 7, "gold_mean": 0.5, "agreement": {"tie": 1.0}}, 24)
    (line,) = run.writer.lines(("round", "sera", 2))
    assert line.pop("time") > 0
    assert line == {
        "phase": "round", "arm": "sera", "round": 2, "step": 1, "global_step": 24, "kept": 7, "gold_mean": 0.5
    }  # fmt: skip
