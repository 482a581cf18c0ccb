"""Free memory goes back to the operating system, at once and after a long compilation."""

import ctypes
import pathlib

import jax
import numpy as np
import pytest

from sera_jax import memory

PIECES, PIECE = 4000, 2**16  # blocks that the C library takes from its own store, not each from the system


def resident_bytes():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


def leave_holes():
    """Bytes freed between small blocks that stay, which are returned too."""
    pieces = [(np.ones(PIECE, np.uint8), np.ones(2000, np.uint8)) for _ in range(PIECES)]
    return PIECES * PIECE, [small for _, small in pieces]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
@pytest.mark.parametrize("seconds", [None, 0.5, 2.0])
def test_what_is_free_is_given_back_when_asked_and_after_long_compilations_only(seconds, monkeypatch):
    listeners = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    memory.trim_after_compilations()
    freed, small = leave_holes()
    held = resident_bytes()
    if seconds is None:
        memory.trim()
    else:
        listeners[0]("/jax/core/compile/backend_compile_duration", seconds, fun_name="step")
    given_back = held - resident_bytes()
    assert len(small) == PIECES
    assert (given_back > 0.8 * freed) == (seconds != 0.5)
