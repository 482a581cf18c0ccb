"""The TensorBoard files, made from the lines of metrics.jsonl: a run for each arm, its steps counted over its rounds.

An arm's run begins with what no arm owns but all share: the lines of a round without an arm, where it has none of its
own of that round. Those, and the lines of SFT and of other trainings without an arm, are runs of their own besides
("round1", "sft"). In an arm's run, what is written once a round stands under `round/`.
"""

from __future__ import annotations

import pathlib
import re
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from tensorboardX import SummaryWriter

Record = dict[str, Any]  # a line of metrics.jsonl
RESERVED = ("phase", "arm", "round", "step", "global_step", "time", "nonfinite")  # of every line, and no metrics
_TOKENS = ("num_tokens", "rollout/tokens")  # whichever a line has


class Board:
    """The event files under a folder. A run is made anew from the record when it is first added to."""

    def __init__(self, folder: pathlib.Path, read: Callable[[], Iterable[Record]], text: str) -> None:
        """
        Args:
            read: the record, in its order. text: shown with every run, as `config`.
        """
        self._folder, self._read, self._text = folder, read, text
        self._open: dict[str, _Run] = {}

    def add(self, record: Record) -> None:
        """Adds a line, which is in the record already."""
        name = run_of(record)
        if name in self._open:
            self._open[name].add(record)
        else:
            self.remake(record)

    def remake(self, like: Record) -> None:
        """Makes the run that such a line belongs to of all that the record holds of it, and nothing else."""
        name = run_of(like)
        if name in self._open:
            self._open.pop(name).events.close()
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        # purge_step tells a TensorBoard that watched the earlier files to forget them.
        run = self._open[name] = _Run(SummaryWriter(str(folder), purge_step=0))
        if self._text:
            run.events.add_text("config", f"```json\n{self._text}\n```")
        records = [r for r in self._read() if run_of(r) == name or (like["arm"] and _is_shared(r))]
        own = {(r["phase"], r["round"]) for r in records if run_of(r) == name}
        for record in records:
            if run_of(record) == name or (record["phase"], record["round"]) not in own:
                run.add(record)

    def flush(self) -> None:
        for run in self._open.values():
            run.events.flush()

    def close(self) -> None:
        for run in self._open.values():
            run.events.close()
        self._open.clear()


class _Run:
    """One run, open for writing."""

    def __init__(self, events: SummaryWriter) -> None:
        self.events = events
        self._last: dict[tuple, float] = {}  # the time of the last line, by phase and round

    def add(self, record: Record) -> None:
        step, time = record.get("global_step", record["step"]), record["time"]
        prefix = "round/" if record["phase"] == "round" else ""
        for name, value in record.items():
            if name not in RESERVED:
                number = float(record["nonfinite"][name]) if value is None else value
                self.events.add_scalar(prefix + name, number, step, walltime=time)
        span = record["phase"], record["arm"], record["round"]
        tokens = next((record[name] for name in _TOKENS if record.get(name)), None)
        if tokens is not None and time > self._last.get(span, time):
            self.events.add_scalar("tokens_per_second", tokens / (time - self._last[span]), step, walltime=time)
        self._last[span] = time


def run_of(record: Record) -> str:
    """The name of the run that a line belongs to, fit for a folder."""
    name = record["arm"] or (f"round{record['round']}" if record["round"] else record["phase"])
    return re.sub(r"[^\w=-]", "_", name)


def _is_shared(record: Record) -> bool:
    return not record["arm"] and record["round"] > 0
