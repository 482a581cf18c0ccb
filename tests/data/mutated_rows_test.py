"""Rows with every kind of damage: each is loaded or refused under a reason and its line, and what is loaded is text."""

import collections
import contextlib
import gzip
import json
import random

import pytest

from sera_jax.checkpoint.papers import write_jsonl
from sera_jax.data import loading
from sera_jax.data.asked import read_asked
from sera_jax.data.bpe import train_bpe
from sera_jax.data.loading import Limits, TooManyBadRows
from sera_jax.data.reasons import BAD_REASONS, DROPPED, FILE_REASONS
from sera_jax.data.report import LoadReport
from sera_jax.data.tokenizing import Tokenizer
from tests.data.mutations import FORMS, TURNS, line_of

LIMITS = Limits(max_prompt_length=512, max_completion_length=256, row_tokens=1100)
LOADERS = {
    "preference": loading.load_preferences,
    "demonstration": loading.load_demonstrations,
    "prompt": loading.load_prompts,
}
SIDES = {"preference": ("chosen", "rejected"), "demonstration": ("response",), "prompt": ()}
IN_A_FILE = 50
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of plain text, and of a template that writes roles."""
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(iter([turn["content"] for turn in TURNS] * 20), 300, out_dir=folder)
    (folder / "chat.jinja").write_text(CHATML)
    return [Tokenizer.load(folder, template) for template in ("none", str(folder / "chat.jinja"))]


@pytest.fixture
def seen(monkeypatch):
    """Every (kind, reason, place) that a report is told, and every report that is finished."""
    told, reports = [], []
    add, finish = LoadReport.add, LoadReport.finish
    monkeypatch.setattr(LoadReport, "add", lambda self, *what: (told.append(what[:3]), add(self, *what)))
    monkeypatch.setattr(LoadReport, "finish", lambda self, *how: (reports.append(self), finish(self, *how)))
    return told, reports


def check_report(report, path, lines, told):
    """Counts add up; each line is kept, refused once at its place, or blank; the report is text, one line a reason."""
    refused = [(reason, place) for kind, reason, place in told if kind in ("bad", "dropped")]
    blank = [place for kind, reason, place in told if reason == "blank_line"]
    places = [place for reason, place in refused if reason not in FILE_REASONS]
    assert len(set(places)) == len(places)
    assert {*places, *blank} <= {f"{path}:{line}" for line in range(1, lines + 1)}
    assert report.kept == lines - len(places) - len(blank)
    assert report.rows == report.kept + len(refused)
    assert {reason for reason, _ in refused} <= {*BAD_REASONS, *DROPPED}
    table = report.table()
    table.encode()
    lines = 1 + sum(map(len, (report.bad, report.dropped, report.noted, report.forms))) + bool(report.unread)
    assert len(table.splitlines()) == lines


def check_texts(kind, path, items, tokenizer):
    """What was loaded says what the row said."""
    records, _ = loading.load_records(str(path), kind, max_bad_fraction=1.0)
    by_id = {record.id: record for record in records}
    for item in (getattr(item, "item", item) for item in items):
        item.id.encode()
        tokenizer.decode(item.prompt).encode()
        for side, tokens in zip(SIDES[kind], item.responses, strict=True):
            text = getattr(by_id[item.id], side)
            if tokens[-1] == tokenizer.end_id:
                assert tokenizer.decode_response(tokens) == text


def attack(kind, lines, path, tokenizer, seen):
    """Load the lines as one file; the report, having checked it and what was loaded."""
    told, reports = seen
    told.clear()
    data = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    items = []
    with contextlib.suppress(TooManyBadRows):  # of which nothing is usable
        items, _ = LOADERS[kind](str(path), tokenizer, limits=LIMITS, max_bad_fraction=1.0, workdir=path.parent)
    report, mine = reports[-1], list(told)
    check_report(report, path, len(lines), mine)
    if items:
        assert len(items) == report.kept
        check_texts(kind, path, items, tokenizer)
        if kind == "prompt":
            asked = list(read_asked(str(path), max_bad_fraction=1.0).values())
            write_jsonl(path.parent / "asked.jsonl", asked)
            assert len((path.parent / "asked.jsonl").read_text(encoding="utf-8").splitlines()) >= len(asked)
    return report


def campaign(rows, seed, folder, tokenizers, seen):
    """Load so many damaged rows; how many were kept, and refused by reason."""
    counts = collections.Counter()
    kinds = sorted(FORMS)
    for file in range(rows // IN_A_FILE):
        r = random.Random(f"{seed} {file}")
        kind = kinds[file % len(kinds)]
        path = folder / f"{file}.jsonl{'.gz' if file % 5 == 0 else ''}"
        lines = [line_of(kind, r) for _ in range(IN_A_FILE)]
        report = attack(kind, lines, path, tokenizers[file % 4 > 0], seen)
        counts["kept"] += report.kept
        for reasons in (report.bad, report.dropped):
            counts.update({reason: entry.count for reason, entry in reasons.items()})
        counts["blank_line"] += report.noted["blank_line"].count if "blank_line" in report.noted else 0
    assert sum(counts.values()) == rows
    return counts


def test_a_hundred_and_fifty_damaged_rows_are_loaded_or_refused_under_a_reason(tmp_path, tokenizers, seen):
    campaign(3 * IN_A_FILE, 0, tmp_path, tokenizers, seen)


@pytest.mark.slow
def test_five_thousand_damaged_rows_are_loaded_or_refused_under_a_reason(tmp_path, tokenizers, seen):
    counts = campaign(5000, 1, tmp_path, tokenizers, seen)
    print(json.dumps(dict(counts.most_common())))
