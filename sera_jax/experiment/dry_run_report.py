"""The facts of a dry run (`dry_run.look`) for people: all that is said here stands in the facts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from sera_jax.data.report import Count, LoadReport
from sera_jax.evaluation.report import Column, aligned
from sera_jax.experiment import overlaps

Facts = dict[str, Any]
SHOWN = 400  # letters of a text
SEAM = 3  # tokens on each side of where an answer begins


def as_text(facts: Facts) -> str:
    """Rows by source, lengths, what is found of held-out prompts, trainings, and the first entries token by token."""
    parts = [
        "\n".join([f"dry run of method {facts['method']}: nothing is made in {facts['workdir']}", *facts["notes"]]),
        "\n".join(map(_source, facts["sources"])),
        _lengths(facts),
        "\n".join(_found(facts["contamination"])),
        _trainings(facts),
        *_first(facts["trainings"]),
        f"{len(facts['phases'])} phases. Memory, and the time of sampling and scoring: python -m sera_jax.preflight",
    ]
    return "\n\n".join(part for part in parts if part)


def _source(source: Facts) -> str:
    fields = {field.name: source[field.name] for field in dataclasses.fields(LoadReport)}
    for kind in ("bad", "dropped", "noted"):
        fields[kind] = {reason: Count(**count) for reason, count in source[kind].items()}
    return LoadReport(**fields).table()


def _lengths(facts: Facts) -> str:
    rows = [
        {"source": source["name"], "what": what, **of}
        for source in facts["sources"]
        for what, of in source["lengths"].items()
    ]
    dropped = facts["truncation_mode"] == "drop"

    def over(row: Facts) -> str:
        done = "dropped" if dropped and row["what"] == "prompt" else "cut"
        return f"{row['over']} {done}" if row["over"] else "0"

    columns: list[Column] = [("source", lambda row: row["source"]), ("tokens of", lambda row: row["what"])]
    columns += [(name, lambda row, name=name: str(row[name])) for name in ("count", "p10", "p50", "p90", "p99", "max")]
    columns += [("limit", lambda row: str(row["limit"])), ("above it", over)]
    heading = "Lengths before anything is cut; limits are data.max_prompt_length and data.max_completion_length:"
    return f"{heading}\n{aligned(rows, columns)}" if rows else ""


def _found(facts: Facts) -> Iterator[str]:
    for group in overlaps.groups(facts):
        yield overlaps.in_words(facts, group)
        for field, source in sorted(facts.items()):
            for example in source["found"][group]["examples"]:
                how = "exactly" if example["by"] == "exact" else f"by {example['words']!r}"
                what = f"{example['prompt']} {_quoted(example['says'])}"
                yield f"    {what} in data.{field} at {example['row']}, {how}"
    for field, source in sorted(facts.items()):
        if again := source["rows"] - source["prompts"]:
            yield f"data.{field}: {again} of {source['rows']} rows repeat the prompt of an earlier one"


def _trainings(facts: Facts) -> str:
    columns: list[Column] = [
        ("training", lambda row: row["what"]),
        ("times", lambda row: str(row["times"])),
        ("updates of each", lambda row: str(row["updates"])),
        ("batch", lambda row: str(row["batch_size"])),
        ("entries", lambda row: str(row["entries"] or "made on the way")),
        ("tokens", lambda row: str(row["tokens"])),
        ("trained on", lambda row: str(row["trained_tokens"])),
        ("PFLOP", lambda row: f"{row['flops'] / 1e15:.3g}"),
        *((f"one {chip}", lambda row, chip=chip: _time(row["seconds"][chip])) for chip in facts["assumed"]["chips"]),
    ]
    share, held = facts["assumed"]["share_of_peak"], facts["held_out"]
    lines = [
        f"Trainings of a model of {facts['model']['parameters']:,} parameters; tokens are those of each pass over the "
        f"entries, times those of all updates at {share:.0%} of the chip's peak, without sampling, scoring, compiling:",
        aligned(facts["trainings"], columns),
        f"sampled on: {facts['prompts']} prompts; held out: {held['rows']} rows, {held['prompts']} prompts to answer",
    ]
    return "\n".join(lines)


def _first(trainings: list[Facts]) -> Iterator[str]:
    for training in trainings:
        for number, entry in enumerate(training.get("first", ()), 1):
            flipped = ", its sides exchanged (data.label_noise)" if entry["flipped"] else ""
            prompt, *answers = entry["parts"]
            lines = [f"{training['what']}, {number} of {training['entries']}: {entry['id']}{flipped}"]
            lines += [_part(part) for part in entry["parts"]]
            lines += [f"  {answer['name']} begins at {_seam(prompt, answer)}" for answer in answers]
            yield "\n".join(lines)


def _part(part: Facts) -> str:
    trained = {0: "none", part["tokens"]: "all"}.get(part["trained"], str(part["trained"]))
    end = ""
    if "end" in part:
        end = f", ends in {part['end']!r}" if part["end"] else ", cut: without an end"
    return f"  {part['name']}: {part['tokens']} tokens, {trained} trained on{end}: {_quoted(part['text'])}"


def _seam(prompt: Facts, answer: Facts) -> str:
    before, after = (" ".join(map(_quoted, side)) for side in (prompt["pieces"][-SEAM:], answer["pieces"][:SEAM]))
    return f"{before} | {after}"


def _quoted(text: str) -> str:
    """On one line, whatever stands in it; a long one without its middle."""
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
    text = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds >= 0.01 else "< 0.01 s"
