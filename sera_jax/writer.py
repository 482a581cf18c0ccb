"""Metrics on disk: JSONL and TensorBoard; each written step also moves the progress shown.

`metrics.jsonl` in the work directory is the record; the TensorBoard files under `tensorboard/` are made from it. Every
step of a span is in both exactly once, also when the run was killed and started again: a span that starts at step s,
or the first write to it, drops what an earlier process wrote beyond. For that to hold, a loop writes step s, calls
`sync`, and only then lets a checkpoint of step s become visible. A step is the number of updates done, so the first
update of a span is step 1.

One line holds `phase`, `arm`, `round`, `step`, `global_step` (the same, with the updates of the arm's earlier rounds),
`time` (seconds since 1970) and the metrics. JSON has no word for nan and the infinities: such a value is null, so that
its column stays numeric, and its name and value ("nan", "inf", "-inf") stand in the line's `nonfinite`.

Progress goes to standard error, results (`report`) to standard output.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import numbers
import os
import pathlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sera_jax import hosts, stamps, whole
from sera_jax.board import RESERVED, Board
from sera_jax.core import Mean
from sera_jax.progress import Progress

METRICS = "metrics.jsonl"
# Metrics that the progress line shows, and what it calls them.
NOTED = {
    "loss": "loss",
    "rewards/margins": "margin",
    "objective/scores": "reward",
    "objective/kl": "KL",
    "objective/entropy": "entropy",
}


class SpanKey(NamedTuple):
    """A span of the log: what steps are counted in. `phase` says what is done ("train", "sft", "ppo", "round"); `arm`
    is "" and `round` 0 where a run has none."""

    phase: str
    arm: str = ""
    round: int = 0

    @property
    def label(self) -> str:
        """As people read it: "sera / train / round 2"."""
        parts = [self.arm, self.phase, f"round {self.round}" if self.round else ""]
        return " / ".join(part for part in parts if part)


class MetricWriter:
    """Writes each step of each span once, and shows how far the run is. On hosts other than 0 it does nothing."""

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        is_host0: bool = True,
        tensorboard: bool = True,
        config_text: str = "",
        progress: Progress | None = None,
    ):
        """Opens the record under `workdir` and mends a line that a kill tore.

        Args:
            config_text: shown by TensorBoard.

        Raises:
            ValueError: the record is damaged before its last lines.
        """
        self._on = is_host0
        self._folder = pathlib.Path(workdir)
        self._path = self._folder / METRICS
        self._progress = progress or Progress()
        self._stack: list[tuple[SpanKey, int]] = []  # with the steps before it
        self._sums: dict[SpanKey, Any] = {}  # running sha256 of the lines of every span, see `digest_of_lines`
        self._last: dict[SpanKey, int] = {}  # last step on disk, for every span of the record
        self._owned: set[SpanKey] = set()  # spans that this process has resumed or written
        if self._on:
            self._folder.mkdir(parents=True, exist_ok=True)
            records, torn = read_records(self._path)
            if torn:
                _replace(self._path, records)
            self._index(records)
            self._file = self._path.open("a", encoding="utf-8")
        read = lambda: read_records(self._path)[0]  # noqa: E731
        self._board = Board(self._folder / "tensorboard", read, config_text) if self._on and tensorboard else None

    @contextlib.contextmanager
    def span(
        self,
        name: str,
        *,
        arm: str | None = None,
        round: int | None = None,
        total_steps: int,
        start_step: int = 0,
        before: int = 0,
    ) -> Iterator[MetricWriter]:
        """The span that `write` and `advance` belong to while the context is open; spans may be nested.

        Lines of this span beyond `start_step` are dropped: all of them when it is 0.

        Args:
            name: what is done, e.g. "train"; the `phase` of its lines.
            arm, round: those of the enclosing span where not given.
            total_steps: the step at which the span is complete; 0 where that is not known.
            start_step: steps that an earlier process has done, from its checkpoint.
            before: updates of the arm before the span's first.
        """
        key = self._key(name, arm, round)
        self.resume(key, start_step)
        self._stack.append((key, before))
        if self._on:
            self._progress.start(key.label, total_steps, start_step)
        try:
            yield self
        finally:
            self._stack.pop()
            if self._on:
                self._progress.finish()
            if self._board:
                self._board.flush()

    def resume(self, key: SpanKey, step: int) -> None:
        """Drops the lines of `key` with a later step (at 0, with any), in one atomic replacement of the record."""
        if not self._on:
            return
        self._owned.add(key)
        if key in self._last and (step == 0 or self._last[key] > step):
            self._file.close()
            records, _ = read_records(self._path)
            kept = [record for record in records if key_of(record) != key or (step > 0 and record["step"] <= step)]
            _replace(self._path, kept)
            self._index(kept)
            self._file = self._path.open("a", encoding="utf-8")
            if self._board:
                self._board.remake(key._asdict())

    def write(
        self,
        *,
        step: int,
        metrics: Mapping[str, Any],
        phase: str | None = None,
        arm: str | None = None,
        round: int | None = None,
        tokens: int = 0,
        global_step: int | None = None,
    ) -> None:
        """Appends one line, handed to the operating system before this returns.

        Args:
            step: updates done; later than the last one written in this span.
            metrics: name to number (Python, numpy, or a jax scalar) or `core.Mean`.
            phase, arm, round: another span than the open one, e.g. phase="eval" within training.
            tokens: processed since the previous `write` or `advance`, for the tokens/s shown.
            global_step: where not what the open span makes of `step`.

        Raises:
            ValueError: a metric takes the name of one of the line's own fields.
        """
        stamps.moved(step=step if phase is None else None)
        if not self._on:
            return
        key = self._key(phase, arm, round)
        if clash := [name for name in metrics if name in RESERVED]:
            raise ValueError(
                f"metric {clash[0]!r} has the name of a field of every line ({', '.join(RESERVED)}): rename it"
            )
        if key not in self._owned:
            self.resume(key, max(step - 1, 0))
        last = self._last.get(key)
        assert last is None or step > last, f"{key.label}: step {step} is written after step {last}"

        if global_step is None:
            global_step = step + (self._stack[-1][1] if self._stack else 0)
        counted = {"step": int(step), "global_step": int(global_step)}
        self._append({**key._asdict(), **counted, "time": time.time(), **_numbers(metrics)})
        if self._stack and key == self._stack[-1][0]:
            self.advance(step, tokens=tokens, metrics=metrics)

    def advance(self, step: int, *, tokens: int = 0, metrics: Mapping[str, Any] | None = None) -> None:
        """Moves the progress shown to `step` of the open span, without writing a line."""
        stamps.moved(step=step)
        if self._on and self._stack:
            shown = {word: _number(metrics[name]) for name, word in NOTED.items() if metrics and name in metrics}
            note = "  ".join(f"{word} {value:.4g}" for word, value in shown.items())
            self._progress.update(step, tokens=tokens, note=note)

    def lines(self, key: SpanKey) -> list[dict[str, Any]]:
        """The lines of a span, in their order; none on hosts other than 0."""
        return [record for record in read_records(self._path)[0] if key_of(record) == key] if self._on else []

    def announce(self, text: str) -> None:
        """A line of its own on standard error: a heading, a remark."""
        stamps.moved()
        if self._on:
            self._progress.say(text)

    def report(self, text: str) -> None:
        """A result, on standard output."""
        if self._on:
            self._progress.clear()
            print(text, flush=True)

    def restore(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Puts the lines of a span that another record had in place of this one's; they get the present time."""
        if self._on and records:
            self.resume(key_of(records[0]), 0)
            now = time.time()  # one, since what lies between two lines is taken for the time of a step
            for record in records:
                self._append({**record, "time": now})
            self.sync()

    def digest(self, key: SpanKey) -> str:
        """`digest_of_lines` of the lines of a span so far; of several processes, all must ask, and are told by the
        first."""
        return hosts.on_first(lambda: self._sums.get(key, hashlib.sha256()).hexdigest())

    def sync(self) -> None:
        """Returns when every line written so far is on the disk. To be called before a checkpoint is saved."""
        if self._on:
            os.fsync(self._file.fileno())
            if self._board:
                self._board.flush()

    def close(self) -> None:
        """Syncs and closes; the writer is not used afterwards."""
        if self._on:
            self.sync()
            self._file.close()
            if self._board:
                self._board.close()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _key(self, phase: str | None, arm: str | None, round: int | None) -> SpanKey:
        outer = self._stack[-1][0] if self._stack else None
        if phase is None and outer is None:
            raise ValueError("no span is open: give write a phase, or write within `with writer.span(...)`")
        return SpanKey(
            phase if phase is not None else outer.phase if outer else "",
            arm if arm is not None else outer.arm if outer else "",
            int(round) if round is not None else outer.round if outer else 0,
        )

    def _append(self, record: dict[str, Any]) -> None:
        key = key_of(record)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        self._last[key] = record["step"]
        self._sums.setdefault(key, hashlib.sha256()).update(_sealed_part(record))
        if self._board:
            self._board.add(record)

    def _index(self, records: list[dict]) -> None:
        self._last, self._sums = {}, {}
        for record in records:
            key = key_of(record)
            self._sums.setdefault(key, hashlib.sha256()).update(_sealed_part(record))
            self._last[key] = max(record["step"], self._last.get(key, 0))


def read_records(path: str | os.PathLike) -> tuple[list[dict], bool]:
    """The lines of a metrics.jsonl, and whether torn lines at its end were left out.

    Raises:
        ValueError: a line that cannot be read has readable lines after it, which a kill does not explain.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return [], False
    lines = path.read_bytes().split(b"\n")
    unfinished = bool(lines.pop())  # what stands after the last line's end
    records: list[dict] = []
    bad = 0
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is None:
            bad = bad or number
        elif bad:
            raise ValueError(
                f"{path}:{bad} is not a metrics line but later lines are: the file was edited or damaged; "
                "repair or remove that line, or start in a new workdir"
            )
        else:
            records.append(record)
    return records, unfinished or bool(bad)


def without_clock(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line but for what tells the time, as a run that was stopped and gone on with shares it with one that was
    not."""
    return {name: value for name, value in record.items() if name != "time" and not name.startswith("timing_s/")}


def digest_of_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """sha256 of lines in their order, the clock left out."""
    total = hashlib.sha256()
    for record in records:
        total.update(_sealed_part(record))
    return total.hexdigest()


def _sealed_part(record: Mapping[str, Any]) -> bytes:
    return json.dumps(without_clock(record)).encode() + b"\n"


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
        hash(key_of(record))
        return record if isinstance(record["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def key_of(record: Mapping[str, Any]) -> SpanKey:
    """The span that a line belongs to."""
    return SpanKey(record["phase"], record["arm"], record["round"])


def _replace(path: pathlib.Path, records: list[dict]) -> None:
    """Puts a file of these records at `path` in one step: a kill leaves the old file or the new one."""
    lines = ((json.dumps(record, allow_nan=False) + "\n").encode() for record in records)
    whole.write(path, lambda file: file.writelines(lines))


def _number(value: Any) -> float | int:
    if isinstance(value, Mean):
        return value.value()
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON can hold them; see the module's docstring for nan and the infinities."""
    values = {name: _number(value) for name, value in metrics.items()}
    odd = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
    fields: dict[str, Any] = {name: None if name in odd else value for name, value in values.items()}
    return {**fields, "nonfinite": odd} if odd else fields
