"""`python -m sera_jax.study --config=studies/NAME.py`: many runs, and what comes out of them (docs/studies.md).

Each finished run leaves its rows; the same command does what is missing. Exit codes: 0 done; 1 some runs, which
are named, or the comparison failed; 2 the study is refused; 75 stopped, with its runs saved.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

from sera_jax.stop import EXIT_PREEMPTED, EXIT_REFUSED, StopOnSignal
from sera_jax.studies.plan import Run, Study, expand, load
from sera_jax.studies.pool import OUTPUT, Job, last_line, slots, work
from sera_jax.studies.rows import Key, Row, key_of, put_rows, read_rows, rows_of_run
from sera_jax.studies.shown import show

EXIT_FAILED = 1


def main(argv: Sequence[str] | None = None, *, stop_requested: Callable[[], bool] = lambda: False) -> int:
    """Read the command line, do what is missing of the study, compare what there is."""
    given = {name: value for name, value in vars(_parser().parse_args(argv)).items() if value is not None}
    try:
        return _run(load(given.pop("config"), **given), stop_requested)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED


def _run(study: Study, stop_requested: Callable[[], bool]) -> int:
    runs, kept, file = expand(study), read_rows(pathlib.Path(study.rows)), pathlib.Path(study.rows)
    wanted = {run.key: run for run in runs}
    done = _done(kept, wanted)
    missing = [run for key, run in wanted.items() if key not in done]
    places = slots(study.processes, study.threads)
    _say(f"{len(runs)} runs: {len(done)} in {file}, {len(missing)} to do, {len(places)} at a time")
    partly = {key_of(row) for row in kept} & wanted.keys() - done
    stale = {key for row in kept if (key := key_of(row)) in partly and row["identity"] != wanted[key].identity}
    for words, keys in (
        ("rows of another config or of other versions are made anew", stale),
        ("runs of which an arm has no row are made anew", partly - stale),
    ):
        if keys:
            _say(f"{words}: {', '.join(run.name for key, run in wanted.items() if key in keys)}")

    by_name, failed = {run.name: run for run in missing}, {}

    def ended(job: Job, code: int, seconds: float) -> None:
        nonlocal kept, done
        run = by_name[job.name]
        if code == EXIT_PREEMPTED and stop_requested():
            _say(f"{run.name}: stopped, and saved")
            return
        try:
            if code == EXIT_PREEMPTED:
                raise ValueError("it was stopped, but not by this command")
            if code:
                raise ValueError(last_line(job.workdir))
            kept = put_rows(file, run.key, rows_of_run(run, job.workdir), list(wanted))
        except ValueError as error:
            failed[run.name] = f"{error} (exit code {code}; all of it: {job.workdir / OUTPUT})"
            _say(f"{run.name}: failed: {failed[run.name]}")
            return
        done = _done(kept, wanted)
        _say(f"{run.name}: done after {seconds:.0f} s; {len(done)} of {len(runs)}")

    work([_job(study, run) for run in missing], places, stop_requested, ended)
    compared = _compare(study, [row for row in kept if key_of(row) in done])
    for name, words in failed.items():
        _say(f"failed: {name}: {words}")
    if stop_requested() and len(done) < len(runs):
        _say(f"stopped after {len(done)} of {len(runs)} runs; the same command goes on")
        return EXIT_PREEMPTED
    return 0 if compared and len(done) == len(runs) else EXIT_FAILED


def _done(rows: Sequence[Row], wanted: Mapping[Key, Run]) -> set[Key]:
    """The runs that have a row for each of their arms, and none of another config or of other versions."""
    arms: dict[Key, set[str]] = {}
    stale = set()
    for row in rows:
        key = key_of(row)
        arms.setdefault(key, set()).add(row["arm"])
        if key in wanted and row["identity"] != wanted[key].identity:
            stale.add(key)
    return {key for key, run in wanted.items() if key not in stale and arms.get(key, set()) >= set(run.arms)}


def _job(study: Study, run: Run) -> Job:
    root = pathlib.Path(study.workdir)
    workdir = root / run.folder
    program = shlex.split(study.launcher) or [sys.executable, "-m", "sera_jax.main"]
    flags = [
        f"--config={study.base}",
        f"--config.workdir={workdir}",
        f"--shared_phases={root / 'shared'}",
        *run.flags(),
    ]
    unless_set = {"LOGS": str((workdir / "logs").absolute())}  # where a launcher puts those of its processes
    return Job(run.name, [*program, *flags], workdir, run.start, unless_set)


def _compare(study: Study, rows: list[Row]) -> bool:
    """Show what the rows say, if they say something yet."""
    try:
        if rows:
            show(
                rows,
                study.metrics,
                arms=study.arms,
                baseline=study.baseline,
                panels=study.panels,
                curve=study.curve,
                smaller_is_better=study.smaller_is_better,
                out=pathlib.Path(study.workdir),
            )
    except (ValueError, OSError) as error:
        _say(f"no comparison yet: {error} (the rows are kept)")
        return False
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def true_or_false(text: str) -> bool:
    return bool(("false", "true").index(text.lower()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sera_jax.study", description="Run a study, or go on with it.", allow_abbrev=False
    )

    def several(kind: type) -> Callable[[str], tuple]:
        return lambda text: tuple(kind(part) for part in text.split(",") if part)

    def add(field: str, kind: Callable[[str], object], help: str) -> None:
        parser.add_argument(f"--config.{field}", dest=field, type=kind, help=help, metavar=field.upper())

    parser.add_argument("--config", required=True, help="studies/NAME.py")
    add("seeds", several(int), "instead of the file's: 0,1,2")
    add("arms", several(str), "those compared")
    add("metrics", several(str), "facts of an arm that are compared; the first ranks")
    add("smaller_is_better", true_or_false, "of the first metric: true or false")
    add("baseline", str, "an arm, a part of a setting's name, PART/ARM or SETTING/ARM")
    add("panels", str, "a field of the grid whose values are compared apart")
    add("curve", str, "a field, or a further one of the metrics, over whose values the picture draws lines")
    add("workdir", str, "folder of the runs")
    add("rows", str, "file of the rows")
    add("threads", int, "cores of each run")
    add("processes", int, "runs at a time; 0: as many as there are cores for")
    add("launcher", str, "a command that takes the flags of sera_jax.main, as those of launch/ do")
    return parser


if __name__ == "__main__":
    stop = StopOnSignal()
    sys.exit(main(stop_requested=stop))
