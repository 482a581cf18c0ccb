"""Which code was at work in a work directory: `versions.json` lists it, the newest last.

Results of another numerics version, or of another minor release of jax, flax or optax, may differ in more than the last
bits, so a run is not gone on with across them unless it is asked for; then the list says so.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import sera_jax

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


def with_present(history: list[dict[str, Any]], allowed: bool) -> list[dict[str, Any]]:
    """The list with the present code as its last entry."""
    now: dict[str, Any] = versions()
    last = {name: value for name, value in history[-1].items() if name != ALLOWED} if history else {}
    return history if last == now else [*history, now | ({ALLOWED: True} if allowed else {})]
