"""A word when a program compiles, which may take minutes in which nothing else moves. JAX itself says when it begins
and ends: so every program is covered, whoever jitted it."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax import monitoring

from sera_jax import stamps

# Begins with a scalar of this name and ends with a duration of it; both say `fun_name`.
COMPILATION = "/jax/core/compile/backend_compile_duration"
_WORDS = {
    "step": "an update",
    "score": "the scorer",
    "values": "the critic's values",
    "rewards": "the reward model's scores",
    "make": "rewards and advantages",
    "prefill": "the reading of prompts",
    "decode": "the decoder",
    "insert": "the decoder's slots",
    "empty_slots": "the decoder's slots",
    "unstacked": "the decoder's copy of the parameters",
    "_sums": "checksums",
    "<lambda>": "what draws parameters",
}


@contextlib.contextmanager
def said(say: Callable[[str], None], *, after_seconds: float = 2.0, again_seconds: float = 10.0) -> Iterator[None]:
    """Within, a compilation that takes longer than `after_seconds` is said while it goes on.

    Args:
        say: called from a thread of its own.
        again_seconds: programs of one name are said no more often than this: some are compiled for each tensor.
    """
    timers: dict[int, threading.Timer] = {}  # by the thread that compiles
    last: dict[str, float] = {}  # when a name was said

    def begins(event: str, value: float, **details: Any) -> None:
        if event == COMPILATION:
            stamps.compiles(True)
            name = in_words(str(details.get("fun_name", "")))
            timer = timers[threading.get_ident()] = threading.Timer(after_seconds, notice, [name])
            timer.daemon = True
            timer.start()

    def notice(name: str) -> None:
        now = time.monotonic()
        if now - last.get(name, -again_seconds) >= again_seconds:
            last[name] = now
            say(f"compiling {name} for shapes that are new ...")

    def ends(event: str, seconds: float, **details: Any) -> None:
        if event == COMPILATION:
            stamps.compiles(False)
            if timer := timers.pop(threading.get_ident(), None):
                timer.cancel()

    monitoring.register_scalar_listener(begins)
    monitoring.register_event_duration_secs_listener(ends)
    try:
        yield
    finally:
        monitoring.unregister_scalar_listener(begins)
        monitoring.unregister_event_duration_listener(ends)
        for timer in timers.values():
            timer.cancel()


def in_words(function: str) -> str:
    """Of the name that JAX gives a program, as "jit(step)"."""
    name = re.sub(r"^\w+\((.*)\)$", r"\1", function)
    return _WORDS.get(name, name or "a program")
