"""What is kept of a run: a row for each of its arms, a line of JSON each. Also made of any work directory.

A row holds the run's `setting`, `seed` and `arm`, the fields that tell its setting from others (`varied`), the
`identity` of its config (`plan.identity`), the `versions`, the run's `seconds`, and `metrics`: every number of the
arm by name, with `/` between the names of a fact that has parts, and `round2/` before those of its second round.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sera_jax.checkpoint.papers import flatten, load_json, plain, write_jsonl
from sera_jax.config.identity import is_identity
from sera_jax.experiment.methods import METHODS, method_of
from sera_jax.studies.plan import Run, identity, setting_name

Row = dict[str, Any]
Key = tuple[str, int]  # setting, seed
_ROW = {"setting": str, "seed": int, "arm": str, "varied": dict, "identity": str, "versions": dict, "metrics": dict}
_DIGITS = 6  # significant ones of a number
_NAMED = 3  # fields that may name a setting


def rows_of_run(run: Run, workdir: pathlib.Path) -> list[Row]:
    """The rows of a finished run.

    Raises:
        ValueError: there is no summary, or it is that of another config.
    """
    summary = _summary(workdir)
    if identity(summary["config"], summary["versions"]) != run.identity or summary["seed"] != run.seed:
        raise ValueError(f"{workdir}/summary.json is not of the config and versions of {run.name}")
    return _rows(summary, run.setting, run.varied)


def read_rows(path: pathlib.Path) -> list[Row]:
    """The rows of a file; [] where there is none.

    Raises:
        ValueError: a line is no row.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            missing = [name for name, kind in _ROW.items() if not isinstance(row[name], kind)]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number} is no row of a study ({error!r}); remove that line") from error
        if missing:
            raise ValueError(f"{path}:{number} is no row of a study ({', '.join(missing)}); remove that line")
        rows.append(row)
    return rows


def key_of(row: Row) -> Key:
    """What tells its run from the others of a study."""
    return row["setting"], row["seed"]


def put_rows(path: pathlib.Path, key: Key, fresh: Sequence[Row], order: Sequence[Key]) -> list[Row]:
    """Give a run these rows in a file, which other commands may write to at the same time; all rows that it then has.

    They stand in this order of runs; rows of other runs come last.

    Raises:
        ValueError: as `read_rows`.
    """
    places = {key: place for place, key in enumerate(order)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        rows = [*(row for row in read_rows(path) if key_of(row) != key), *fresh]
        rows.sort(key=lambda row: places.get(key_of(row), len(places)))
        write_jsonl(path, rows)
    return rows


@contextlib.contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
    """No other process is in such a block of this folder; where the file system has no locks, one may be."""
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def rows_of(paths: Sequence[str]) -> list[Row]:
    """The rows of work directories and files of rows, settings of work directories named by the fields that differ.

    Raises:
        ValueError: a path is neither; rows of a setting are of several configs; or one arm of a setting is there twice
            with the same seed.
    """
    folders, files = [], {}
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            folders.append(path)
        elif path.is_file():
            files[str(path)] = read_rows(path)
        else:
            raise ValueError(f"{path} does not exist; give work directories of runs, or files of rows")
    sources = {**files, "the work directories": _rows_of_workdirs(folders)}
    _check_configs(sources, {row["setting"] for rows in files.values() for row in rows})
    rows = [row for found in sources.values() for row in found]
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        key = (row["setting"], row["arm"], row["seed"])
        if key in seen:
            raise ValueError(f"arm {key[1]} of setting {key[0]!r} is there twice with seed {key[2]}; leave one out")
        seen.add(key)
    return rows


def _check_configs(sources: Mapping[str, Sequence[Row]], settings: set[str]) -> None:
    """Raises ValueError where rows of one of these settings were made from several configs, or by several versions."""
    first: dict[str, tuple[str, str]] = {}  # of each setting
    for place, rows in sources.items():
        for row in (row for row in rows if row["setting"] in settings):
            identity, where = first.setdefault(row["setting"], (row["identity"], place))
            if row["identity"] != identity:
                places = " and ".join(dict.fromkeys([where, place]))
                raise ValueError(
                    f"{places}: the rows of setting {row['setting']!r} are of several configs or versions; go on with "
                    "the study, which makes the old ones anew, or compare them apart"
                )


def _rows_of_workdirs(folders: Sequence[pathlib.Path]) -> list[Row]:
    """Runs whose configs differ in seed, arms and what is no identity only are of one setting."""
    summaries = [_summary(folder) for folder in folders]
    configs = [_fields(summary["config"]) for summary in summaries]
    names = dict.fromkeys(name for fields in configs for name in fields)
    differ = [name for name in names if len({str(fields.get(name)) for fields in configs}) > 1]
    first: dict[str, pathlib.Path] = {}  # of each setting
    rows = []
    for folder, summary, config in zip(folders, summaries, configs, strict=True):
        varied = {name: config[name] for name in differ if name in config}
        place = first.setdefault(str(varied), folder)
        rows += _rows(summary, setting_name(varied, differ) if len(differ) <= _NAMED else str(place), varied)
    return rows


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that tell settings apart, of those that the run's method reads."""
    method = method_of({"config": config})
    unread = {group for other in METHODS.values() for group in other.reads if group not in method.reads}
    fields = {name: value for name, value in flatten(plain(config)).items() if is_identity(name) and name != "seed"}
    return {n: v for n, v in fields.items() if n.split(".")[0] not in unread and not n.endswith(".arms")}


def _rows(summary: dict[str, Any], setting: str, varied: dict[str, Any]) -> list[Row]:
    common = {
        "setting": setting,
        "seed": summary["seed"],
        "varied": plain(varied),
        "identity": identity(summary["config"], summary["versions"]),
        "versions": summary["versions"],
        "seconds": round(sum(summary["wall_seconds"].values()), 1),
    }
    rows = []
    for arm, facts in summary["arms"].items():
        metrics = _numbers(facts)
        for round_ in (facts for facts in summary["rounds"] if facts["arm"] == arm):
            metrics |= _numbers({k: v for k, v in round_.items() if k != "round"}, f"round{round_['round']}/")
        rows.append({**common, "arm": arm, "metrics": metrics})
    return rows


def _numbers(facts: dict[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = float(f"{value:.{_DIGITS}g}")
    return found


def _summary(folder: pathlib.Path) -> dict[str, Any]:
    way_out = "finish the run: start its command again"
    return load_json(folder / "summary.json", way_out, "arms", "rounds", "config", "seed", "versions", "wall_seconds")
