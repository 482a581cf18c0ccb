"""Free memory goes back to the operating system, at once and after a long compilation; what cannot fit is a line."""

import ctypes
import pathlib
import types

import jax
import jax.numpy as jnp
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


def test_a_host_has_its_memory_and_swap_or_what_its_control_group_may_take(tmp_path, monkeypatch):
    info, group = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_MEMINFO", info)
    monkeypatch.setattr(memory, "_OF_GROUP", group)
    assert memory.host_bytes() is None
    info.write_text("MemTotal:       4096 kB\nMemFree:  7 kB\nSwapTotal:  1024 kB\n")
    assert memory.host_bytes() == 5 * 2**20
    group.write_text("max\n")
    assert memory.host_bytes() == 5 * 2**20
    group.write_text(f"{2**20}\n")
    assert memory.host_bytes() == 2 * 2**20


def test_devices_have_what_they_say_and_cpu_devices_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "host_bytes", lambda: 7)
    cpus = [types.SimpleNamespace(platform="cpu", process_index=n // 4) for n in range(8)]
    assert memory.device_bytes(cpus) == 14
    gpus = [types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 80})] * 8
    monkeypatch.setattr(jax, "local_devices", lambda: gpus[:2])
    assert memory.device_bytes(gpus) == 640
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: None)])
    assert memory.device_bytes(gpus) is None


def test_what_is_larger_than_what_is_there_is_refused_and_nothing_where_that_is_unknown():
    say = {"where": "the devices", "way_out": "lower it"}
    memory.refuse_beyond(2**40, 2**40, "slots=9", "a cache of", **say)
    memory.refuse_beyond(None, 2**90, "slots=9", "a cache of", **say)
    with pytest.raises(memory.OutOfMemory) as error:
        memory.refuse_beyond(3 * 2**29, 2**50, "slots=9", "a cache of", **say)
    assert str(error.value) == "slots=9: a cache of 1,024.0 TiB, more than the 1.5 GiB of the devices; lower it"
    assert [memory.in_units(n) for n in (0, 1023, 1024, 2**30)] == ["0.0 bytes", "1,023.0 bytes", "1.0 KiB", "1.0 GiB"]


@pytest.mark.parametrize(
    "allocate",
    [lambda: np.zeros(2**52, np.int8), lambda: jax.jit(lambda: jnp.zeros(2**45, jnp.int8))(), lambda: bytearray(2**52)],
    ids=["numpy", "xla", "python"],
)
def test_what_runs_out_of_memory_is_one_line_with_the_innermost_name_and_what_to_lower(allocate):
    with pytest.raises(memory.OutOfMemory) as error, memory.named("the run", "a"), memory.named("sft", "lower b"):
        allocate()
    words = str(error.value)
    assert words.startswith("sft ran out of memory (") and words.endswith("); lower b") and "\n" not in words


def test_other_errors_keep_their_own_words():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.named("sft", "lower b"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
