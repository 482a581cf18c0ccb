"""A work directory of phases: each writes its product once, under a manifest, and is skipped when it is there.

A product appears by one rename, so it is whole or absent. Its manifest holds what it was made from; a product made from
something else is an error, never reused and never overwritten.

Of several processes (`hosts`) the first holds the folder, decides what is there and what is made, and writes all but
arrays; the others read what it wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from sera_jax import hosts, memory, whole
from sera_jax.checkpoint.code import check_versions, history_of, versions, with_present
from sera_jax.checkpoint.lock import METRICS, StaleWorkdir, has_results, lock
from sera_jax.config.identity import is_same, known_inputs

if TYPE_CHECKING:
    from sera_jax.checkpoint.shared import SharedPhases

DIGESTS = "digests.json"  # of the files that a finished run left beside phases and checkpoints


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


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists, what JSON does not know is its text."""
    return json.loads(json.dumps(value, default=str))


def first_difference(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Where two sets of inputs, which are not the same, part: the first field by name."""
    field, (old, new) = next(iter(_differences(there, now).items()))
    return f"first difference {field}: {old!r} there, {new!r} now"


def _differences(there: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """field -> its value there and now, of every field that differs, by name."""
    old, new = flatten(there), flatten(now)
    return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def file_digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON so that the file is whole or absent; the first process does."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True, default=str).encode())


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object of a file that only remembers: {} where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_json(path: pathlib.Path, way_out: str, *names: str) -> dict[str, Any]:
    """The object of a file that must be there, and must hold these names.

    Raises:
        ValueError: it cannot be read, or is not that; the message ends in the way out.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {way_out}") from error
    if not isinstance(found, dict) or not found.keys() >= set(names):
        raise ValueError(f"{path} is damaged: it is no object with {', '.join(names) or 'names'}; {way_out}")
    return found


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The object with a digest of itself, which tells when it is no longer what was written."""
    return value | {"digest": digest_of(value)}


def is_whole(found: dict[str, Any]) -> bool:
    """Whether an object is as `sealed` made it."""
    return found.get("digest") == digest_of({name: value for name, value in found.items() if name != "digest"})


def load_sealed(path: pathlib.Path, way_out: str, *names: str) -> dict[str, Any]:
    """`load_json` of what `sealed` made. Raises ValueError also where it is not what was written."""
    found = load_json(path, way_out, *names, "digest")
    if not is_whole(found):
        raise ValueError(f"{path} is not what was written; {way_out}")
    return found


def write_jsonl(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line so that the file is whole or absent; the first process does."""
    write_whole(path, b"".join(_line(row) + b"\n" for row in rows))


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a user's own field may hold, can be written escaped only
        return json.dumps(row, default=str).encode()


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Write a file so that it is whole or absent; the first process does."""
    if not hosts.is_first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write_bytes(path, data)


class Workdir:
    """`root/config.json`, `root/phases/NAME/` per finished phase, `root/checkpoints/NAME/` while one is training.

    Attributes:
        notes: lines for the user: fields and versions that changed since the run was started and that may.
        code: the versions that were at work in it, the present ones last.
        done: products of the phases that were asked for; fresh: names of those made by this process; taken: of those
            that came from `shared`.
        keeps_states: whether states that nothing reads any more are kept (`retention`).
        watch: called with the name of every phase that is asked for, and whether its product lies there already.
        shared: products of other work directories, taken where they are the same; None: there are none.
    """

    _lock: Any = None  # of the first process

    def __init__(self, root: pathlib.Path, config: dict[str, Any], *, allow_other_versions: bool = False):
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
        self.keeps_states = False
        self.watch: Callable[[str, bool], None] = lambda name, finished: None
        self.shared: SharedPhases | None = None
        self._config = plain({k: v for k, v in config.items() if k != "workdir"})
        self._begun = False
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
        produce: Callable[[pathlib.Path], None],
        way_out: str = memory.WAY_OUT,
        *,
        alone: bool = False,
    ) -> Product:
        """The product of phase `name`: as it lies there, or made now by `produce(folder)`.

        Args:
            inputs: JSON-able; everything the product depends on (digests of products, settings).
            produce: writes its files into the folder it is given. Every process does it; only the first is to write
                anything but trees of arrays.
            way_out: what to lower where it runs out of memory.
            alone: the first process does it alone, as it asks for no device.

        Raises:
            StaleWorkdir: the product there was made from other inputs.
            ValueError: a file of the product is not what the manifest says, or the manifest cannot be read.
        """
        inputs = plain(inputs)
        folder = self.root / "phases" / name
        start = hosts.on_first(lambda: self._start(name, inputs, folder))
        if hosts.count() > 1 and start.asked != digest_of(inputs):
            raise ValueError(f"phase {name} has other inputs in another process; start all with the same command")
        product = start.product
        self.watch(name, product is not None or start.taken)
        if product is None:
            if start.taken:
                self.taken.append(name)
            else:
                act = functools.partial(make, name, torn_of(folder), inputs, produce, way_out)
                hosts.on_first(act) if alone else act()
                hosts.barrier()  # each may have written its part
                self.fresh.append(name)
            product = hosts.on_first(lambda: self._keep(name, inputs, folder, start))
        self.done[name] = product
        return product

    def _start(self, name: str, inputs: dict[str, Any], folder: pathlib.Path) -> _Start:
        """What is there of a phase; where that is nothing, an empty folder to make it in, or to take it into."""
        asked = digest_of(inputs)
        if product := self.find(inputs, folder):
            shutil.rmtree(self.checkpoints(name), ignore_errors=True)  # a kill may have come between rename and this
            return _Start(asked, product)
        self.begin()
        torn = fresh_torn(folder)
        # a checkpoint may be of other versions, or of another machine
        from_start = not any(self.checkpoints(name).glob("[0-9]*"))
        return _Start(asked, None, from_start, taken=self.shared is not None and self.shared.take(name, inputs, torn))

    def _keep(self, name: str, inputs: dict[str, Any], folder: pathlib.Path, start: _Start) -> Product:
        """Let a product appear that is whole, and what led to it go."""
        product = keep(folder)
        if self.shared and not start.taken and start.from_start:
            self.shared.give(name, inputs, folder)
        shutil.rmtree(self.checkpoints(name), ignore_errors=True)
        return product

    def find(self, inputs: dict[str, Any], folder: pathlib.Path) -> Product | None:
        """The product that lies in a folder; None where there is none. Errors as of `phase`."""
        _finish_move(folder)
        if not (folder / "manifest.json").exists():
            if folder.is_dir() and any(folder.iterdir()):
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
    whole.appear(torn_of(folder), folder, last="manifest.json")
    return product_of(folder, read_json(folder / "manifest.json"))


def _finish_move(folder: pathlib.Path) -> None:
    """Where files of a product were being moved, or its manifest written again, as on a mounted bucket, do the rest."""
    torn, rewritten = torn_of(folder), folder / "manifest.json.tmp"
    if folder.is_dir() and (torn / "manifest.json").exists():
        whole.move_files(torn, folder, last="manifest.json")
    elif is_whole(read_json(rewritten)):
        whole.appear(rewritten, folder / "manifest.json")


def make(
    name: str, folder: pathlib.Path, inputs: dict[str, Any], produce: Callable[[pathlib.Path], None], way_out: str
) -> None:
    """Fill the folder, and write its manifest."""
    start = time.monotonic()
    with memory.named(f"phase {name}", way_out):
        produce(folder)
    memory.trim()
    if not hosts.is_first():
        return
    manifest = {
        "inputs": inputs,
        **_contents(folder),
        "seconds": round(time.monotonic() - start, 3),
        "versions": versions(),
    }
    write_json(folder / "manifest.json", sealed(manifest))


def check_config(root: pathlib.Path, config: dict[str, Any]) -> list[str]:
    """Refuse a config of another identity than that of the results; lines on what else differs."""
    path = root / "config.json"
    if not path.exists():
        raise StaleWorkdir(
            f"{root} holds results but no config.json, so nothing says whose they are; "
            "choose another --config.workdir, or delete this one"
        )
    way_out = "put back what the run was started with, or choose another --config.workdir"
    differ = _differences(load_json(path, way_out), config)
    changed = [k for k, (old, new) in differ.items() if not is_same(k, old, new)]
    if changed:
        shown = "; ".join("{}: {!r} there, {!r} now".format(k, *differ[k]) for k in changed[:5])
        raise StaleWorkdir(
            f"{root} was made with another configuration ({len(changed)} fields differ: {shown}); "
            "choose another --config.workdir, or delete this one"
        )
    return [f"config: {k} was {old!r}, now {new!r} (no part of the run's identity)" for k, (old, new) in differ.items()]


def _contents(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Of a new product: the digest of every file, and of the raw files of arrays, whose checksums are among those, the
    size."""
    found: dict[str, dict[str, Any]] = {"files": {}, "arrays": {}}
    for path in sorted(folder.rglob("*")):
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


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """path -> value of nested dicts, parts joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, part in value.items():
        out.update(flatten(part, f"{prefix}.{key}" if prefix else str(key)))
    return out
