"""Finished phases that work directories share: made by one, and taken by the others instead of making them again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from typing import Any

from sera_jax import whole
from sera_jax.checkpoint.code import versions
from sera_jax.checkpoint.papers import digest_of, plain
from sera_jax.checkpoint.phases import load_manifest
from sera_jax.checkpoint.verify import damages_of_phase


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
        """Lay the product of these inputs into `folder`, which is empty; False where there is none that is whole: all
        its arrays are read."""
        if name not in self.names or not _is_whole(place := self._place(name, inputs)):
            return False
        shutil.copytree(place, folder, copy_function=_link_file, dirs_exist_ok=True)
        return True

    def give(self, name: str, inputs: dict[str, Any], folder: pathlib.Path) -> None:
        """Leave a product for others that these versions made here, from its start. The first one given stays as long
        as it is whole."""
        if name not in self.names or _is_whole(place := self._place(name, inputs)):
            return
        self.root.mkdir(parents=True, exist_ok=True)
        torn = pathlib.Path(tempfile.mkdtemp(".partial", f"{place.name}.", self.root))
        manifest = load_manifest(folder)
        for file in ("manifest.json", *manifest["files"], *manifest["arrays"]):  # other phases may lie in the folder
            (torn / "whole" / file).parent.mkdir(parents=True, exist_ok=True)
            _link_file(folder / file, torn / "whole" / file)
        with contextlib.suppress(OSError):  # another run left its own in the meantime
            if place.exists():
                whole.appear(place, torn / "damaged")
            whole.appear(torn / "whole", place, last="manifest.json")
        shutil.rmtree(torn, ignore_errors=True)

    def _place(self, name: str, inputs: dict[str, Any]) -> pathlib.Path:
        return self.root / f"{name}-{digest_of([plain(inputs), versions(), plain(self.besides)])[:32]}"


def _is_whole(folder: pathlib.Path) -> bool:
    return folder.exists() and not any(damages_of_phase(folder))


def _link_file(source: str | os.PathLike, target: str | os.PathLike) -> None:
    try:
        os.link(source, target)
    except OSError:  # another device, or a file system without links
        shutil.copy2(source, target)
