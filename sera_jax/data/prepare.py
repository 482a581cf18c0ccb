"""Prepare rows once for random access: python -m sera_jax.data.prepare --input=a.jsonl,b.parquet --data_dir=prepared

Reads the rows, counts the bad ones by reason as a run would, writes the rest as a tfds data set (array_record) and
prints its directory, to be given as --config.data.train (or eval, demonstrations). The directory is named by a hash of
the contents: the same input is prepared once, a changed file never gives the old rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterator

from absl import app, flags

from sera_jax.data.columns import PAIRS, THOUGHTS, Reading
from sera_jax.data.loading import read_records
from sera_jax.data.records import AS_WRITTEN, PARSERS, Record
from sera_jax.data.report import LoadReport
from sera_jax.data.sources import content_hash, parse_mixture

KINDS = ("preference", "demonstration")
REPORT_NAME = "prepare"


def prepare(
    spec: str,
    *,
    kind: str,
    data_dir: str | pathlib.Path,
    max_bad_fraction: float = 0.05,
    seed: int = 0,
    reading: Reading = AS_WRITTEN,
) -> pathlib.Path:
    """Prepare a mixture, unless that was done before, and return its directory.

    The report of the rows is shown and written beside the data (`data/prepare.json`). Two processes may prepare the
    same at the same time: the one that ends first wins, and both return its directory.

    Args:
        spec: source or mixture, see sera_jax.data.sources.
        kind: `preference` or `demonstration`.
        data_dir: where prepared data sets lie.
        max_bad_fraction: more bad rows than this are an error.
        seed: of the shares that weights below 1 take.
        reading: of data.columns and data.thoughts.

    Raises:
        ValueError: an input that cannot be read, or an unknown kind.
        TooManyBadRows: the rows are not usable as they are; nothing is written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    from sera_jax.data import tfds_builders  # slow to import, and of no use to --help

    data_dir = pathlib.Path(data_dir).expanduser().absolute()
    mixture = parse_mixture(spec)
    parts = [
        [content_hash(name), weight, pathlib.PurePath(name).name if weight % 1 else ""] for name, weight in mixture
    ]
    fraction = seed if any(w % 1 for _, w in mixture) else None
    identity = json.dumps([tfds_builders.VERSION, kind, parts, fraction, reading.named()])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    report = LoadReport(REPORT_NAME, spec)

    def read() -> Iterator[Record]:
        records = []
        for source, _, record in read_records(spec, PARSERS[kind], report, seed=seed, reading=reading):
            report.kept += 1
            report.sources[source]["kept"] += 1
            records.append(record)
        report.finish(max_bad_fraction, None)
        print(report.table(), file=sys.stderr)
        return iter(records)

    builder = tfds_builders.BUILDERS[kind](digest=digest, read=read, data_dir=data_dir)
    done = pathlib.Path(builder.data_path)
    if (done / "dataset_info.json").is_file():
        return done
    try:
        builder.download_and_prepare()
    except (FileExistsError, OSError):
        # Another process renamed its finished directory into place first; its contents are the same.
        if not (done / "dataset_info.json").is_file():
            raise
    else:
        report.write(done)
    return done


def define_flags() -> None:
    """Flags of the command. Not at import: other commands may import this module and have flags of the same names."""
    flags.DEFINE_string(
        "input", None, "Source or mixture: files, prepared directories, tfds:NAME[:split].", required=True
    )
    flags.DEFINE_enum("kind", "preference", KINDS, "What the rows are.")
    flags.DEFINE_string("data_dir", None, "Directory for prepared data sets (local or mounted bucket).", required=True)
    flags.DEFINE_float("max_bad_fraction", 0.05, "More bad rows than this stop the preparation.", 0, 1)
    flags.DEFINE_string("columns", "", "Fields of other names, as data.columns.")
    flags.DEFINE_enum("thoughts", "keep", THOUGHTS, "As data.thoughts.")
    flags.DEFINE_enum("pairs", "best_worst", PAIRS, "As data.pairs.")
    flags.DEFINE_integer("seed", 0, "Seed of the shares that weights below 1 take.")


def main(argv: list[str]) -> None:
    """Entry point; stdout holds the directory and nothing else."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    given = flags.FLAGS
    try:
        with contextlib.redirect_stdout(sys.stderr):  # tfds prints its progress
            directory = prepare(
                given.input,
                kind=given.kind,
                data_dir=given.data_dir,
                max_bad_fraction=given.max_bad_fraction,
                seed=given.seed,
                reading=Reading(given.columns, given.thoughts, given.pairs),
            )
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(directory)


if __name__ == "__main__":
    define_flags()
    app.run(main)
