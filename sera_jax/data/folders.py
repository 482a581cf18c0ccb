"""Several files as one source: globs, folders of one split, data sets that datasets.save_to_disk wrote."""

from __future__ import annotations

import glob
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from sera_jax.data.rawrows import RawRow, Source

DATA_NAMES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "config.json")
_SPLIT = re.compile(r"(?:^|[-_.])(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)", re.IGNORECASE)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")


class FilesSource(Source):
    """The rows of several files, one after the other. Of those that are damaged the first is its failure."""

    def __init__(self, path: str, parts: Sequence[Source]):
        self.path, self._parts = path, parts
        self._stops = np.cumsum([len(part) for part in parts])
        self.failure = next((part.failure for part in parts if part.failure is not None), None)

    def __len__(self) -> int:
        return int(self._stops[-1])

    def files(self) -> list[str]:
        return [file for part in self._parts for file in part.files()]

    def rows(self, indices: Sequence[int] | np.ndarray) -> Iterator[RawRow]:
        where = np.searchsorted(self._stops, indices, side="right")
        for part, group in itertools.groupby(zip(where, indices, strict=True), key=lambda pair: pair[0]):
            first = int(self._stops[part - 1]) if part else 0
            yield from self._parts[part].rows([int(index) - first for _, index in group])


def is_glob(spec: str) -> bool:
    return any(mark in spec for mark in "*?[")


def matching(spec: str) -> list[pathlib.Path]:
    """The files of a glob, in order."""
    return sorted(path for path in map(pathlib.Path, glob.glob(spec)) if path.is_file())


def is_saved_dataset(folder: pathlib.Path) -> bool:
    """Whether datasets.save_to_disk wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def files_of(spec: str, field: str) -> list[pathlib.Path]:
    """The files of a glob or folder, in order; raises ValueError where there are none, several splits, or not all."""
    folder = pathlib.Path(spec)
    if is_saved_dataset(folder):
        return _saved(folder, field)
    if not folder.is_dir():
        found = matching(spec)
        if not found:
            raise ValueError(f"{field}: no file is called {spec!r}")
        return _whole(found, field)
    found = _data_files(folder) or (_data_files(folder / "data") if (folder / "data").is_dir() else [])
    if not found:
        raise ValueError(
            f"{field}: {spec!r} is a directory without dataset_info.json, so not a prepared tfds dataset, and without "
            f"files of rows ({', '.join(DATA_NAMES)}); give the file itself, or a glob such as {spec}/train-*.parquet"
        )
    kinds = {_plain(path).suffix.lower() for path in found}
    splits = {match[1].lower() if (match := _SPLIT.search(_plain(path).stem)) else "" for path in found}
    if len(kinds) > 1 or len(splits) > 1:
        what = "several kinds of files" if len(kinds) > 1 else "several splits"
        names = ", ".join(path.name for path in found[:4])
        raise ValueError(
            f"{field}: {spec!r} holds {what} ({names}); give a file, or a glob such as {spec}/train-*.parquet"
        )
    return _whole(found, field)


def _plain(path: pathlib.Path) -> pathlib.Path:
    """The name without that of the packer."""
    return path.with_suffix("") if path.suffix.lower() in (".gz", ".zst", ".zstd") else path


def _data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = (p for p in folder.iterdir() if p.is_file() and p.name not in _NO_DATA and not p.name.startswith("."))
    return sorted(path for path in found if _plain(path).suffix.lower() in DATA_NAMES)


def _whole(files: list[pathlib.Path], field: str) -> list[pathlib.Path]:
    """The files; raises ValueError where one of numbered shards is missing."""
    shards: dict[tuple[str, str], set[int]] = {}
    for path in files:
        if match := _SHARD.fullmatch(_plain(path).stem):
            shards.setdefault((str(path.parent / match[1]), match[3]), set()).add(int(match[2]))
    for (name, count), numbers in shards.items():
        if missing := sorted(set(range(int(count))) - numbers):
            raise ValueError(
                f"{field}: of the {int(count)} files {name}-*-of-{count} number {missing[0]:05d} is missing (and "
                f"{len(missing) - 1} more); get it, or give the files to be read, separated by commas"
            )
    return files


def _saved(folder: pathlib.Path, field: str) -> list[pathlib.Path]:
    """The Arrow files of a saved data set, of its train split where it has several."""
    if not (folder / "state.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if "train" not in splits and len(splits) != 1:
            raise ValueError(f"{field}: {str(folder)!r} has the splits {', '.join(splits)}; give the folder of one")
        folder = folder / ("train" if "train" in splits else splits[0])
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / part["filename"] for part in state["_data_files"]]
        picked = bool(state.get("_indices_files"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{field}: {str(folder / 'state.json')!r} is damaged ({error!r})") from error
    if picked:
        raise ValueError(
            f"{field}: {str(folder)!r} is a choice of rows of another data set; flatten_indices() it first"
        )
    if missing := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"{field}: {str(folder)!r} lacks {missing[0]}, which its state.json names")
    return files
