"""The record of metrics: every step once, valid JSON, TensorBoard equal to it; and what the terminal shows."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from sera_jax.core import Mean
from sera_jax.progress import Progress
from sera_jax.writer import MetricWriter, SpanKey, digest_of_lines, read_records
from tests.events import events

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def make_writer(tmp_path):
    """Writers on one work directory, as successive processes would open it; quiet on the terminal."""
    return lambda **settings: MetricWriter(tmp_path, **{"progress": Progress(io.StringIO()), **settings})


def steps(workdir: pathlib.Path, phase: str = "train") -> list[int]:
    return [record["step"] for record in read_records(workdir / "metrics.jsonl")[0] if record["phase"] == phase]


def scalars(folder: pathlib.Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every scalar in a folder's TensorBoard event files."""
    return [(tag, step, value.simple_value) for tag, step, value in events(folder)]


def test_the_digest_of_a_span_is_that_of_its_lines_on_disk_but_for_the_clock(make_writer, tmp_path):
    key = SpanKey("train", "sera", 1)

    def written(steps, seconds, start=0):
        with make_writer() as writer:
            with writer.span(*key[:1], arm=key.arm, round=key.round, total_steps=9, start_step=start):
                for step in steps:
                    writer.write(step=step, metrics={"loss": step / 8, "timing_s/rollout": seconds})
            writer.write(phase="eval", step=max(steps), metrics={"loss": 2.0})
            assert writer.digest(key) == digest_of_lines(writer.lines(key))
            return writer.digest(key)

    two, four = written([1, 2], 0.5), written([1, 2, 3, 4], 0.25)
    assert two != four
    assert written([3, 4], 0.75, start=2) == four, "lines that were dropped do not count"
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.replace('"loss": 0.25', '"loss": 0.26'))
    assert make_writer().digest(key) != four


def test_a_line_holds_the_phase_the_step_and_the_metrics(make_writer, tmp_path):
    with make_writer() as writer, writer.span("train", arm="sera", round=2, total_steps=1, before=40):
        writer.write(
            step=1,
            metrics={
                "loss": np.float32(0.5),
                "num_tokens": 7,
                "rewards/margins": Mean(np.array(3.0), np.array(2.0)),
            },
        )
    (record,), _ = read_records(tmp_path / "metrics.jsonl")
    assert record.pop("time") > 1.7e9
    assert record == {
        "phase": "train", "arm": "sera", "round": 2, "step": 1, "global_step": 41,
        "loss": 0.5, "num_tokens": 7, "rewards/margins": 1.5,
    }  # fmt: skip


def test_a_resumed_phase_drops_its_later_lines_and_no_others(make_writer, tmp_path):
    with make_writer() as writer:
        for name in ("sft", "train"):
            with writer.span(name, total_steps=5):
                for step in range(1, 6):
                    writer.write(step=step, metrics={"loss": float(step)})
    with make_writer() as writer, writer.span("train", total_steps=5, start_step=3):
        for step in (4, 5):
            writer.write(step=step, metrics={"loss": -1.0})
    assert steps(tmp_path) == steps(tmp_path, "sft") == [1, 2, 3, 4, 5]
    records, _ = read_records(tmp_path / "metrics.jsonl")
    assert [r["loss"] for r in records if r["phase"] == "train"] == [1.0, 2.0, 3.0, -1.0, -1.0]


def test_a_phase_that_starts_afresh_drops_all_its_lines(make_writer, tmp_path):
    for _ in range(2):
        with make_writer() as writer, writer.span("train", total_steps=2):
            for step in range(3):
                writer.write(step=step, metrics={"loss": 0.0})
    assert steps(tmp_path) == [0, 1, 2]


def test_a_phase_written_from_within_another_is_not_doubled_by_a_restart(make_writer, tmp_path):
    for start in (0, 2):
        with make_writer() as writer, writer.span("train", arm="daa", total_steps=4, start_step=start):
            for step in range(start + 1, 5):
                writer.write(step=step, metrics={"loss": 0.0})
                if step % 2 == 0:
                    writer.write(step=step, phase="eval", metrics={"eval_loss": 0.0})
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert steps(tmp_path, "eval") == [2, 4]


def test_a_process_killed_while_writing_leaves_each_step_once_after_a_restart(tmp_path):
    script = """
import sys
from sera_jax.writer import MetricWriter
workdir, start, total = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
writer = MetricWriter(workdir)
with writer.span("train", total_steps=total, start_step=start):
    for step in range(start + 1, total + 1):
        writer.write(step=step, metrics={"loss": step * 0.1, "filling": 1 / 3})
        if step == 200:
            writer.sync()
            print("saved", flush=True)
writer.close()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "0", "100000000"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and process.stdout.readline() == b"saved\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert max(steps(tmp_path)) >= 200

    subprocess.run([*command, "200", "260"], env=environment, check=True, capture_output=True)
    assert steps(tmp_path) == list(range(1, 261))
    assert [step for tag, step, _ in scalars(tmp_path / "tensorboard" / "train") if tag == "loss"] == steps(tmp_path)


@pytest.mark.parametrize("tail", [b'{"phase": "tr', b'{"phase": "train", "arm": "", "round": 0, "step"\n', b"\0\0\n\0"])
def test_torn_last_lines_are_mended_before_anything_is_appended(make_writer, tmp_path, tail):
    with make_writer() as writer, writer.span("train", total_steps=2):
        writer.write(step=1, metrics={"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    with make_writer() as writer, writer.span("train", total_steps=2, start_step=1):
        writer.write(step=2, metrics={"loss": 2.0})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_damaged_line_before_sound_ones_is_refused_with_its_number(make_writer, tmp_path):
    with make_writer() as writer, writer.span("train", total_steps=2):
        writer.write(step=1, metrics={"loss": 1.0})
        writer.write(step=2, metrics={"loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text("edited" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 .* new workdir"):
        make_writer()


def test_values_that_are_not_finite_are_null_and_named(make_writer, tmp_path):
    with make_writer() as writer, writer.span("train", total_steps=1):
        writer.write(step=1, metrics={"a": float("nan"), "b": float("inf"), "c": -np.inf, "d": 1.0})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (record["a"], record["b"], record["c"], record["d"]) == (None, None, None, 1.0)
    assert record["nonfinite"] == {"a": "nan", "b": "inf", "c": "-inf"}
    shown = {tag: value for tag, _, value in scalars(tmp_path / "tensorboard" / "train")}
    assert shown["b"] == np.inf and shown["c"] == -np.inf and np.isnan(shown["a"])


def test_a_finished_phase_that_is_opened_again_keeps_its_lines_and_its_run(make_writer, tmp_path):
    for start in (0, 2):
        with make_writer() as writer, writer.span("train", total_steps=2, start_step=start):
            for step in range(start + 1, 3):
                writer.write(step=step, metrics={"loss": 0.0})
    assert steps(tmp_path) == [1, 2]
    assert len(scalars(tmp_path / "tensorboard" / "train")) == 2


def test_hosts_other_than_the_first_write_and_show_nothing(tmp_path, capsys):
    with MetricWriter(tmp_path / "run", is_host0=False) as writer, writer.span("train", total_steps=1):
        writer.write(step=1, metrics={"loss": 1.0})
        writer.advance(1)
        writer.announce("heading")
        writer.report("result")
        writer.sync()
        writer.resume(SpanKey("train"), 0)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_step_written_twice_in_one_process_is_our_mistake(make_writer):
    with make_writer() as writer, writer.span("train", total_steps=2):
        writer.write(step=1, metrics={"loss": 1.0})
        with pytest.raises(AssertionError, match="step 1 is written after step 1"):
            writer.write(step=1, metrics={"loss": 1.0})


def test_a_metric_may_not_take_the_name_of_a_field(make_writer):
    with make_writer() as writer, pytest.raises(ValueError, match="'step' has the name of a field"):
        writer.write(step=1, phase="train", metrics={"step": 1.0})


def test_a_write_outside_any_phase_says_what_to_do(make_writer):
    with make_writer() as writer, pytest.raises(ValueError, match="give write a phase"):
        writer.write(step=1, metrics={"loss": 1.0})


def test_results_go_to_standard_output_and_progress_to_standard_error(tmp_path, capsys):
    with MetricWriter(tmp_path) as writer, writer.span("train", total_steps=1):
        writer.announce("round 1 of 3")
        writer.write(step=1, metrics={"loss": 1.0})
        writer.report("gold 0.5")
    out, err = capsys.readouterr()
    assert out == "gold 0.5\n"
    assert "round 1 of 3" in err and "gold" not in err


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO, seconds_per_step: float, total: int) -> str:
    now = [0.0]
    progress = Progress(stream, clock=lambda: now[0])
    progress.start(SpanKey("train", "sera", 2).label, total)
    for step in range(1, total + 1):
        now[0] += seconds_per_step
        progress.update(step, tokens=3000, note="loss 0.69")
    progress.finish()
    return stream.getvalue()


def test_a_terminal_shows_one_line_with_phase_round_step_speed_and_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    frames = show(Terminal(), seconds_per_step=2.0, total=40).split("\r")
    assert "sera / train / round 2  [##########..........]  20/40  1.5k tokens/s  loss 0.69  ETA 0:40" in frames[21]
    assert all("\n" not in frame for frame in frames[:-1])
    assert "step 40 after 1:20, 1.5k tokens/s" in frames[-1]


def test_a_terminal_line_is_no_wider_than_the_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    frames = show(Terminal(), seconds_per_step=2.0, total=5).split("\r")
    assert max(len(frame.replace("\x1b[K", "")) for frame in frames[1:-1]) <= 39


@pytest.mark.parametrize(("seconds_per_step", "expected"), [(0.01, 0), (1.0, 6), (30.0, 100)])
def test_elsewhere_plain_lines_come_every_quarter_minute_and_at_the_end(seconds_per_step, expected):
    text = show(io.StringIO(), seconds_per_step=seconds_per_step, total=100)
    assert "\r" not in text and "\x1b" not in text
    *lines, end = text.splitlines()
    assert len(lines) == expected
    assert end.startswith("sera / train / round 2: step 100 after")


def test_what_took_less_than_a_second_is_not_said_to_be_done():
    assert show(io.StringIO(), seconds_per_step=0.001, total=100) == ""


def test_the_progress_of_ppo_shows_reward_kl_and_entropy(tmp_path):
    stream = io.StringIO()
    metrics = {"objective/scores": 1.075, "objective/kl": 0.25, "objective/entropy": 14.93, "val/ratio": 1.0}
    progress = Progress(stream, interval_seconds=0)
    with (
        MetricWriter(tmp_path, tensorboard=False, progress=progress) as writer,
        writer.span("ppo", arm="srppo", round=1, total_steps=2),
    ):
        writer.write(step=1, metrics=metrics)
    assert "srppo / ppo / round 1  1/2  reward 1.075  KL 0.25  entropy 14.93" in stream.getvalue()


def test_a_line_whose_span_is_no_name_is_damage_not_a_crash(tmp_path):
    good = {"phase": "a", "arm": "", "round": 0, "step": 1, "time": 0}
    lines = [json.dumps({**good, "arm": []}), json.dumps(good)]
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ValueError, match=rf"{tmp_path}/metrics.jsonl:1 is not a metrics line"):
        read_records(tmp_path / "metrics.jsonl")
