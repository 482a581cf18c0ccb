"""Products that are found by what they were made from: of other inputs another lies beside it.

They tie the work directory to no config, and are no part of what a run has done.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from sera_jax import hosts, memory
from sera_jax.checkpoint.lock import ADDRESSED
from sera_jax.checkpoint.papers import digest_of, plain
from sera_jax.checkpoint.phases import Product, Workdir, fresh_torn, keep, make


def addressed(workdir: Workdir, name: str, inputs: dict[str, Any], produce: Callable[[pathlib.Path], None]) -> Product:
    """The product of these inputs: as it lies there, taken from other runs (`Workdir.shared`), or made now by
    `produce(folder)`, by the first process alone.

    Raises:
        ValueError: a file of the product is not what its manifest says, or the manifest cannot be read; or what
            `produce` raises, of which nothing is left.
    """
    inputs = plain(inputs)
    folder = workdir.root / "phases" / ADDRESSED / f"{name}-{digest_of(inputs)[:16]}"
    shared, asked = workdir.shared, {"name": name, "inputs": inputs}

    def find_or_make() -> Product:
        if found := workdir.find(inputs, folder):
            return found
        torn = fresh_torn(folder)
        try:
            taken = shared is not None and shared.take(ADDRESSED, asked, torn)
            if not taken:
                make(f"{ADDRESSED}/{name}", torn, inputs, produce, memory.WAY_OUT)
        except BaseException:
            shutil.rmtree(torn, ignore_errors=True)
            raise
        product = keep(folder)
        if shared is not None and not taken:
            shared.give(ADDRESSED, asked, folder)
        return product

    return hosts.on_first(find_or_make)
