"""How many prompts that are held out, or are a benchmark's, stand in the rows that a config trains on.

Rows whose prompt is held out by the run's own rule (`corpus`: the same turns) are left out of training, and so of this.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from sera_jax import hosts
from sera_jax.checkpoint.papers import digest_of, is_whole, read_json, sealed, write_json
from sera_jax.config import DataGroup
from sera_jax.data.chat import Prompt
from sera_jax.data.choices import split_heldout
from sera_jax.data.columns import Reading
from sera_jax.data.contamination import Search, Sought
from sera_jax.data.items import content_key
from sera_jax.data.loading import read_records
from sera_jax.data.records import PARSERS, Record, parse_pretrain
from sera_jax.data.report import LoadReport
from sera_jax.data.sources import content_hash, parse_mixture

Facts = dict[str, Any]
RECORD = "contamination.json"  # in the work directory's data/
VERSION = 1
_PARSERS = {
    "train": PARSERS["preference"],
    "demonstrations": PARSERS["demonstration"],
    "pretrain": parse_pretrain,
    "prompts": PARSERS["prompt"],
}


@dataclasses.dataclass(frozen=True)
class Looking:
    """What is looked through, and for what.

    Attributes:
        data: with the embedded world's files where there is one.
        main: the field whose prompts data.eval_fraction splits. sources: the fields that are trained or sampled on.
        heldout_prompts: a file of further prompts that are held out; "" for none.
        seed: of the shares that weights take.
    """

    data: DataGroup
    main: str
    sources: tuple[str, ...]
    heldout_prompts: str
    seed: int

    def rows(self, field: str, spec: str, parse: Any, *, whole: bool = False) -> Iterator[tuple[str, Record]]:
        """(where, record) of every good row; `whole`: refuse a source that loading would refuse."""
        report = LoadReport(field, spec)
        reading = Reading(self.data.columns, self.data.thoughts, self.data.pairs)
        for source, where, record in read_records(spec, parse, report, seed=self.seed, reading=reading):
            report.kept += 1
            report.sources[source]["kept"] += 1
            yield where, record
        if whole:
            report.finish(self.data.max_bad_fraction, None)

    def held_out(self) -> Iterator[tuple[str, str, Prompt]]:
        """(field that holds it out, where, prompt) of what the run holds out."""
        data = self.data
        if data.eval:
            for where, record in self.rows("eval", data.eval, PARSERS["prompt"]):
                yield "data.eval", where, record.prompt
        else:
            for where, record in self.rows(self.main, getattr(data, self.main), _PARSERS[self.main]):
                if split_heldout([record], data.eval_fraction, data.split_seed)[1]:
                    yield "data.eval_fraction", where, record.prompt
        if self.heldout_prompts:
            for where, record in self.rows("heldout_prompts", self.heldout_prompts, PARSERS["prompt"]):
                yield "heldout_prompts", where, record.prompt

    def benchmarks(self) -> Iterator[tuple[str, str, Prompt]]:
        spec = self.data.benchmarks
        for name, weight in parse_mixture(spec, field="data.benchmarks") if spec else ():
            for where, record in self.rows("benchmarks", f"{name}={weight!r}", PARSERS["prompt"], whole=True):
                yield name, where, record.prompt

    def inputs(self) -> Facts:
        """All that the facts depend on."""
        data = self.data
        fields = ("eval", "benchmarks", *self.sources)
        specs = {field: getattr(data, field) for field in fields if getattr(data, field)}
        specs |= {"heldout_prompts": self.heldout_prompts} if self.heldout_prompts else {}
        contents = {
            field: [[content_hash(name), weight] for name, weight in parse_mixture(spec)]
            for field, spec in specs.items()
        }
        how = [data.eval_fraction, data.split_seed, data.columns, data.thoughts, data.pairs, self.seed]
        return {"version": VERSION, "contents": contents, "names": specs, "how": how}


def look(looking: Looking) -> Facts:
    """field of `data` -> `rows` that are trained on, the `prompts` among them, and what is `found` in them, by where
    the sought prompts come from (`contamination.Search.found`).

    Raises:
        ValueError: a benchmark cannot be read.
    """
    held = list(looking.held_out())
    keys = {content_key(prompt) for _, _, prompt in held}
    sought = Sought([*held, *looking.benchmarks()])
    facts: Facts = {}
    for field in looking.sources:
        search, prompts, rows = Search(sought), set(), 0
        for where, record in looking.rows(field, getattr(looking.data, field), _PARSERS[field]):
            if (key := content_key(record.prompt)) in keys:
                continue
            rows += 1
            prompts.add(key)
            said = (getattr(record, side, None) for side in ("chosen", "rejected", "response"))
            search.add(where, record.prompt, [text for text in said if text])
        facts[field] = {"rows": rows, "prompts": len(prompts), "found": search.found()}
    return facts


def remembered(looking: Looking, root: pathlib.Path) -> Facts:
    """`look`, once for a work directory as long as the files are the same; the first process does it."""

    def on_first() -> Facts:
        path, asked = root / "data" / RECORD, digest_of(looking.inputs())
        known = read_json(path)
        if is_whole(known) and known.get("inputs") == asked:
            return known["facts"]
        facts = look(looking)
        write_json(path, sealed({"inputs": asked, "facts": facts}))
        return facts

    return hosts.on_first(on_first)


def groups(facts: Facts) -> dict[str, int]:
    """Where the sought prompts come from, by name, and how many each has."""
    found = [source["found"] for source in facts.values()]
    return {name: group["prompts"] for source in found[:1] for name, group in sorted(source.items())}


def in_words(facts: Facts, group: str) -> str:
    """A line on the prompts of a group, and one for each source in which some are found."""
    lines = [f"{groups(facts)[group]} prompts of {group}: none stands in rows that are trained on"]
    for field, source in sorted(facts.items()):
        found = source["found"][group]
        if found["exact"] or found["ngram"] or found["common"]:
            lines[0] = f"{found['prompts']} prompts of {group}, of which stand in rows that are trained on"
            phrases = f" ({found['common']} more by common phrases alone)" if found["common"] else ""
            lines.append(
                f"  {found['exact']} exactly and {found['ngram']} by 13 words, in {found['rows']} of {source['rows']} "
                f"rows of data.{field}{phrases}"
            )
    return "\n".join(lines)


def counts(facts: Facts) -> dict[str, dict[str, dict[str, int]]]:
    """field -> group -> the numbers alone, for a summary."""
    return {
        field: {
            group: {name: value for name, value in found.items() if name != "examples"}
            for group, found in source["found"].items()
        }
        for field, source in facts.items()
    }


def said(looking: Looking, root: pathlib.Path, say: Callable[[str], None]) -> Facts:
    """`remembered`, said in lines; the counts alone."""
    facts = remembered(looking, root)
    for group in groups(facts):
        say(in_words(facts, group))
    return counts(facts)
