"""Memory: free memory of the host goes back to the operating system; what surely cannot fit is refused in a line, and
what did not fit is said in one."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from sera_jax.compiling import COMPILATION

WAY_OUT = (
    "take more devices; or, under a new --config.workdir, a smaller model or another size that --help and "
    "configs/base.py have"
)
_SECONDS = 1.0  # a compilation that took less has left little behind
_MEMINFO = pathlib.Path("/proc/meminfo")
_OF_GROUP = pathlib.Path("/sys/fs/cgroup/memory.max")


class OutOfMemory(ValueError):
    """Something did not fit, or surely would not; the message says what, and what to lower."""


def trim(*, cycles: bool = False) -> None:
    """Give back what is free; where the C library is not glibc, do nothing.

    glibc keeps free memory that lies between blocks still in use: after a sampler's caches, of some MiB each, more than
    the parameters of the model; after the compilation of an update, a quarter of a GiB.

    Args:
        cycles: free first what only cycles of Python objects hold, as orbax leaves them after it has read a tree; takes
            a tenth of a second.
    """
    if cycles:
        gc.collect()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give_back is not None:
        give_back(0)


def trim_after_compilations() -> None:
    """From now on, give back what the compiler has freed before the program that it made first runs."""

    def listen(event: str, seconds: float, **_: str | int) -> None:
        if event == COMPILATION and seconds > _SECONDS:
            trim()

    jax.monitoring.register_event_duration_secs_listener(listen)


def host_bytes() -> int | None:
    """What a process of this host may hold at most, swap included; None where the system does not say."""
    try:
        lines = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
        total, swap = (1024 * int(lines[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, LookupError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no limit of a control group, or the word `max`
        total = min(total, int(_OF_GROUP.read_text()))
    return total + swap


def device_bytes(devices: Sequence[Any]) -> int | None:
    """What the devices may hold together; None where they do not say. CPU devices of one host share its memory."""
    if devices[0].platform == "cpu":
        one = host_bytes()
        return one and one * len({device.process_index for device in devices})
    stats = jax.local_devices()[0].memory_stats() or {}
    return len(devices) * stats["bytes_limit"] if "bytes_limit" in stats else None


def refuse_beyond(have: int | None, need: int, fields: str, what: str, *, where: str, way_out: str) -> None:
    """Raise OutOfMemory where `need` bytes are more than `have`; where that is not known, never.

    Args:
        fields: names and values that the need comes from; what: what they need it for; where: who has `have` bytes.
    """
    if have is not None and need > have:
        raise OutOfMemory(f"{fields}: {what} {in_units(need)}, more than the {in_units(have)} of {where}; {way_out}")


def in_units(number: int) -> str:
    """Bytes as people read them: 3.8 TiB."""
    size, units = float(number), ["TiB", "GiB", "MiB", "KiB", "bytes"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop()
    return f"{size:,.1f} {units[-1]}"


def ran_out(error: Exception) -> bool:
    """Whether it is what numpy, Python or XLA raises where memory is used up."""
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return exhausted or isinstance(error, MemoryError)


@contextlib.contextmanager
def named(doing: str, way_out: str) -> Iterator[None]:
    """Say in one line what ran out of memory within; the innermost name is kept.

    Raises:
        OutOfMemory: in place of the errors of numpy, Python and XLA that say so.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not ran_out(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise OutOfMemory(f"{doing} ran out of memory ({said}); {way_out}") from error
