"""What a config names of the Hugging Face hub, brought here: folders in place of names, and rows by their commit.

A branch is asked for its commit once for a work directory, which remembers it: a run goes on with what it began with.
With several processes the first one decides and downloads; then each looks for itself, which asks for nothing where
they share the cache.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from sera_jax import hosts, hub
from sera_jax.checkpoint.papers import read_json, write_json
from sera_jax.config import Config, ModelGroup
from sera_jax.config.identity import is_as_before, known_as
from sera_jax.data import repository as data_sets
from sera_jax.data.sources import SUFFIXES, parse_mixture
from sera_jax.hub import Repository, Snapshot
from sera_jax.models import repository as models

RECORD = "hub.json"  # in the work directory: what was asked for -> its commit
SOURCES = ("train", "eval", "demonstrations", "pretrain", "prompts")  # fields of `data` that name rows
_WITH_WEIGHTS = ("model_name_or_path", "sft_model_path")
_TOKENIZER = "tokenizer_name_or_path"
Pins = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Brought:
    """A config whose names are looked up; weights and rows are still to be fetched (`bring`).

    Attributes:
        config: with folders of the hub's cache in place of names, and data sets by commit.
        commits: what was asked for, as `model org/name@revision` -> its commit.
        models, rows: what `bring` fetches.
    """

    config: Config
    commits: dict[str, str]
    models: tuple[Snapshot, ...] = ()
    rows: tuple[data_sets.Rows, ...] = ()


def survey(config: Config, root: pathlib.Path | None = None, *, with_rows: bool = True) -> Brought:
    """Look up what the config names of the hub; of models all but the weights is fetched, of data sets the README.

    Args:
        root: a work directory, whose commits of an earlier start are taken.
        with_rows: whether data sets are looked up, too.

    Raises:
        ValueError: one of them cannot be had or is not what it should be; or `model.revision` is of no repository.
    """
    asked, specs = _models(config.model), _specs(config) if with_rows else {}
    if not asked and not specs:
        return Brought(config, {})
    known = read_json(root / RECORD) if root else {}
    of_before = {key: commit for key, commit in known.items() if re.fullmatch("[0-9a-f]{40}", str(commit))}
    pins = hosts.on_first(lambda: _look(config, asked, specs, of_before).commits)
    return _look(config, asked, specs, pins)


def bring(brought: Brought, root: pathlib.Path, say: Callable[[str], None]) -> None:
    """Say which commits are used, write them down in the work directory, and fetch what is not here.

    Raises:
        ValueError: as `hub.fetch`.
    """
    if not brought.commits:
        return
    for name, commit in brought.commits.items():
        say(f"{name}: commit {commit}")
    write_json(root / RECORD, brought.commits)

    def fetch() -> None:
        for found in brought.models:
            hub.fetch(found, models.weights(found), say)
        for rows in brought.rows:
            data_sets.fetch(rows, say)

    hosts.on_first(fetch)
    if not hosts.is_first():
        fetch()


def model_folder(name: str) -> str:
    """The folder of a model that is named as `org/name[@revision]`, fetched; of any other name, the name itself.

    Raises:
        ValueError: as `survey`.
    """
    repository = hub.parse(name)
    if repository is None:
        return name
    found = models.look(repository, adapters=True)
    hub.fetch(found, models.weights(found), lambda text: print(text, file=sys.stderr, flush=True))
    return str(found.folder)


def named(model: ModelGroup) -> dict[str, Any]:
    """The group's fields for the inputs of a phase: folders of the hub's cache by repository and commit, wherever the
    cache lies, and younger fields only where they make a difference."""
    fields = {
        name: known_as(f"model.{name}", value)
        for name, value in dataclasses.asdict(model).items()
        if not is_as_before(f"model.{name}", value)
    }
    return fields | {name: hub.name_of(fields[name]) for name in (*_WITH_WEIGHTS, _TOKENIZER)}


def _models(model: ModelGroup) -> dict[str, Repository]:
    """field -> the repository that it names; fields that name none, or a folder that is here, are left out."""
    names = {field: getattr(model, field) for field in (*_WITH_WEIGHTS, _TOKENIZER)}
    found = {field: hub.parse(name, bare=field == _TOKENIZER) for field, name in names.items() if name}
    asked = {field: repository for field, repository in found.items() if repository}
    if not model.revision:
        return asked
    main = asked.get("model_name_or_path")
    if main is None:
        raise ValueError(
            f"config.model.revision={model.revision!r} is read of a repository of the hub only, and config.model."
            f"model_name_or_path={model.model_name_or_path!r} is none; empty it"
        )
    if main.revision not in ("", model.revision):
        raise ValueError(
            f"config.model.revision={model.revision!r} and model_name_or_path={model.model_name_or_path!r} name two "
            "revisions; empty one of them"
        )
    at = {field: r for field, r in asked.items() if r.id == main.id and not r.revision}
    return asked | {f: dataclasses.replace(r, revision=model.revision) for f, r in at.items()}


def _model(field: str, at: Repository) -> Snapshot:
    if field not in _WITH_WEIGHTS:
        return hub.look(at, models.SMALL)
    return models.look(at, adapters=field == "sft_model_path")


def _specs(config: Config) -> dict[str, list[tuple[str, float]]]:
    """field -> its mixture, of those that name a data set of the hub."""
    if config.world.name:
        return {}
    said = {field: getattr(config.data, field) for field in (*SOURCES, "benchmarks")}
    mixtures = {
        f: parse_mixture(spec, field=f"config.data.{f}") for f, spec in said.items() if data_sets.PREFIX in spec
    }
    return {f: parts for f, parts in mixtures.items() if any(name.startswith(data_sets.PREFIX) for name, _ in parts)}


def _look(
    config: Config, asked: Mapping[str, Repository], specs: Mapping[str, list[tuple[str, float]]], pins: Pins
) -> Brought:
    """All that is named, at the commits of `pins` where they say one."""
    commits: dict[str, str] = {}
    found: dict[str, Snapshot] = {}
    for field, repository in asked.items():
        key = f"model {repository}"
        at = dataclasses.replace(repository, revision=pins.get(key, repository.revision))
        try:
            found[field] = _model(field, at)
        except ValueError as error:
            raise ValueError(f"config.model.{field}={getattr(config.model, field)!r}: {error}") from error
        commits[key] = found[field].commit
    rows: dict[str, data_sets.Rows] = {}
    for field, parts in specs.items():
        for spec in [name for name, _ in parts if name.startswith(data_sets.PREFIX) and name not in rows]:
            try:
                repository, _ = data_sets.parse(spec)
                key = f"data set {repository}"
                at = f"{spec.split('@')[0]}@{pins[key]}" if key in pins else spec
                rows[spec] = data_sets.find(at, SUFFIXES)
            except ValueError as error:
                raise ValueError(f"config.data.{field}: {error}") from error
            commits[key] = rows[spec].snapshot.commit
    folders = {field: str(snapshot.folder) for field, snapshot in found.items()}
    pinned = {
        field: ",".join(f"{rows[name].pinned if name in rows else name}={weight!r}" for name, weight in parts)
        for field, parts in specs.items()
    }
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, revision="", **folders) if folders else config.model,
        data=dataclasses.replace(config.data, **pinned),
    )
    heavy = {str(found[field].folder): found[field] for field in _WITH_WEIGHTS if field in found}
    return Brought(config, commits, tuple(heavy.values()), tuple(rows.values()))
