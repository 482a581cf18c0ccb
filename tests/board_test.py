"""TensorBoard: a run for each arm, one count of updates over its rounds, every point once, the config as text."""

import io
import shutil
import types

import pytest

from sera_jax.board import run_of
from sera_jax.progress import Progress
from sera_jax.writer import MetricWriter, SpanKey
from tests.events import events

UPDATES = 4


def curve(folder, tag):
    return [(step, value.simple_value) for name, step, value in events(folder) if name == tag]


@pytest.fixture
def make_writer(tmp_path):
    """Writers on one work directory, as successive processes would open it."""
    return lambda **more: MetricWriter(tmp_path, progress=Progress(io.StringIO()), **more)


def train(writer, arm, round_, start=0):
    before = UPDATES * (round_ - 1)
    with writer.span("train", arm=arm, round=round_, total_steps=UPDATES, start_step=start, before=before):
        for step in range(start + 1, UPDATES + 1):
            writer.write(step=step, metrics={"loss": float(before + step), "num_tokens": 100})


def end_of_round(writer, arm, round_):
    numbers = {"heldout_accuracy": round_ / 10}
    writer.write(phase="round", arm=arm, round=round_, step=1, metrics=numbers, global_step=UPDATES * round_)


def whole(writer):
    """Round 1, which no arm owns, and two more of each of two arms."""
    train(writer, "", 1)
    for arm in ("sera", "daa"):
        end_of_round(writer, arm, 1)
        for round_ in (2, 3):
            train(writer, arm, round_)
            end_of_round(writer, arm, round_)


def check(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["daa", "round1", "sera"]
    for arm in ("sera", "daa"):
        assert curve(folder / arm, "loss") == [(n, float(n)) for n in range(1, 3 * UPDATES + 1)]
        accuracies = curve(folder / arm, "round/heldout_accuracy")
        assert accuracies == [(UPDATES * n, pytest.approx(n / 10)) for n in (1, 2, 3)]
    assert curve(folder / "round1", "loss") == [(n, float(n)) for n in range(1, UPDATES + 1)]


def test_an_arm_is_one_run_that_begins_with_the_shared_round_and_counts_updates_over_its_rounds(make_writer, tmp_path):
    with make_writer() as writer:
        whole(writer)
    check(tmp_path / "tensorboard")


def test_an_arm_with_a_first_round_of_its_own_has_no_other(make_writer, tmp_path):
    with make_writer() as writer:
        whole(writer)
        train(writer, "cdpo", 1)
        end_of_round(writer, "cdpo", 1)
        train(writer, "cdpo", 2)
    curves = {arm: curve(tmp_path / "tensorboard" / arm, "loss") for arm in ("cdpo", "daa")}
    assert curves["cdpo"] == curves["daa"][: 2 * UPDATES] == [(n, float(n)) for n in range(1, 2 * UPDATES + 1)]


@pytest.mark.parametrize("saved", [None, 0, 2])
def test_a_restart_neither_loses_nor_doubles_a_point(make_writer, tmp_path, saved):
    """The first process gets one update further than its checkpoint, in round 2 of the first arm; or not so far."""
    first = make_writer()
    train(first, "", 1)
    end_of_round(first, "sera", 1)
    if saved is not None:
        with first.span("train", arm="sera", round=2, total_steps=UPDATES, before=UPDATES):
            for step in range(1, saved + 2):
                first.write(step=step, metrics={"loss": -1.0 if step > saved else float(UPDATES + step)})
    first.close()
    with make_writer() as writer:
        end_of_round(writer, "sera", 1)  # of a round that was found finished
        train(writer, "sera", 2, start=saved or 0)
        end_of_round(writer, "sera", 2)
        train(writer, "sera", 3)
        end_of_round(writer, "sera", 3)
        for round_ in (1, 2, 3):
            if round_ > 1:
                train(writer, "daa", round_)
            end_of_round(writer, "daa", round_)
    check(tmp_path / "tensorboard")


def test_tokens_per_second_are_those_between_two_lines_of_a_span(make_writer, tmp_path, monkeypatch):
    times = iter(range(0, 1000, 5))
    monkeypatch.setattr("sera_jax.writer.time", types.SimpleNamespace(time=lambda: 1e9 + next(times)))
    with make_writer() as writer:
        train(writer, "sera", 1)
        train(writer, "sera", 2)
    speeds = curve(tmp_path / "tensorboard" / "sera", "tokens_per_second")
    assert speeds == [(step, 20.0) for step in (2, 3, 4, 6, 7, 8)]  # none for the first of a span, which compiles


def test_lines_that_another_run_had_are_in_tensorboard_without_a_speed(make_writer, tmp_path):
    with make_writer() as writer:
        train(writer, "sera", 1)
        lines = writer.lines(SpanKey("train", "sera", 1))
    shutil.rmtree(tmp_path / "tensorboard")
    (tmp_path / "metrics.jsonl").unlink()
    with make_writer() as writer:
        writer.restore(lines)
    assert [step for step, _ in curve(tmp_path / "tensorboard" / "sera", "loss")] == [line["step"] for line in lines]
    assert curve(tmp_path / "tensorboard" / "sera", "tokens_per_second") == []


def test_every_run_shows_the_config_as_text(make_writer, tmp_path):
    with make_writer(config_text='{"seed": 7}') as writer:
        train(writer, "sera", 1)
        train(writer, "", 1)
    for run in ("sera", "round1"):
        texts = [v.tensor.string_val[0] for tag, _, v in events(tmp_path / "tensorboard" / run) if "config" in tag]
        assert texts == [b'```json\n{"seed": 7}\n```']


def test_a_line_of_an_older_record_stands_at_its_own_step(make_writer, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"phase": "train", "arm": "sera", "round": 1, "step": 3, "time": 1.0, "loss": 2.0}\n'
    )
    with make_writer() as writer, writer.span("train", arm="sera", round=1, total_steps=4, start_step=3):
        writer.write(step=4, metrics={"loss": 1.0})
    assert curve(tmp_path / "tensorboard" / "sera", "loss") == [(3, 2.0), (4, 1.0)]


@pytest.mark.parametrize(
    ("phase", "arm", "round_", "run"),
    [("sft", "", 0, "sft"), ("train", "", 1, "round1"), ("ppo", "srppo", 2, "srppo"), ("round", "a/b c", 1, "a_b_c")],
)
def test_which_run_a_line_belongs_to(phase, arm, round_, run):
    assert run_of({"phase": phase, "arm": arm, "round": round_}) == run
