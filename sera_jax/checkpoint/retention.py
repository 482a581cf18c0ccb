"""What a work directory does not keep: the state of an optimiser that only the phase after it reads.

Of a model of N parameters it is 8 N bytes and more, and an evaluation in the middle of a training leaves one.
"""

from __future__ import annotations

import pathlib
import shutil

from sera_jax import hosts
from sera_jax.checkpoint.papers import sealed, write_json
from sera_jax.checkpoint.phases import Workdir, load_manifest


def let_go(workdir: Workdir, folder: pathlib.Path, part: str) -> None:
    """Remove the arrays of a part of a finished product, unless the work directory keeps all. Their checksums stay, so
    the product has the digest that it had. A kill between is made good when this is asked for again."""
    workdir.settle()
    if workdir.keeps_states or not hosts.is_first():
        return
    manifest = load_manifest(folder)
    kept = {name: size for name, size in manifest["arrays"].items() if not name.startswith(f"{part}/")}
    if kept != manifest["arrays"]:
        gone = sorted({part, *manifest.get("let_go", ())})
        about = {name: value for name, value in manifest.items() if name != "digest"}
        write_json(folder / "manifest.json", sealed(about | {"arrays": kept, "let_go": gone}))
    shutil.rmtree(folder / part / "arrays", ignore_errors=True)


def check_kept(workdir: Workdir, folder: pathlib.Path, part: str) -> None:
    """Raises ValueError where the part was let go: what comes after it was finished once, and has been deleted. Else it
    may be read: it is on disk."""
    workdir.settle()
    if part in load_manifest(folder).get("let_go", ()):
        phases = workdir.root / "phases"
        arm = phases / folder.relative_to(phases).parts[0]
        raise ValueError(
            f"{folder} no longer has its {part}: it was let go when the phase after it was finished; delete {arm} to "
            "make all of it anew (--config.log.keep_states=True keeps such states)"
        )
