"""Data sets of the Hugging Face hub: `hub:NAME[:CONFIG][:SPLIT][@REVISION]`, and the files that such a name means.

What the repository's README lists as `configs:` counts; where it lists none, the usual layout does:

    data/train-00000-of-00002.parquet     split train (of the config `default`)
    train.jsonl, test_prefs.jsonl.gz      splits train, test_prefs
    CONFIG/train-00000-of-00002.parquet   config CONFIG, split train
    CONFIG/train/0000.parquet             the same, as the branch refs/convert/parquet has it
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from sera_jax import hub
from sera_jax.data.folders import FilesSource
from sera_jax.data.sources import SUFFIXES, open_source
from sera_jax.hub import Repository, Snapshot

PREFIX = "hub:"
SMALL = ("README.md", ".gitattributes")
DEFAULT = "default"
_SPEC = re.compile(r"hub:(?P<id>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(?P<parts>(:[^:@]+){0,2})(@(?P<revision>.+))?")
_PART = re.compile(r"(?P<split>.+?)?[-_.]?\d{4,5}(-of-(?P<count>\d{4,5}))?(-[0-9a-f]{8,})?")
Layout = dict[str, dict[str, list[str]]]  # config -> split -> files


@dataclasses.dataclass(frozen=True)
class Rows:
    """A split of a data set: `files` of the snapshot, in order, and the spec that names them by commit."""

    snapshot: Snapshot
    files: tuple[str, ...]
    pinned: str


def parse(spec: str) -> tuple[Repository, list[str]]:
    """The repository of a spec, and the config and split it names. Raises ValueError for another form."""
    match = _SPEC.fullmatch(spec)
    if not match:
        raise ValueError(f"{spec!r} is not understood; write hub:ORG/NAME, with :CONFIG, :SPLIT and @REVISION after it")
    return Repository(match["id"], match["revision"] or "", "dataset"), match["parts"].split(":")[1:]


def find(spec: str, suffixes: Sequence[str]) -> Rows:
    """The files that a spec means, by name; of the repository only its README is fetched.

    Args:
        suffixes: of the files that can be read, those before others where a split lies there in several forms.

    Raises:
        ValueError: the repository cannot be had; or has no such config or split, with those that it has.
    """
    repository, parts = parse(spec)
    found = hub.look(repository, SMALL)
    layout = _listed(found) or _usual(sorted(found.sizes), suffixes)
    if not layout:
        kinds = sorted({pathlib.PurePath(name).suffix for name in found.sizes} - {"", ".md", ".gitattributes"})
        raise ValueError(
            f"{repository} holds no {' or '.join(suffixes)} (but {', '.join(kinds) or 'nothing'}); see whether "
            f"hub:{repository.id}@refs/convert/parquet has them, or download and convert it"
        )
    config, split = _choose(repository, layout, parts)
    files = layout[config][split]
    if unread := [name for name in files if not name.endswith(tuple(suffixes))]:
        raise ValueError(
            f"{spec}: {hub.some(unread)} cannot be read (but {', '.join(suffixes)}); see whether "
            f"hub:{repository.id}@refs/convert/parquet has them, or download and convert it"
        )
    _check_whole(spec, files)
    return Rows(found, tuple(files), f"{PREFIX}{repository.id}:{config}:{split}@{found.commit}")


def fetch(rows: Rows, say: Callable[[str], None] = lambda text: None) -> list[str]:
    """Paths of the files, which are downloaded where they do not lie there. Raises ValueError as `hub.fetch`."""
    return hub.fetch(rows.snapshot, rows.files, say)


def _choose(repository: Repository, layout: Layout, parts: Sequence[str]) -> tuple[str, str]:
    """The (config, split) that is meant, where that is certain."""

    def refuse(what: str) -> ValueError:
        there = "; ".join(f"{name}: {hub.some(list(splits))}" for name, splits in list(layout.items())[:20])
        return ValueError(f"{repository}: {what}; its configs and splits are {there}")

    usual = DEFAULT if DEFAULT in layout else next(iter(layout)) if len(layout) == 1 else None
    if len(parts) == 2:
        config, split = parts
        if config not in layout:
            raise refuse(f"no config {config!r}")
    elif parts:
        (name,) = parts
        as_split = usual is not None and name in layout[usual]
        if name in layout and as_split and name != usual:
            raise refuse(f"{name!r} is a config and a split; name both, as CONFIG:SPLIT")
        if not as_split and name not in layout:
            raise refuse(f"no config or split {name!r}")
        config, split = (usual or "", name) if as_split else (name, "")
    else:
        if usual is None:
            raise refuse("several configs and none named")
        config, split = usual, ""
    splits = layout[config]
    split = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else "")
    if not split:
        raise refuse(f"config {config!r} has several splits and none named")
    if split not in splits:
        raise refuse(f"config {config!r} has no split {split!r}")
    return config, split


def _listed(found: Snapshot) -> Layout:
    """What the README's `configs:` say; {} where they say nothing. Raises ValueError where it cannot be read."""
    import huggingface_hub

    readme = found.folder / "README.md"
    if not readme.is_file():
        return {}
    try:
        said = (huggingface_hub.metadata_load(readme) or {}).get("configs") or []
    except Exception as error:  # as yaml names what is wrong
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"{found.repository}: the head of README.md cannot be read ({words})") from error
    layout: Layout = {}
    for config in [entry for entry in said if isinstance(entry, dict) and entry.get("data_files")]:
        splits = _splits_of(config["data_files"])
        folder = str(config.get("data_dir") or "").strip("/")
        chosen = {
            split: [name for name in sorted(found.sizes) if any(_matches(p, name, folder) for p in patterns)]
            for split, patterns in splits.items()
        }
        if chosen := {split: files for split, files in chosen.items() if files}:
            layout[str(config.get("config_name") or DEFAULT)] = chosen
    return layout


def _splits_of(files: Any) -> dict[str, list[str]]:
    """split -> patterns, of `data_files` in any of its forms."""
    if isinstance(files, str):
        return {"train": [files]}
    if isinstance(files, dict):
        return {str(split): [path] if isinstance(path, str) else list(path) for split, path in files.items()}
    found: dict[str, list[str]] = {}
    for entry in files:
        split, path = (
            (entry.get("split", "train"), entry.get("path", [])) if isinstance(entry, dict) else ("train", entry)
        )
        found.setdefault(str(split), []).extend([path] if isinstance(path, str) else path)
    return found


def _matches(pattern: str, name: str, folder: str) -> bool:
    """Whether a glob means the file: `*` within a folder, `**` across; `folder` is put before it."""
    pattern = f"{folder}/{pattern}" if folder else pattern
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    meant = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(meant.get(part) or re.escape(part) for part in parts), name) is not None


def _usual(names: Sequence[str], suffixes: Sequence[str]) -> Layout:
    """config -> split -> files, by their names."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name in names:
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), "")
        if not suffix:
            continue
        *folders, stem = name.removesuffix(suffix).split("/")
        folders = folders[1:] if folders[:1] == ["data"] else folders
        match = _PART.fullmatch(stem)
        split = (match["split"] or "") if match else stem
        if not split:  # a number alone: the folder is the split
            split = folders.pop() if folders else "train"
        found.setdefault(("/".join(folders) or DEFAULT, split), {}).setdefault(suffix, []).append(name)
    layout: Layout = {}
    for (config, split), forms in found.items():
        layout.setdefault(config, {})[split] = next(forms[suffix] for suffix in suffixes if suffix in forms)
    return layout


def _check_whole(spec: str, files: Sequence[str]) -> None:
    """Raises ValueError where parts that say how many there are are fewer: of a cache that lists nothing, say."""
    for name in files:
        match = _PART.fullmatch(pathlib.PurePath(name).name.split(".")[0])
        if match and match["count"] and len(files) < int(match["count"]):
            raise ValueError(f"{spec}: {len(files)} of the {int(match['count'])} parts of {name} are there; fetch all")


def open_rows(spec: str, field: str) -> FilesSource:
    """The source of a spec, downloaded where it does not lie here. Raises ValueError as `find` and `fetch`."""
    try:
        paths = fetch(find(spec, SUFFIXES))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    return FilesSource(spec, [open_source(path, field=field) for path in paths])
