"""Trees of arrays on disk: orbax writes and reads them, a checksum of our own proves them (orbax has none).

The checksum is computed where the arrays live, from integer sums that do not depend on order, so it is the same on any
mesh and costs no transfer.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sera_jax import hosts, memory, whole
from sera_jax.checkpoint.lock import StaleWorkdir
from sera_jax.checkpoint.papers import digest_of, first_difference, plain
from sera_jax.mesh import fetch

# what orbax has to say against something it raises as well; its log repeats that, with a traceback for each thread
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class CorruptCheckpoint(ValueError):
    """What was read from disk is not what was written."""


@contextlib.contextmanager
def reading(path: pathlib.Path, way_out: str) -> Iterator[None]:
    """Raises CorruptCheckpoint for whatever orbax makes of files that it cannot read: its errors have no common kind
    (some are bare Exceptions), and their first line tells enough. What the machine denies says nothing of the files."""
    _quieten()
    try:
        yield
    except Exception as error:
        _raise_what_the_machine_denied(error, path)
        words = (str(error).strip() or type(error).__name__).splitlines()[0].split(". See full")[0][:_SHOWN]
        raise CorruptCheckpoint(f"{path} cannot be read ({words}); {way_out}") from error


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    """Raises OSError for a full disk, which orbax reports in words."""
    _quieten()
    try:
        yield
    except Exception as error:
        _raise_what_the_machine_denied(error, path)
        raise


def _raise_what_the_machine_denied(error: Exception, path: pathlib.Path) -> None:
    """Raises memory that is used up and an error of the operating system as themselves, also where orbax has put the
    latter in words; does nothing for any other error, and where a file is not there."""
    if memory.ran_out(error):
        raise error
    if isinstance(error, OSError) and error.errno not in (None, *_NOT_THERE):
        raise error
    for number in _DENIED:
        if os.strerror(number) in str(error):
            raise OSError(number, os.strerror(number), str(path)) from error


@functools.cache
def _quieten() -> None:
    """From now on, where orbax fails, what it raises is all that is said: reads and writes that it leaves under way
    tell an event loop that is closed, in tracebacks of their own, then and later."""

    def quiet(hook: Callable[..., Any], *about: Any) -> None:
        if not any(words in f"{about} {getattr(about[0], 'object', '')}" for words in _LEFT_BEHIND):
            hook(*about)

    for name in ("excepthook", "unraisablehook"):
        setattr(sys, name, functools.partial(quiet, getattr(sys, name)))


FROM_THE_ONE_BEFORE = (
    "delete it and start the same command again: it goes on from the checkpoint before, or from the start of the phase"
)
_SHOWN = 160  # characters of an error of orbax
_LEFT_BEHIND = ("Event loop is closed", "_read_array_index")
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_DENIED = (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES, errno.ENOMEM)

_PIECE = 1 << 16  # elements of an array that are summed at a time
_FACTORS = ((0x9E3779B1, 0x85EBCA6B), (0xC2B2AE35, 0x27D4EB2F))  # of the two sums


def _mixed(bits: Any, place: Any, a: int, b: int) -> Any:
    """u32, of bits and their places in u32: numpy's arrays and jax's alike."""
    h = (bits ^ (place * np.uint32(a))) * np.uint32(b)
    h = h ^ (h >> np.uint32(15))
    h = (h + place) * np.uint32(a)
    return h ^ (h >> np.uint32(13))


def part_sum(part: np.ndarray, shape: Sequence[int], start: Sequence[int]) -> np.ndarray:
    """u32[2]: what a part of an array adds to the checksum that `checksums` gives for the whole; sums wrap around.

    Parts that tile the array may be added in any order, so each host can add those that it holds.

    Args:
        part: on the host, of as many axes as the array.
        shape: of the whole array. start: index of the part's first element in it.
    """
    if not shape:  # numpy counts overflows of a single number as mistakes
        return part_sum(part.reshape(1), (1,), (0,))
    place = np.zeros((), np.uint32)
    for axis, (begin, size) in enumerate(zip(start, part.shape, strict=True)):
        index = np.arange(begin, begin + size, dtype=np.uint64) * np.uint64(math.prod(shape[axis + 1 :]))
        place = place[..., None] + index.astype(np.uint32)
    bits = np.ascontiguousarray(part).view(f"uint{8 * part.dtype.itemsize}").astype(np.uint32)
    return np.array([np.sum(_mixed(bits, place, *factors), dtype=np.uint32) for factors in _FACTORS], np.uint32)


def sum_in_pieces(read: Callable[[int, int], np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """u32[2]: the checksum of an array that is read in pieces along its first axis.

    Args:
        read: the rows from a first to before a last; of a single number, whatever it is asked for.
    """
    if not shape:
        return part_sum(read(0, 1), (), ())
    total, rows = np.zeros(2, np.uint32), max(1, _PIECE // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        part = read(start, min(start + rows, shape[0]))
        total += part_sum(part, shape, (start, *(0 for _ in shape[1:])))
    return total


def _leaf_sum(x: jax.Array) -> jax.Array:
    """u32[2]: two order-free checksums of a leaf's bits and their places."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * stride

    # one reduction of both: a sum each would lay what it adds up in memory, twice the leaf
    mixed, zero = tuple(_mixed(bits, place, *factors) for factors in _FACTORS), jnp.uint32(0)
    axes = tuple(range(x.ndim))
    return jnp.stack(jax.lax.reduce(mixed, (zero, zero), lambda left, right: jax.tree.map(jnp.add, left, right), axes))


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    """u32[n, 2]: the checksums of every leaf, as one program: simulated devices abort where many small ones, each with
    a sum over devices, are in flight at once."""
    return jnp.stack([_leaf_sum(x) for x in leaves])


def checksums(tree: Any) -> dict[str, str]:
    """Sixteen hex digits for every leaf, by path.

    Args:
        tree: arrays where they are to stay: one that lies on the host goes whole to a device.
    """
    leaves = jax.tree.leaves_with_path(tree)
    together: dict[frozenset, list[int]] = {}  # leaves of a run share their devices; a program takes no others
    for place, (_, leaf) in enumerate(leaves):
        devices = leaf.sharding.device_set if isinstance(leaf, jax.Array) else ()
        together.setdefault(frozenset(devices), []).append(place)
    sums = np.zeros((len(leaves), 2), np.uint32)
    for places in together.values():
        sums[places] = fetch(_sums([leaves[place][1] for place in places]))
    return {jax.tree_util.keystr(path): f"{a:08x}{b:08x}" for (path, _), (a, b) in zip(leaves, sums, strict=True)}


def tree_digest(tree: Any) -> str:
    """One digest of a tree of arrays, the same on every mesh."""
    return hashlib.sha256(json.dumps(checksums(tree), sort_keys=True).encode()).hexdigest()


def digests_of_papers(inputs: dict[str, Any], notes: dict[str, Any]) -> dict[str, str]:
    """What stands among a checkpoint's checksums, whose names begin with . or [, for the JSON beside its arrays."""
    return {"inputs": digest_of(inputs), "notes": digest_of(notes)}


def _compare(found: dict[str, str], expected: dict[str, str], path: pathlib.Path) -> None:
    """Raises CorruptCheckpoint where the checksums of what was read are not those that were written."""
    bad = [name for name in found | expected if found.get(name) != expected.get(name)]
    if bad:
        raise CorruptCheckpoint(
            f"{path}: {len(bad)} of {len(found | expected)} arrays fail their checksum, first {bad[0]} "
            f"(expected {expected.get(bad[0])}, read {found.get(bad[0])}); delete {_whole(path)} "
            "and start the same command again to recompute it"
        )


def _whole(path: pathlib.Path) -> pathlib.Path:
    """What to delete so that a tree is made again: the phase it is a part of, or the tree itself."""
    return next((p for p in (path, *path.parents) if (p / "manifest.json").exists()), path)


def save_tree(path: pathlib.Path, tree: Any) -> None:
    """Write a tree to a new folder; returns when it is on disk."""
    write_checksums(path, tree)
    begin_arrays(path, tree)()


def write_checksums(path: pathlib.Path, tree: Any) -> None:
    """The checksums of a tree into the folder, new or empty, that is to hold it: by them it is known before it is
    written. The first process does."""
    sums = checksums(tree)
    if hosts.is_first():
        path.mkdir(parents=True, exist_ok=True)
        (path / "checksums.json").write_text(json.dumps(sums, indent=1))


def begin_arrays(path: pathlib.Path, tree: Any) -> Callable[[], None]:
    """Begin to write the arrays of a tree beside its checksums; what is returned waits until they are on disk. Each
    process writes what its devices hold, and all do both together.

    Where arrays lie on a device, its buffers may be donated as soon as this returns: what is written is a copy. In the
    host's memory they are written as they lie there.
    """
    path = path.absolute()
    apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=path.name)  # trees that are written at once
    with _writing(path), contextlib.ExitStack() as opened:
        checkpointer = ocp.StandardCheckpointer(temporary_path_class=_made_under(path), multiprocessing_options=apart)
        opened.enter_context(checkpointer)
        checkpointer.save(path / "arrays", tree)
        opened = opened.pop_all()

    def finish() -> None:
        with _writing(path), opened:
            checkpointer.wait_until_finished()

    return finish


def _made_under(folder: pathlib.Path) -> Any:
    """How orbax makes a folder whole or absent: by renaming it, or, where the file system does not, by a file in it."""
    renamed = hosts.on_first(lambda: whole.folders_can_be_renamed(folder))
    return None if renamed else ocp.path.atomicity.CommitFileTemporaryPath


def load_tree(path: pathlib.Path, abstract: Any) -> Any:
    """Read a tree that `save_tree` wrote, onto the shardings of `abstract`.

    Raises:
        CorruptCheckpoint: when an array does not match its checksum or cannot be read.
    """
    path = path.absolute()
    way_out = f"delete {_whole(path)} and start the same command again to recompute it"
    with reading(path, way_out), ocp.StandardCheckpointer() as checkpointer:
        expected = dict(json.loads((path / "checksums.json").read_text()))
        tree = checkpointer.restore(path / "arrays", abstract)
    _compare(checksums(tree), expected, path)
    return tree


class _Manager(ocp.CheckpointManager):
    """Saves when it is told to. JAX counts how often a process asks whether to stop, and orbax would put the number of
    a step there: the processes would then agree on a question that was asked already."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one phase under way: written in the background, atomic, the last few kept.

    Args:
        inputs: of the phase; each checkpoint holds them and is restored for no others. None: for whatever they are.
    """

    def __init__(self, path: pathlib.Path, keep: int, inputs: dict[str, Any] | None = None):
        self._path = path.absolute()
        self._inputs = None if inputs is None else plain(inputs)
        self.notes: dict[str, Any] = {}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, temporary_path_class=_made_under(self._path.parent)
        )
        self._manager = _Manager(self._path, options=options)

    def save(self, step: int, state: Any, notes: dict[str, Any] | None = None) -> None:
        """Start writing `state`, and notes beside it that JSON can hold; its buffers may be donated as soon as this
        returns.

        Where arrays lie in the host's memory, what is written is the state itself, and the next update could not reuse
        its buffers while that lasts: there it waits, and a second state is never held.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            sums=ocp.args.JsonSave(checksums(state) | digests_of_papers(self._inputs or {}, notes or {})),
            inputs=ocp.args.JsonSave(self._inputs or {}),
            notes=ocp.args.JsonSave(notes or {}),
        )
        with _writing(self._path):
            self._manager.save(step, args=args)
            if jax.default_backend() == "cpu":
                self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, abstract: Any) -> Any | None:
        """The newest state, verified; None when there is none. `notes` are then those beside it.

        Raises:
            CorruptCheckpoint: never falls back to an older one by itself.
            StaleWorkdir: it is of other inputs.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        where = self._path / str(step)
        json_item = ocp.args.JsonRestore()
        with reading(where, FROM_THE_ONE_BEFORE):
            inputs = self._manager.restore(step, args=ocp.args.Composite(inputs=json_item))["inputs"]
        if self._inputs is not None and inputs != self._inputs:
            raise StaleWorkdir(
                f"{where} is of a phase with other inputs ({first_difference(inputs, self._inputs)}); "
                f"choose another --config.workdir, or delete {self._path} to start that phase anew"
            )
        with reading(where, FROM_THE_ONE_BEFORE):
            state = ocp.args.StandardRestore(abstract)
            found = self._manager.restore(step, args=ocp.args.Composite(state=state, sums=json_item, notes=json_item))
        _compare(checksums(found["state"]) | digests_of_papers(inputs, found["notes"]), found["sums"], where)
        self.notes = found["notes"]
        return found["state"]

    def close(self) -> None:
        """Wait for what is being written."""
        with _writing(self._path):
            self._manager.wait_until_finished()
        self._manager.close()
