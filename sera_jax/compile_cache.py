"""Compiled programs are kept in the user's cache folder, so that the next start of a command need not compile them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import sys
import time

import jax

from sera_jax import processor

FOLDER, SECONDS = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"  # JAX's own variables
DAYS = 30  # after which a program is compiled again


def use(*, processes: int = 1) -> None:
    """From now on JAX keeps what it compiles, and takes what was kept (its persistent compilation cache).

    Not where the environment names a folder, or none (empty): then that holds. Not in one of several processes: JAX
    lets the first alone write, and on GPUs those that find nothing wait for it to compile. Where the folder cannot be
    written, that is said, and nothing is kept. What is older than `DAYS` is deleted.
    """
    named = os.environ.get(FOLDER)
    if named == "":
        jax.config.update("jax_compilation_cache_dir", None)  # JAX takes it for the current folder in part
    if named is not None or processes > 1:
        return
    try:
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise PermissionError(f"{place} cannot be written")
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        print(
            f"compiled programs are not kept for the next start: {error}; name another folder in {FOLDER}, or none "
            "(empty), so that this is not tried",
            file=sys.stderr,
        )
        return
    for program in place.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process may delete it at the same time
            if time.time() - program.stat().st_mtime > DAYS * 24 * 3600:
                program.unlink()
    jax.config.update("jax_compilation_cache_dir", str(place))
    if SECONDS not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # JAX keeps what took a second and more


def folder() -> pathlib.Path:
    """Of this user, and of what JAX's keys do not hold: the machine code that this processor knows, and for how many
    cores a CPU's programs are cut up."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    known = hashlib.sha256(processor.instructions().encode()).hexdigest()[:8]
    return pathlib.Path(cache) / "sera_jax" / "compiled" / f"{platform.machine()}-{known}-{processor.cores()}"
