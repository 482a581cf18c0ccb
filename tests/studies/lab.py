"""A small study whose runs are a stand-in for sera_jax.main: it copies the summary that a test has prepared."""

import json
import pathlib
import sys

from configs.base import get_config
from sera_jax.checkpoint.code import versions
from sera_jax.config import to_dict
from sera_jax.experiment.methods import parse
from sera_jax.studies.plan import Run, Study, expand, load
from tests.loops.tiny import TINY

# Its prepared files: NAME.json is the summary; NAME.fails the line it fails with; NAME.waits makes it wait for SIGTERM;
# NAME.leaves makes it end as if that had come.
STAND_IN = """
import json, pathlib, signal, sys, time
prepared, workdir = pathlib.Path(sys.argv[1]), next(a.split("=", 1)[1] for a in sys.argv if "config.workdir=" in a)
workdir = pathlib.Path(workdir)
name = workdir.parent.name.rpartition("-")[0] + "_" + workdir.name
with (prepared / "log").open("a") as log:
    log.write(json.dumps([name, sys.argv[2:]]) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if (prepared / f"{name}.waits").exists():
    (prepared / f"{name}.waiting").touch()
    time.sleep(60)
if (prepared / f"{name}.leaves").exists():
    sys.exit(75)
if (prepared / f"{name}.fails").exists():
    print("error: " + (prepared / f"{name}.fails").read_text() + "\\n(--traceback shows where)", file=sys.stderr)
    sys.exit(2)
(workdir / "summary.json").write_text((prepared / f"{name}.json").read_text())
"""
FILE = """
from sera_jax.studies.plan import Study

def get_config():
    return Study(**{fields!r})
"""


class Lab:
    """A study file in a folder, and the summaries of its runs."""

    def __init__(self, folder: pathlib.Path, **fields) -> None:
        self.folder, self.prepared = folder, folder / "prepared"
        self.prepared.mkdir(parents=True)
        (folder / "stand_in.py").write_text(STAND_IN)
        self.write(**fields)

    def write(self, **fields) -> None:
        """The study file, and a summary for each of its runs."""
        study = {
            "base": "configs/base.py",
            "overrides": {**TINY, "sera.arms": ("daa", "sera")},
            "grid": {"data.label_noise": (0.0, 0.25)},
            "seeds": (0, 1, 2),
            "baseline": "daa",
            "workdir": str(self.folder / "runs"),
            "rows": str(self.folder / "rows.jsonl"),
            "launcher": f"{sys.executable} {self.folder}/stand_in.py {self.prepared}",
            "processes": 2,
            **fields,
        }
        (self.folder / "tiny.py").write_text(FILE.format(fields=study))
        for run in self.runs():
            summary = summary_of(run)
            (self.prepared / f"{run.folder.rpartition('-')[0]}_seed{run.seed}.json").write_text(json.dumps(summary))

    @property
    def flags(self) -> list[str]:
        return [f"--config={self.folder}/tiny.py"]

    def study(self) -> Study:
        return load(str(self.folder / "tiny.py"))

    def runs(self) -> list[Run]:
        return expand(self.study())

    def started(self) -> list[str]:
        """The runs that were started since this was last asked."""
        log = self.prepared / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line)[0] for line in lines]

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "rows.jsonl").read_text().splitlines()]


def config_of(run: Run) -> dict:
    raw = get_config()
    raw.update_from_flattened_dict({**run.overrides, "workdir": "runs"})
    return to_dict(parse(raw))


def summary_of(run: Run) -> dict:
    """As a run of two arms and two rounds writes it; `sera` has 0.1 more than `daa` in every seed."""
    gold = 0.5 + 0.05 * run.seed - run.overrides["data.label_noise"]
    arms = {"sft": gold / 2, "daa": gold, "sera": gold + 0.1}
    return {
        "arms": {
            arm: {"gold_mean": g, "gold_ci95": [g - 0.1, g + 0.1], "by": {"0": g, "0.5": 1}} for arm, g in arms.items()
        },
        "rounds": [{"arm": arm, "round": r, "gold_mean": arms[arm]} for arm in ("daa", "sera") for r in (1, 2)],
        "wall_seconds": {"sft": 1.5, "round1": 2.0},
        "config": config_of(run),
        "seed": run.seed,
        "versions": versions(),
    }
