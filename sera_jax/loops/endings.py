"""How a phase ends when it does not end well."""

from __future__ import annotations

from typing import Any


class Preempted(Exception):
    """The process was asked to stop; everything needed to go on is on disk."""


class NonFinite(ValueError):
    """A loss or gradient was not finite. `good`: the last good state and its step, to be saved by who saves."""

    def __init__(self, message: str, good: tuple[Any, int] | None = None) -> None:
        super().__init__(message)
        self.good = good
