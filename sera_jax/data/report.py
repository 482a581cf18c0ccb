"""What became of every row: counts by reason, each with its first example."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

from sera_jax import hosts, whole
from sera_jax.data.reasons import BAD_REASONS, DROPPED, FILE_REASONS, FORMS_PAGE, NOTES, REMEDIES

MANY = 0.1  # of the kept rows: that many that carry a template stop a run
SHOWN = 20  # fields that nobody reads, in a line
A_FORM = 0.25  # of the rows: that many that are bad for one reason are no accident


class TooManyBadRows(ValueError):
    """The data are not usable as they are; the message holds the report."""


@dataclasses.dataclass
class Count:
    """How often something was seen, and where first (`path:line`)."""

    count: int = 0
    first: str = ""
    detail: str = ""


@dataclasses.dataclass
class LoadReport:
    """What became of every row. rows == kept + dropped + bad.

    Attributes:
        name, spec: which loading this is: the configuration field and its value.
        rows: rows taken from the sources; a row that a weight takes twice counts twice.
        kept: items that came out.
        bad, dropped, noted: counts by reason.
        forms: per source, how many rows were read as each form (sera_jax.data.forms).
        unread: fields that nobody reads, and in how many rows they are set.
        sources: per source: rows it holds (`available`), `rows` taken of it, and how many were `kept`.
    """

    name: str
    spec: str
    rows: int = 0
    kept: int = 0
    bad: dict[str, Count] = dataclasses.field(default_factory=dict)
    dropped: dict[str, Count] = dataclasses.field(default_factory=dict)
    noted: dict[str, Count] = dataclasses.field(default_factory=dict)
    sources: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    forms: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    unread: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, reason: str, where: str, detail: str = "") -> None:
        """Count one more `reason` under `kind` (bad, dropped or noted)."""
        entry = getattr(self, kind).setdefault(reason, Count(0, where, _printable(detail)))
        entry.count += 1

    def read_as(self, source: str, form: str, unread: Sequence[str]) -> None:
        """Count a row that was read as `form`, and the fields of it that nobody reads."""
        forms = self.forms.setdefault(source, {})
        form = form if form in forms else _printable(form)
        forms[form] = forms.get(form, 0) + 1
        for name in unread:
            field = name if name in self.unread else _printable(name)
            self.unread[field] = self.unread.get(field, 0) + 1

    @property
    def bad_rows(self) -> int:
        return sum(entry.count for entry in self.bad.values())

    @property
    def bad_fraction(self) -> float:
        return self.bad_rows / self.rows if self.rows else 0.0

    def table(self) -> str:
        """The report for people: one line per reason, with the first example."""
        dropped = sum(entry.count for entry in self.dropped.values())
        lines = [
            f"{self.name}: {self.rows} rows of {self.spec}: {self.kept} kept, {self.bad_rows} bad "
            f"({100 * self.bad_fraction:.2f} %), {dropped} dropped"
        ]
        for kind, meanings in (("bad", BAD_REASONS), ("dropped", DROPPED), ("noted", NOTES)):
            for reason, entry in sorted(getattr(self, kind).items(), key=lambda pair: (-pair[1].count, pair[0])):
                detail = f" ({entry.detail})" if entry.detail else ""
                lines.append(f"  {kind:8}{entry.count:7}  {reason}: {meanings[reason]}; first {entry.first}{detail}")
        for spec, source in self.sources.items():
            if source["rows"] != source["available"]:
                lines.append(f"  source  {source['rows']:7g}  rows taken of the {source['available']:g} of {spec}")
        for spec, forms in self.forms.items():
            said = ", ".join(f"{form} ({count})" for form, count in sorted(forms.items(), key=lambda f: -f[1]))
            lines.append(f"  read as {said}: {spec}")
        if self.unread:
            fields = sorted(self.unread.items(), key=lambda field: (-field[1], field[0]))
            more = f" and {len(fields) - SHOWN} more" if len(fields) > SHOWN else ""
            said = ", ".join(f"{name[:60]} ({count})" for name, count in fields[:SHOWN])
            lines.append(f"  nobody reads the fields {said}{more}")
        return "\n".join(lines)

    def write(self, workdir: pathlib.Path) -> pathlib.Path:
        """Write `workdir/data/<name>.json` and return its path; the first process does."""
        path = pathlib.Path(workdir) / "data" / f"{self.name}.json"
        if not hosts.is_first():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {**dataclasses.asdict(self), "bad_rows": self.bad_rows, "bad_fraction": self.bad_fraction}
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        whole.appear(part, path)
        return path

    def finish(self, max_bad_fraction: float, workdir: pathlib.Path | None) -> None:
        """Write the report, and raise TooManyBadRows where it says that the data are unusable; its caller shows it."""
        if workdir is not None:
            self.write(workdir)
        damaged = [reason for reason in FILE_REASONS if reason in self.bad]
        unused = [spec for spec, source in self.sources.items() if source["rows"] and not source["kept"]]
        if damaged:
            problem = f"{self.bad[damaged[0]].first}: {BAD_REASONS[damaged[0]]}; get the file again."
        elif unused:
            problem = f"nothing usable in {', '.join(unused)}. {self._way_out()}"
        elif self.bad_fraction > max_bad_fraction:
            problem = f"{self.bad_rows} of {self.rows} rows are bad, more than {100 * max_bad_fraction:g} %. " + (
                self._way_out()
                if self._main_reason()
                else f"Mend or remove these rows, or raise data.max_bad_fraction (now {max_bad_fraction:g})."
            )
        elif (carry := self.noted.get("carries_template")) and carry.count > max(MANY, max_bad_fraction) * self.kept:
            problem = (
                f"{carry.count} of {self.kept} rows carry a chat template already (first {carry.first}), and would be "
                "given another around it. Take the marks out, and give messages or plain prompts and answers."
            )
        else:
            return
        raise TooManyBadRows(f"data.{self.name}: {problem}\n{self.table()}")

    def _main_reason(self) -> str | None:
        """The reason that a quarter of the rows is bad for: the form of the file, not an accident."""
        reason = max(self.bad, key=lambda name: self.bad[name].count, default=None)
        return reason if reason and self.bad[reason].count >= A_FORM * self.rows else None

    def _way_out(self) -> str:
        reason = self._main_reason()
        if reason is None:
            return f"Mend it, or leave it out; {FORMS_PAGE} lists the forms that are read."
        entry = self.bad[reason]
        remedy = REMEDIES.get(reason, f"mend or remove these rows; {FORMS_PAGE} lists the forms that are read")
        return f"{entry.count} of {self.rows} for one reason, {reason} ({BAD_REASONS[reason]}): {remedy}."


def _printable(text: str) -> str:
    """A row's own words may be no text, or move the terminal's cursor."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
