"""Progress on the terminal: which phase, how far, how fast, how long still."""

from __future__ import annotations

import collections
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

NOTICED = 1.0  # seconds; what took less is not said to be done


class Progress:
    """How far a phase is: one line that is redrawn on a terminal, a plain line now and then elsewhere.

    `say` may be called from any thread.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interval_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """
        Args:
            stream: where to; standard error by default.
            interval_seconds: shortest time between two showings; by default 0.2 on a terminal and 15 elsewhere.
            clock: seconds, for tests.
        """
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._interval = interval_seconds if interval_seconds is not None else (0.2 if self._terminal else 15.0)
        self._clock = clock
        self._phases: list[_Phase] = []
        self._drawn = False
        self._lock = threading.RLock()

    def start(self, label: str, total_steps: int, start_step: int = 0) -> None:
        """Opens a phase within the open one, if any."""
        now = self._clock()
        self._phases.append(_Phase(label, total_steps, start_step, now))
        if self._terminal:
            self._show(now)
        elif start_step:
            self.say(f"{label}: goes on from step {start_step} of {total_steps}")

    def update(self, step: int, *, tokens: int = 0, note: str = "") -> None:
        """Records that `step` steps of the open phase are done, with `tokens` processed since the last update."""
        phase = self._phases[-1]
        now = self._clock()
        phase.step, phase.tokens, phase.note = step, phase.tokens + tokens, note or phase.note
        phase.window.append((now, step, phase.tokens))
        if now - phase.shown >= self._interval or (self._terminal and step == phase.total):
            self._show(now)

    def finish(self) -> None:
        """Closes the open phase and, where that is worth a line, says what it took."""
        phase = self._phases.pop()
        seconds = self._clock() - phase.began
        if seconds < NOTICED:
            self.clear()
            return
        took = f"{phase.label}: step {phase.step} after {_duration(seconds)}"
        self.say(f"{took}, {_thousands(phase.tokens / max(seconds, 1e-9))} tokens/s" if phase.tokens else took)

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        with self._lock:
            self.clear()
            print(text, file=self._stream, flush=True)

    def clear(self) -> None:
        """Takes the redrawn line off the terminal, so that something else can be printed."""
        with self._lock:
            if self._drawn:
                self._stream.write("\r\x1b[K")
                self._stream.flush()
                self._drawn = False

    def _show(self, now: float) -> None:
        phase = self._phases[-1]
        phase.shown = now
        with self._lock:
            if not self._terminal:
                print(phase.line(), file=self._stream, flush=True)
                return
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + phase.line(bar=20)[:width] + "\x1b[K")
            self._stream.flush()
            self._drawn = True


class _Phase:
    """State of one phase. Speeds are over the last 30 updates, so that compilation does not count for long."""

    def __init__(self, label: str, total: int, step: int, now: float):
        self.label, self.total, self.step = label, total, step
        self.tokens, self.note = 0, ""
        self.began = self.shown = now
        self.window = collections.deque([(now, step, 0)], maxlen=30)

    def line(self, bar: int = 0) -> str:
        (t0, step0, tokens0), (t1, step1, tokens1) = self.window[0], self.window[-1]
        seconds = max(t1 - t0, 1e-9)
        parts = [self.label]
        if bar and self.total:
            full = min(bar, bar * self.step // self.total)
            parts.append(f"[{'#' * full}{'.' * (bar - full)}]")
        parts.append(f"{self.step}/{self.total}" if self.total else f"{self.step}")
        if tokens1 > tokens0:
            parts.append(f"{_thousands((tokens1 - tokens0) / seconds)} tokens/s")
        if self.note:
            parts.append(self.note)
        if self.total > self.step and step1 > step0:
            parts.append(f"ETA {_duration((self.total - self.step) * seconds / (step1 - step0))}")
        return "  ".join(parts)


def _thousands(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
