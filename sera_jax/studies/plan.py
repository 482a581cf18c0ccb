"""What a study is, and the runs that it expands into: settings x grid x seeds, each a config with overrides.

A file of studies/ defines `get_config()`, which returns a `Study`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import pathlib
import re
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sera_jax.checkpoint.code import versions
from sera_jax.checkpoint.papers import digest_of, flatten, plain
from sera_jax.config import check_field, to_dict
from sera_jax.config.identity import is_as_before, is_identity, known_as
from sera_jax.evaluation.comparison import check, parts_of, text_of
from sera_jax.experiment.methods import METHODS, parse

_START = ("method", "seed", "world", "model", "data", "pretrain", "sft", "mesh")  # what the SFT model is made from
COMPUTES = ("numerics", "jax", "flax", "optax")  # versions that runs of one study share
_FIXED = ("seed", "workdir")  # fields that the study itself sets


@dataclasses.dataclass(frozen=True)
class Study:
    """A study. Field names are those of a run's config, `data.label_noise`; a value is as the config holds it.

    base: the config file of all runs, with its variant if any. overrides: fields that all runs change.
    settings: name -> the fields that it changes. grid: field -> its values. Every setting is run at every point of the
        grid with every seed.
    arms: those compared; empty: all that the runs have.
    metrics: facts of an arm, as the rows name them, or MINE:BASELINES (docs/studies.md); the first one ranks.
    smaller_is_better: of the first metric.
    baseline: what differences are to, paired by seed: an arm (of the same setting), a part of a setting's name (the
        same arm, all other parts alike), that part's arm, PART/ARM, or SETTING/ARM, one for all; empty: none.
    panels: a field of the grid whose values are compared apart; empty: none.
    curve: a field, or a further one of the metrics, over whose values the picture draws a line for each arm; empty: a
        place for each setting.
    workdir, rows: the folder of the runs, and the file of their rows; empty: `runs/NAME` and
        `studies/results/NAME.jsonl`.
    threads: cores of each run. processes: runs at a time; 0: as many as there are cores for.
    launcher: a command that takes the flags of sera_jax.main after its own, `launch/slurm.sh --gpus-per-node=8`; empty:
        this interpreter.
    """

    base: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"": {}})
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    arms: Sequence[str] = ()
    metrics: Sequence[str] = ("gold_mean",)
    smaller_is_better: bool = False
    baseline: str = ""
    panels: str = ""
    curve: str = ""
    workdir: str = ""
    rows: str = ""
    threads: int = 1
    processes: int = 0
    launcher: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        varied: the fields of its setting and its point of the grid; overrides: all that it changes but the work
            directory.
        arms: those that it ends with, the SFT model first.
        identity: digest of what it computes, the same for all seeds; start: of what its SFT model is made from.
    """

    setting: str
    seed: int
    varied: dict[str, Any]
    overrides: dict[str, Any]
    arms: tuple[str, ...]
    identity: str
    start: str

    @property
    def key(self) -> tuple[str, int]:
        return self.setting, self.seed

    @property
    def name(self) -> str:
        return f"{self.setting}/seed{self.seed}" if self.setting else f"seed{self.seed}"

    @property
    def folder(self) -> str:
        """Below the study's; a setting that is changed gets another one. Sources of data give `,` and `=` a meaning."""
        setting = re.sub(r"[^-.\w]", "_", self.setting)[:100] or "runs"
        return f"{setting}-{self.identity[:8]}/seed{self.seed}"

    def flags(self) -> list[str]:
        """The overrides for the command line."""
        return [f"--config.{field}={text_of(value)}" for field, value in self.overrides.items()]


def load(path: str, **changes: Any) -> Study:
    """The study of a file, with these fields changed.

    Raises:
        ValueError: it cannot be read, or is no study.
    """
    study, name = _from_file(path), pathlib.Path(path).stem
    if not isinstance(study, Study):
        raise ValueError(
            f"{path}: get_config() gives a {type(study).__name__}; it must give a sera_jax.studies.plan.Study"
        )
    study = dataclasses.replace(study, **changes)
    for field, least in (("threads", 1), ("processes", 0)):
        if getattr(study, field) < least:
            raise ValueError(f"config.{field}={getattr(study, field)}; it must be at least {least}")
    return dataclasses.replace(
        study, workdir=study.workdir or f"runs/{name}", rows=study.rows or f"studies/results/{name}.jsonl"
    )


def expand(study: Study) -> list[Run]:
    """All runs, every seed of a setting before the next setting; every one of them has been parsed.

    Raises:
        ValueError: a field or a value that the config refuses; two runs of one name or of one config; no run; an arm, a
            baseline or a field of panels or of a curve that they do not have.
    """
    if not study.seeds or len(set(study.seeds)) != len(study.seeds):
        raise ValueError(f"config.seeds={tuple(study.seeds)!r}; give one at least, and each once")
    runs = [_run(study, *cell, seed) for cell in _cells(study) for seed in study.seeds]
    if not runs:
        raise ValueError("the study has no run: a field of its grid has no value, or it has no setting")
    for what, of in (("name", lambda run: run.name), ("config", lambda run: (run.identity, run.seed))):
        twice = [key for key, count in Counter(map(of, runs)).items() if count > 1]
        if twice:
            same = [run.name for run in runs if of(run) == twice[0]]
            raise ValueError(f"runs of one {what}: {' and '.join(same)}; change or remove one of their settings")
    there = dict.fromkeys((run.setting, arm) for run in runs for arm in run.arms)
    varied = {run.setting: run.varied for run in runs}
    check(
        there, varied, study.metrics, arms=study.arms, baseline=study.baseline, panels=study.panels, curve=study.curve
    )
    return runs


def setting_name(fields: Mapping[str, Any], among: Iterable[str]) -> str:
    """`label_noise=0.2,beta=0.1` of a setting's fields, each by its last part where that tells it from all `among`."""
    leaves = Counter(field.rpartition(".")[2] for field in among)
    return ",".join(parts_of(field, value)[leaves[field.rpartition(".")[2]] > 1] for field, value in fields.items())


def identity(config: Mapping[str, Any], code: Mapping[str, str]) -> str:
    """Digest of what a run of any seed computes: its config, where that counts, and the versions that compute."""
    fields = {
        name: known_as(name, value)
        for name, value in flatten(plain(config)).items()
        if is_identity(name) and name != "seed" and not is_as_before(name, value)
    }
    minor = {name: ".".join(str(code.get(name)).split(".")[:2]) for name in COMPUTES}
    return digest_of([fields, minor])


def _cells(study: Study) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields) of every setting at every point of the grid."""
    among = {field for fields in (study.grid, *study.settings.values()) for field in fields}
    for name, fields in study.settings.items():
        if not re.fullmatch(r"[\w.=+ -]*", name):
            raise ValueError(f"a setting is named {name!r}; use letters, digits, spaces and . = + - _")
        if both := fields.keys() & study.grid.keys():
            raise ValueError(f"{min(both)} is in the grid and in setting {name!r}; take it out of one of them")
        for values in itertools.product(*study.grid.values()):
            point = dict(zip(study.grid, values, strict=True))
            yield ",".join(filter(None, [name, setting_name(point, among)])), {**fields, **point}


def _run(study: Study, setting: str, varied: dict[str, Any], seed: int) -> Run:
    overrides = {**study.overrides, **varied}
    for field in overrides:
        if field in _FIXED:
            raise ValueError(f"config.{field} is set by the study; take it out of its overrides, settings and grid")
        check_field(field)
    overrides["seed"] = seed
    path, _, variant = study.base.partition(":")
    raw = _from_file(path, *filter(None, [variant]))
    try:
        raw.update_from_flattened_dict({**overrides, "workdir": study.workdir or "runs"})
        config = to_dict(parse(raw))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{setting or 'the study'}: {error}") from error
    start = {name: config[name] for name in _START}
    start["data"] = {name: value for name, value in start["data"].items() if name != "label_noise"}
    arms = ("sft", *config[METHODS[config["method"]].group]["arms"])
    return Run(setting, seed, varied, overrides, arms, identity(config, versions()), digest_of(start))


def _from_file(path: str, *arguments: str) -> Any:
    """What `get_config(*arguments)` of a file gives."""
    try:
        spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
        if spec is None or spec.loader is None:
            raise ValueError("no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(*arguments)
    except Exception as error:  # a file is a program, and may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
        place = f"{path}:{lines[-1]}" if lines else path
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
