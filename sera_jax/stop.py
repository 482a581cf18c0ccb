"""How a command ends, and how it is asked to: exit codes and signals. Imports nothing that takes time."""

from __future__ import annotations

import atexit
import signal
import sys
from collections.abc import Callable
from types import FrameType

EXIT_REFUSED = 2
EXIT_PREEMPTED = 75


class StopOnSignal:
    """Called, says whether SIGTERM or SIGINT came; a second SIGINT interrupts at once.

    From the interpreter's end on, when the exit code stands, both are ignored.
    """

    def __init__(self) -> None:
        self._asked = False
        self._listen(self._handle)
        # Python takes its handlers away before it ends, and a signal would make its own code of that of a finished run.
        atexit.register(self._listen, signal.SIG_IGN)

    def _listen(self, handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        print("\nstopping at the next safe point ...", file=sys.stderr, flush=True)
