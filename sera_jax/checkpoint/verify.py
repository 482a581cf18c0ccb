"""Everything that the phases and checkpoints of a work directory hold, read and compared with what is written down of
it. Nothing is written, and no device is asked for: arrays are read to the host, a gigabyte at a time.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sera_jax.checkpoint.arrays import (
    FROM_THE_ONE_BEFORE,
    CorruptCheckpoint,
    digests_of_papers,
    reading,
    sum_in_pieces,
)
from sera_jax.checkpoint.phases import UNFINISHED, damaged_files, load_manifest, to_make_anew

COMMIT_SUCCESS_FILE = ocp.path.atomicity.COMMIT_SUCCESS_FILE
_AT_ONCE = 1 << 30  # bytes of arrays in memory


def phases(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of finished phases."""
    return sorted(path.parent for path in (root / "phases").rglob("manifest.json") if not _lies_in_unfinished(path))


def checkpoints(root: pathlib.Path) -> list[pathlib.Path]:
    """The folders of checkpoints, but for those of a finished phase, which is about to remove them, and, where a file
    of orbax's makes them whole, for one that has none."""
    found = [path for path in sorted((root / "checkpoints").rglob("*")) if path.name.isdigit() and path.is_dir()]
    marked = {path for path in found if (path / COMMIT_SUCCESS_FILE).exists()}
    by_file = {path.parent for path in marked}
    found = [path for path in found if path in marked or path.parent not in by_file]
    names = ((path, path.parent.relative_to(root / "checkpoints")) for path in found)
    return [path for path, name in names if not (root / "phases" / name / "manifest.json").exists()]


def strays(root: pathlib.Path) -> Iterator[str]:
    """A line on each folder below phases/ of which no manifest speaks: that of a phase, most likely, which lost its
    own."""
    below, known, unread = root / "phases", set(), []
    for folder in phases(root):
        known.add(folder / "manifest.json")
        try:
            manifest = load_manifest(folder)
        except ValueError:  # told by `damages_of_phase`
            unread.append(folder)
            continue
        known |= {folder / name for name in (*manifest["files"], *manifest["arrays"])}
    homes = {parent for path in known for parent in path.parents}
    lost = set()
    for path in below.rglob("*"):
        if path.is_file() and path not in known and not _lies_in_unfinished(path) and not {*path.parents} & {*unread}:
            highest = next(p for p in reversed((path, *path.parents)) if below in p.parents and p not in homes)
            lost.add(highest.parent if (highest / "checksums.json").exists() else highest)
    yield from (f"{path} stands in no manifest.json; {to_make_anew(path)}" for path in sorted(lost))


def _lies_in_unfinished(path: pathlib.Path) -> bool:
    """Whether it lies in what a kill left of a product."""
    return any(parent.name.endswith(".partial") or (parent / UNFINISHED).exists() for parent in path.parents)


def damages_of_phase(folder: pathlib.Path) -> Iterator[str]:
    """A line on each thing in a phase's folder that is not what was written, with the way out."""
    try:
        manifest = load_manifest(folder)
    except ValueError as error:
        yield str(error)
        return
    damaged = list(damaged_files(folder, manifest))
    yield from damaged
    gone = {f"{part}/checksums.json" for part in manifest.get("let_go", ())}
    for name in () if damaged else manifest["files"]:
        if pathlib.PurePath(name).name == "checksums.json" and name not in gone:
            sums = json.loads((folder / name).read_text())
            yield from _damaged_arrays((folder / name).parent / "arrays", sums, to_make_anew(folder))


def damages_of_checkpoint(folder: pathlib.Path) -> Iterator[str]:
    """The same for a checkpoint."""
    try:
        sums, *papers = (read_item(folder, name) for name in ("sums", "inputs", "notes"))
    except CorruptCheckpoint as error:
        yield str(error)
        return
    for name, digest in digests_of_papers(*papers).items():
        if sums.pop(name, None) != digest:
            yield f"{folder / name} is not what was written; {FROM_THE_ONE_BEFORE}"
    yield from _damaged_arrays(folder / "state", sums, FROM_THE_ONE_BEFORE)


def read_item(checkpoint: pathlib.Path, name: str) -> dict[str, Any]:
    """The JSON beside a checkpoint's arrays. Raises CorruptCheckpoint where it cannot be read."""
    with reading(checkpoint, FROM_THE_ONE_BEFORE):
        return dict(json.loads((checkpoint / name / "metadata").read_text()))


def _damaged_arrays(folder: pathlib.Path, expected: dict[str, str], way_out: str) -> Iterator[str]:
    """Lines on the arrays that orbax wrote into a folder, against their checksums by path."""
    try:
        with reading(folder, way_out):
            found = dict(_sums(folder))
    except CorruptCheckpoint as error:
        yield str(error)
        return
    named = {_plain_name(name): value for name, value in expected.items()}
    for name in sorted(name for name in found | named if found.get(name) != named.get(name)):
        yield f"{folder}: array {name} fails its checksum; {way_out}"


def _sums(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(name, checksum) of every array below a folder."""
    handler = ocp.PyTreeCheckpointHandler()
    about: Any = handler.metadata(folder)
    leaves, structure = jax.tree.flatten_with_path(about.tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    how = structure.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves))
    for begin, end in _portions([np.dtype(leaf.dtype).itemsize * int(np.prod(leaf.shape)) for _, leaf in leaves]):
        wanted = [leaf if begin <= i < end else ocp.PLACEHOLDER for i, (_, leaf) in enumerate(leaves)]
        args = ocp.args.PyTreeRestore(item=structure.unflatten(wanted), restore_args=how)
        found = jax.tree.leaves(handler.restore(folder, args=args))
        for name, x in zip(names[begin:end], found[begin:end], strict=True):
            a, b = sum_in_pieces(lambda first, last, x=x: x[first:last] if x.shape else x, x.shape)
            yield name, f"{a:08x}{b:08x}"


def _portions(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, after the last) of neighbours that are read together."""
    begin = total = 0
    for i, size in enumerate(sizes):
        if i > begin and total + size > _AT_ONCE:
            yield begin, i
            begin, total = i, 0
        total += size
    if sizes:
        yield begin, len(sizes)


def _plain_name(key: str) -> str:
    """`.policy.opt_state[0]['embed']`, as jax names it, as orbax does: `policy.opt_state.0.embed`."""
    return ".".join("".join(parts) for parts in re.findall(r"\['(.*?)'\]|\.(\w+)|\[(\d+)\]", key))
