"""A work directory of phases: each writes its product once, under a manifest, and is skipped when it is there.

A product appears by one rename, so it is whole or absent. Its manifest holds what it was made from; a product made from
something else is an error, never reused and never overwritten. Arrays may follow while the next phase is made: until
they are there the product has `unfinished.json` in the manifest's place, and whoever finds it so makes it anew.

Of several processes (`hosts`) the first holds the folder, decides what is there and what is made, and writes all but
arrays; the others read what it wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sera_jax import hosts, memory, whole
from sera_jax.checkpoint.arrays import begin_arrays, write_checksums
from sera_jax.checkpoint.code import check_versions, history_of, versions, with_present
from sera_jax.checkpoint.lock import METRICS, StaleWorkdir, has_results, lock
from sera_jax.checkpoint.papers import (
    differences,
    digest_of,
    file_digest,
    first_difference,
    is_whole,
    load_json,
    load_sealed,
    plain,
    read_json,
    sealed,
    write_json,
)
from sera_jax.config.identity import is_same, known_inputs

if TYPE_CHECKING:
    from sera_jax.checkpoint.shared import SharedPhases

DIGESTS = "digests.json"  # of the files that a finished run left beside phases and checkpoints
UNFINISHED = "unfinished.json"  # what a manifest is called whose arrays are still being written

# Fills a folder with a product, of which it may return trees of arrays, by the name of the folder each is to lie in.
Produce = Callable[[pathlib.Path], Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Product:
    """A finished phase: its folder, a digest of what went in and came out, and how long it took."""

    path: pathlib.Path
    digest: str
    seconds: float

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())


class _Start(NamedTuple):
    """How a phase begins: digest of its inputs, the product where it lies there, made from its start or gone on with,
    taken from other runs."""

    asked: str
    product: Product | None
    from_start: bool = True
    taken: bool = False


class _Behind(NamedTuple):
    """A product that lies there but for its arrays; `writes` wait for those of each part."""

    name: str
    inputs: dict[str, Any]
    folder: pathlib.Path
    writes: dict[str, Callable[[], None]]
    may_give: bool


class Workdir:
    """`root/config.json`, `root/phases/NAME/` per finished phase, `root/checkpoints/NAME/` while one is training.

    Attributes:
        notes: lines for the user: fields and versions that changed since the run was started and that may.
        code: the versions that were at work in it, the present ones last.
        done: products of the phases that were asked for; fresh: names of those made by this process; taken: of those
            that came from `shared`.
        keeps_states: whether states that nothing reads any more are kept (`retention`).
        writes_behind: whether arrays may follow while the next phase is made (`settle`); else they are waited for.
        watch: called with the name of every phase that is asked for, and whether its product lies there already.
        shared: products of other work directories, taken where they are the same; None: there are none.
    """

    _lock: Any = None  # of the first process

    def __init__(
        self,
        root: pathlib.Path,
        config: dict[str, Any],
        *,
        allow_other_versions: bool = False,
        keeps_states: bool = False,
    ):
        """Open or make the work directory, and hold it; nothing in it is changed yet.

        Args:
            allow_other_versions: go on with results of another numerics version or minor release of a library.

        Raises:
            StaleWorkdir: when it was made with a configuration of another identity (`config.identity`), by other
                versions, or another process is at work in it.
            ValueError: no such folder can be made or written, or its config.json cannot be read.
        """
        self.root = root
        self.done: dict[str, Product] = {}
        self.fresh: list[str] = []
        self.taken: list[str] = []
        self.notes: list[str] = []
        self.keeps_states = keeps_states
        self.writes_behind = False
        self.watch: Callable[[str, bool], None] = lambda name, finished: None
        self.shared: SharedPhases | None = None
        self._config = plain({k: v for k, v in config.items() if k != "workdir"})
        self._begun = False
        self._behind: _Behind | None = None
        self.code = with_present(hosts.on_first(lambda: self._enter(allow_other_versions)), allow_other_versions)

    def _enter(self, allow_other_versions: bool) -> list[dict[str, Any]]:
        """Hold the folder, and refuse it where it is another's; the versions that were at work in it."""
        self._lock = lock(self.root)
        if not has_results(self.root):
            return []
        self.notes += check_config(self.root, self._config)
        history = history_of(read_json(self.root / "versions.json"))
        self.notes += check_versions(self.root, history, allow_other_versions)
        return history

    def begin(self) -> None:
        """Write down the config and the versions, once: before the first phase is made, and by who is about to change
        what a finished run left. Whatever may refuse the run without a phase comes before."""
        if not self._begun and hosts.is_first():
            write_json(self.root / "config.json", self._config)
            write_json(self.root / "versions.json", {"history": self.code})
            (self.root / DIGESTS).unlink(missing_ok=True)  # what it lists is about to change
        self._begun = True

    def checkpoints(self, name: str) -> pathlib.Path:
        return self.root / "checkpoints" / name

    def phase(
        self,
        name: str,
        inputs: dict[str, Any],
        produce: Produce,
        way_out: str = memory.WAY_OUT,
        *,
        alone: bool = False,
    ) -> Product:
        """The product of phase `name`: as it lies there, or made now by `produce(folder)`. Its small files may be read
        at once, its arrays after `settle`.

        Args:
            inputs: JSON-able; everything the product depends on (digests of products, settings).
            produce: writes its small files into the folder it is given, and returns its trees of arrays. Every process
                does it; only the first is to write.
            way_out: what to lower where it runs out of memory.
            alone: the first process does it alone, as it asks for no device.

        Raises:
            StaleWorkdir: the product there was made from other inputs.
            ValueError: a file of the product is not what the manifest says, or the manifest cannot be read.
            OSError: arrays of the phase before could not be written.
        """
        inputs = plain(inputs)
        folder = self.root / "phases" / name
        if self._behind is not None and self._behind.name == name:
            self.settle()
        start = hosts.on_first(lambda: self._start(name, inputs, folder))
        if hosts.count() > 1 and start.asked != digest_of(inputs):
            raise ValueError(f"phase {name} has other inputs in another process; start all with the same command")
        product = start.product
        self.watch(name, product is not None or start.taken)
        if product is None:
            trees: Mapping[str, Any] = {}
            if start.taken:
                self.taken.append(name)
            else:
                act = functools.partial(make, name, torn_of(folder), inputs, produce, way_out)
                trees = hosts.on_first(act) if alone else act()
                hosts.barrier()
                self.fresh.append(name)
            self.settle()  # products become whole in their order
            product = hosts.on_first(lambda: self._keep(name, inputs, folder, start, bool(trees)))
            if trees:
                with memory.named(f"phase {name}", way_out):
                    writes = {part: begin_arrays(folder / part, tree) for part, tree in trees.items()}
                self._behind = _Behind(name, inputs, folder, writes, may_give=start.from_start)
        self.done[name] = product
        if not self.writes_behind:
            self.settle()
        return self.done[name]

    def settle(self) -> None:
        """Wait for the arrays of the last product, which is whole then. All processes do it together.

        Raises:
            OSError: they could not be written; the product is made anew by the next start.
        """
        if self._behind is None:
            return
        behind, self._behind, begin = self._behind, None, time.monotonic()
        with contextlib.ExitStack() as all_of_them:  # where one fails, too
            for write in reversed(behind.writes.values()):
                all_of_them.callback(write)
        hosts.barrier()  # each has written its part
        self.done[behind.name] = hosts.on_first(lambda: self._finish(behind, time.monotonic() - begin))

    def _start(self, name: str, inputs: dict[str, Any], folder: pathlib.Path) -> _Start:
        """What is there of a phase; where that is nothing, an empty folder to make it in, or to take it into."""
        asked = digest_of(inputs)
        if product := self.find(inputs, folder):
            shutil.rmtree(self.checkpoints(name), ignore_errors=True)  # a kill may have come between rename and this
            return _Start(asked, product)
        self.begin()
        torn = torn_of(folder)
        if _is_unfinished(folder):
            torn.mkdir(parents=True, exist_ok=True)
            (torn / UNFINISHED).touch()  # says it while the folder goes
            shutil.rmtree(folder)
        fresh_torn(folder)
        # a checkpoint may be of other versions, or of another machine
        from_start = not any(self.checkpoints(name).glob("[0-9]*"))
        return _Start(asked, None, from_start, taken=self.shared is not None and self.shared.take(name, inputs, torn))

    def _keep(self, name: str, inputs: dict[str, Any], folder: pathlib.Path, start: _Start, behind: bool) -> Product:
        """Let a product appear; what led to it goes where no array of it is still `behind`."""
        product = keep(folder)
        if not behind:
            self._conclude(name, inputs, folder, start.from_start and not start.taken)
        return product

    def _finish(self, behind: _Behind, waited: float) -> Product:
        """The manifest of a product whose arrays are all there now."""
        about = load_sealed(behind.folder / UNFINISHED, to_make_anew(behind.folder), "seconds")
        found = [_contents(behind.folder, part)["arrays"] for part in behind.writes]  # phases may lie below by now
        about |= {"arrays": {name: size for sizes in found for name, size in sizes.items()}}
        about |= {"seconds": round(about["seconds"] + waited, 3)}
        _write_manifest(behind.folder, about)
        self._conclude(behind.name, behind.inputs, behind.folder, behind.may_give)
        return product_of(behind.folder, about)

    def _conclude(self, name: str, inputs: dict[str, Any], folder: pathlib.Path, may_give: bool) -> None:
        """Of a product that is whole: leave it for others, and let go what led to it."""
        if self.shared and may_give:
            self.shared.give(name, inputs, folder)
        shutil.rmtree(self.checkpoints(name), ignore_errors=True)

    def find(self, inputs: dict[str, Any], folder: pathlib.Path) -> Product | None:
        """The product that lies in a folder; None where there is none. Errors as of `phase`."""
        _finish_move(folder)
        if not (folder / "manifest.json").exists():
            if folder.is_dir() and any(folder.iterdir()) and not _is_unfinished(folder):
                raise ValueError(f"{folder / 'manifest.json'} is missing; {to_make_anew(folder)}")
            return None
        manifest = load_manifest(folder)
        if (there := known_inputs(manifest["inputs"])) != inputs:
            raise StaleWorkdir(
                f"{folder} was made from other inputs ({first_difference(there, inputs)}); "
                f"choose another --config.workdir, or delete {folder}, the phases after it and {self.root}/checkpoints"
            )
        for damage in damaged_files(folder, manifest):
            raise ValueError(damage)
        return product_of(folder, manifest)


def torn_of(folder: pathlib.Path) -> pathlib.Path:
    """Where a product is made."""
    return folder.with_name(folder.name + ".partial")


def fresh_torn(folder: pathlib.Path) -> pathlib.Path:
    """`torn_of`, empty."""
    shutil.rmtree(torn := torn_of(folder), ignore_errors=True)
    torn.mkdir(parents=True)
    return torn


def keep(folder: pathlib.Path) -> Product:
    """Let the product appear that was made in `torn_of(folder)`."""
    last = UNFINISHED if (torn_of(folder) / UNFINISHED).exists() else "manifest.json"
    whole.appear(torn_of(folder), folder, last=last)
    return product_of(folder, read_json(folder / last))


def _is_unfinished(folder: pathlib.Path) -> bool:
    """Whether a folder without a manifest is what a kill left of a product whose arrays were being written, or which
    was being moved before they were, or removed after."""
    return folder.is_dir() and any((where / UNFINISHED).exists() for where in (folder, torn_of(folder)))


def _finish_move(folder: pathlib.Path) -> None:
    """Where files of a product were being moved, or its manifest written again, as on a mounted bucket, do the rest."""
    torn, rewritten = torn_of(folder), folder / "manifest.json.tmp"
    if folder.is_dir() and (torn / "manifest.json").exists():
        whole.move_files(torn, folder, last="manifest.json")
    elif is_whole(read_json(rewritten)):
        whole.appear(rewritten, folder / "manifest.json")
    if (folder / UNFINISHED).exists() and is_whole(read_json(folder / "manifest.json")):
        (folder / UNFINISHED).unlink()


def make(name: str, folder: pathlib.Path, inputs: dict[str, Any], produce: Produce, way_out: str) -> Mapping[str, Any]:
    """Fill the folder, all but trees of arrays, which are returned, and write its manifest."""
    start = time.monotonic()
    with memory.named(f"phase {name}", way_out):
        trees = produce(folder) or {}
        for part, tree in trees.items():
            write_checksums(folder / part, tree)
    memory.trim()
    if hosts.is_first():
        about = {"inputs": inputs, "seconds": round(time.monotonic() - start, 3), "versions": versions()}
        _write_manifest(folder, about | _contents(folder), UNFINISHED if trees else "manifest.json")
    return trees


def _write_manifest(folder: pathlib.Path, about: dict[str, Any], name: str = "manifest.json") -> None:
    """Write it down, sealed; it takes the place of an unfinished one."""
    write_json(folder / name, sealed({key: value for key, value in about.items() if key != "digest"}))
    if name != UNFINISHED:
        (folder / UNFINISHED).unlink(missing_ok=True)


def check_config(root: pathlib.Path, config: dict[str, Any]) -> list[str]:
    """Refuse a config of another identity than that of the results; lines on what else differs."""
    path = root / "config.json"
    if not path.exists():
        raise StaleWorkdir(
            f"{root} holds results but no config.json, so nothing says whose they are; "
            "choose another --config.workdir, or delete this one"
        )
    way_out = "put back what the run was started with, or choose another --config.workdir"
    differ = differences(load_json(path, way_out), config)
    changed = [k for k, (old, new) in differ.items() if not is_same(k, old, new)]
    if changed:
        shown = "; ".join("{}: {!r} there, {!r} now".format(k, *differ[k]) for k in changed[:5])
        raise StaleWorkdir(
            f"{root} was made with another configuration ({len(changed)} fields differ: {shown}); "
            "choose another --config.workdir, or delete this one"
        )
    return [f"config: {k} was {old!r}, now {new!r} (no part of the run's identity)" for k, (old, new) in differ.items()]


def _contents(folder: pathlib.Path, part: str = "") -> dict[str, dict[str, Any]]:
    """Of a new product, or a part of it: the digest of every file, and of the raw files of arrays, whose checksums are
    among those, the size."""
    found: dict[str, dict[str, Any]] = {"files": {}, "arrays": {}}
    for path in sorted((folder / part).rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and "arrays" in name.parts:
            found["arrays"][str(name)] = path.stat().st_size
        elif path.is_file():
            found["files"][str(name)] = file_digest(path)
    return found


def load_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Of a product. Raises ValueError, with the way out, where it is damaged."""
    return load_sealed(folder / "manifest.json", to_make_anew(folder), "inputs", "files", "arrays", "seconds")


def damaged_files(folder: pathlib.Path, manifest: dict[str, Any]) -> Iterator[str]:
    """A line on every file of a product that is not what its manifest says, by its bytes or, for those of arrays, by
    its size alone, which costs nothing: what is in them is checked where they are read."""
    for file, expected in (manifest["files"] | manifest["arrays"]).items():
        path = folder / file
        if not path.is_file():
            yield f"{path} is missing; {to_make_anew(folder)}"
        elif expected != (path.stat().st_size if file in manifest["arrays"] else file_digest(path)):
            yield f"{path} is not what its manifest says; {to_make_anew(folder)}"


def to_make_anew(folder: pathlib.Path) -> str:
    return f"delete {folder} and start the same command again to make it anew"


def product_of(folder: pathlib.Path, manifest: dict[str, Any]) -> Product:
    files = {file: digest for file, digest in manifest["files"].items() if file != METRICS}
    return Product(folder, digest_of([manifest["inputs"], files]), manifest["seconds"])
