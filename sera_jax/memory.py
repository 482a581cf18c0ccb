"""The host's memory: what is free is given back to the operating system, so that a run's size is what it holds."""

from __future__ import annotations

import ctypes

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_SECONDS = 1.0  # a compilation that took less has left little behind


def trim() -> None:
    """Give back what is free; where the C library is not glibc, do nothing.

    glibc keeps free memory that lies between blocks still in use: after a sampler's caches, of some MiB each, more than
    the parameters of the model; after the compilation of an update, a quarter of a GiB.
    """
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def trim_after_compilations() -> None:
    """From now on, give back what the compiler has freed before the program that it made first runs."""

    def listen(event: str, seconds: float, **_: str | int) -> None:
        if event == _COMPILED and seconds > _SECONDS:
            trim()

    jax.monitoring.register_event_duration_secs_listener(listen)
