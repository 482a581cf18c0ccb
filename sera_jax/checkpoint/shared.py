"""Finished phases that work directories share: made by one, and taken by the others instead of making them again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from typing import Any

from sera_jax.checkpoint.code import versions
from sera_jax.checkpoint.phases import damaged_files, digest_of, load_manifest, plain


@dataclasses.dataclass(frozen=True)
class SharedPhases:
    """A folder of products, each under a digest of everything that it was made from.

    Files are linked, or copied where they cannot be: nothing writes into a product once it is finished.

    Attributes:
        names: the phases that are shared.
        besides: what their bytes depend on besides their own inputs and the versions; JSON-able.
    """

    root: pathlib.Path
    names: tuple[str, ...]
    besides: dict[str, Any]

    def take(self, name: str, inputs: dict[str, Any], folder: pathlib.Path) -> bool:
        """Lay the product of these inputs into `folder`, which is empty; False where there is none that is whole."""
        if name not in self.names or not _is_whole(place := self._place(name, inputs)):
            return False
        _link(place, folder)
        return True

    def give(self, name: str, inputs: dict[str, Any], folder: pathlib.Path) -> None:
        """Leave the product for others; the first one given stays."""
        if name not in self.names or (place := self._place(name, inputs)).exists():
            return
        torn = place.with_name(f"{place.name}.{os.getpid()}.partial")
        shutil.rmtree(torn, ignore_errors=True)
        _link(folder, torn)
        with contextlib.suppress(OSError):  # another run left its own in the meantime
            torn.rename(place)
        shutil.rmtree(torn, ignore_errors=True)

    def _place(self, name: str, inputs: dict[str, Any]) -> pathlib.Path:
        return self.root / f"{name}-{digest_of([plain(inputs), versions(), plain(self.besides)])[:32]}"


def _is_whole(folder: pathlib.Path) -> bool:
    try:
        return folder.exists() and not any(damaged_files(folder, load_manifest(folder)))
    except ValueError:  # its manifest is damaged
        return False


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
    shutil.copytree(source, target, copy_function=_link_file, dirs_exist_ok=True)


def _link_file(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another device, or a file system without links
        shutil.copy2(source, target)
