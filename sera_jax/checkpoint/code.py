"""Which code was at work in a work directory: `versions.json` lists it, the newest last.

Results of another numerics version, or of another minor release of jax, flax or optax, may differ in more than the last
bits, so a run is not gone on with across them unless it is asked for; then the list says so.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
from typing import Any

import sera_jax
from sera_jax.checkpoint.lock import StaleWorkdir

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")
_MINOR = ("jax", "flax", "optax")  # compute: another minor release may compute otherwise
ALLOWED = "allowed"  # marks versions that went on with the work of others that differ in more than a note


def versions() -> dict[str, str]:
    """Of sera_jax, of its numerics, and of the libraries, by name."""
    ours = {"sera_jax": sera_jax.__version__, "numerics": str(sera_jax.NUMERICS)}
    return ours | {name: importlib.metadata.version(name) for name in LIBRARIES}


def differences(there: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs, in words: what stands against going on, and what is only worth a note."""
    grave, slight = [], []
    for name in (name for name in now if there.get(name) != now[name]):
        old = str(there.get(name, "unknown"))
        minor_alike = old.split(".")[:2] == now[name].split(".")[:2]
        against = name == "numerics" or (name in _MINOR and not minor_alike)
        (grave if against else slight).append(f"{name} {old} there, {now[name]} now")
    return grave, slight


def history_of(file: dict[str, Any]) -> list[dict[str, Any]]:
    """What a versions.json lists, whatever it holds."""
    found = file.get("history")
    return [seen for seen in found if isinstance(seen, dict)] if isinstance(found, list) else []


def check_versions(root: pathlib.Path, history: list[dict[str, Any]], allowed: bool) -> list[str]:
    """Lines on what differs from the versions that were last at work in a folder.

    Raises:
        StaleWorkdir: they compute otherwise, and that is not `allowed`.
    """
    grave, slight = differences(history[-1] if history else {}, versions())
    if grave and not allowed:
        raise StaleWorkdir(
            f"{root} was made by other versions ({'; '.join(grave)}), which may compute other numbers; install those, "
            "choose another --config.workdir, or go on with --allow_other_versions (it is recorded)"
        )
    return [f"versions: {difference}" for difference in [*grave, *slight]]


def with_present(history: list[dict[str, Any]], allowed: bool) -> list[dict[str, Any]]:
    """The list with the present code as its last entry."""
    now: dict[str, Any] = versions()
    last = {name: value for name, value in history[-1].items() if name != ALLOWED} if history else {}
    return history if last == now else [*history, now | ({ALLOWED: True} if allowed else {})]
