"""How a command ends, and how it is asked to: exit codes and signals. Imports nothing that takes time."""

from __future__ import annotations

import signal
import sys
from types import FrameType

EXIT_REFUSED = 2
EXIT_PREEMPTED = 75


class StopOnSignal:
    """Called, says whether SIGTERM or SIGINT came; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping at the next safe point ...", file=sys.stderr, flush=True)
