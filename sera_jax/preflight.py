"""`python -m sera_jax.preflight --config=configs/NAME.py --topology=v5e:4x4 [--config.group.field=value ...]`: what
every phase of a run takes of devices that need not be there, and about how long it runs. Nothing is run.

Exit codes: 0 every phase fits; 1 one does not, with the override that makes it fit where there is one, or a law does
not hold on a tiny copy of the config; 2 the flags, the config or the topology are refused, or the TPU compiler is not
installed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

from absl import app, flags

from sera_jax.main import CONFIG, parse_flags
from sera_jax.stop import EXIT_REFUSED

EXIT_MISFIT = 1

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "v5e:4x4, v5p:2x2x4 and so on (the TPU compiler), cpu:8, or gpu:h100:8 (an estimate)."
)
_OUT = flags.DEFINE_string("out", "", "A folder for the report as preflight.json and preflight.png.")
_LIMIT = flags.DEFINE_float("limit_gib", None, "GiB of each device, in place of what the compiler or the host has.", 0)
_ONLY = flags.DEFINE_list("only", [], "Phases to look at, by the beginning of their names; all else is left out.")
_SEARCH = flags.DEFINE_bool(
    "search", True, "Look for an override where a phase does not fit; each try is a compilation."
)
_CHECK = flags.DEFINE_bool(
    "check", True, "Try on a tiny copy of the config, and on the first rows, what must hold of it."
)
_PEAK = flags.DEFINE_float("share_of_peak", 0.4, "Share of the chip's FLOP/s that is assumed to be reached.", 0.001, 1)
_BANDWIDTH = flags.DEFINE_float("share_of_bandwidth", 0.6, "The same of its memory's bandwidth.", 0.001, 1)
_LENGTH = flags.DEFINE_float("mean_length", 1.0, "Mean length of rows' texts, of the longest admitted.", 0.001, 1)


def main(argv: list[str]) -> None:
    """Look ahead as the flags ask; ends the process with the exit codes above where not all fits."""
    from sera_jax.aot import topology
    from sera_jax.aot.chips import GIB
    from sera_jax.experiment.brought import survey
    from sera_jax.experiment.methods import parse

    try:
        config = survey(parse(CONFIG.value), with_rows=False).config
        limit = None if _LIMIT.value is None else int(_LIMIT.value * GIB)
        facts = look(config, topology.find(_TOPOLOGY.value or "", limit))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    if not facts["fits"] or not all(law["holds"] for law in facts["laws"]):
        sys.exit(EXIT_MISFIT)


def look(config: Any, topology: Any) -> dict[str, Any]:
    """The report, printed, and written where --out says."""
    from sera_jax.aot import report
    from sera_jax.aot.measure import measure_all
    from sera_jax.checkpoint.papers import write_json
    from sera_jax.experiment.ahead import programs_of
    from sera_jax.experiment.assembly import attention_in_words
    from sera_jax.experiment.levers import search
    from sera_jax.experiment.rehearsal import rehearse, said

    programs, mesh, planned = programs_of(config, topology)
    for line in attention_in_words(planned.given.config, planned.given.runtime.cfg, mesh):
        _say(line)
    names = [program.name for program in programs]
    wanted = {name for name in names if not _ONLY.value or name.startswith(tuple(_ONLY.value))}
    if not wanted:
        raise ValueError(f"--only={','.join(_ONLY.value)} names none of the phases: {'; '.join(names)}")
    rows = measure_all(programs, topology, mesh, wanted=wanted.__contains__, say=_say)
    shares = report.Shares(_PEAK.value, _BANDWIDTH.value, _LENGTH.value)
    known = dict(config=_named(), assumed=planned.sizes.assumed, left_out=len(names) - len(rows))
    facts = report.report(rows, topology, shares, **known)
    print("\n".join([report.table(facts), "", *report.verdict(facts)]), flush=True)
    misfits = {row.name for row in rows if not row.fits}
    failing = [program for program in programs if program.name in misfits]
    if failing and _SEARCH.value:
        changes, stuck = search(config, topology, failing, _say)
        facts["overrides"] = [f"--config.{change.field}={change.value}" for change in changes]
        if changes:
            print(f"fits with: {' '.join(facts['overrides'])}")
            for row in (row for change in changes for row in change.rows):
                print(f"  {row.name}: {row.total / 2**30:.2f} GiB")
        if stuck:
            print(f"no override makes {', '.join(stuck)} fit; take more devices, or another mesh")
    laws = rehearse(planned) if _CHECK.value else []
    said(laws, print)
    facts["laws"] = [dataclasses.asdict(law) for law in laws]
    if _OUT.value:
        folder = pathlib.Path(_OUT.value)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "preflight.json", facts)
        report.draw(facts, folder / "preflight.png")
        print(f"report: {folder / 'preflight.json'}, {folder / 'preflight.png'}")
    return facts


def _named() -> str:
    given = [argument.split("=", 1)[1] for argument in sys.argv if argument.startswith("--config=")]
    return given[-1] if given else "config"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    flags.mark_flag_as_required("topology")
    app.run(main, flags_parser=parse_flags)
