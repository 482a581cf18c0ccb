"""What a finished run leaves beside its phases: `digests.json` has the sha256 of each file, until a run goes on."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from sera_jax.checkpoint.papers import file_digest, load_sealed, sealed, write_json
from sera_jax.checkpoint.phases import DIGESTS

_WAY_OUT = "start the same command again, which writes it anew"
_NO_WAY_OUT = "no later start writes it anew, and nothing is computed from it"


def record(root: pathlib.Path, names: tuple[str, ...]) -> None:
    """Take the digests of the files, and of all in the folders, that are there by these names."""
    found = [path for name in names for path in (root / name, *sorted((root / name).rglob("*"))) if path.is_file()]
    write_json(root / DIGESTS, sealed({"files": {str(path.relative_to(root)): file_digest(path) for path in found}}))


def damages(root: pathlib.Path, written_once: tuple[str, ...]) -> Iterator[str]:
    """A line on each of the files that is no longer what a finished run left; `written_once`: names, or folders, of
    those that it writes as it goes."""
    if not (root / DIGESTS).exists():
        return
    try:
        files = load_sealed(root / DIGESTS, _WAY_OUT, "files")["files"]
    except ValueError as error:
        yield str(error)
        return
    for name, digest in files.items():
        way_out = _NO_WAY_OUT if pathlib.PurePath(name).parts[0] in written_once else _WAY_OUT
        if not (root / name).is_file():
            yield f"{root / name} is missing; {way_out}"
        elif file_digest(root / name) != digest:
            yield f"{root / name} is not what the run left; {way_out}"
