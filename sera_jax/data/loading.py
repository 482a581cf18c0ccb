"""Sources -> items of tokens, with a report that accounts for every row.

A row is kept, or counted under the reason why not: `bad` (the row is at fault, a key of reasons.BAD_REASONS) or
`dropped` (the configuration asked for it, reasons.DROPPED). What was changed in a kept row is `noted` (reasons.NOTES).
Too many bad rows, a source of which nothing is left, or a damaged file stop the run and show the report.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from sera_jax.data import records as rec
from sera_jax.data import trees
from sera_jax.data.choices import flip_labels, split_heldout, weighted_rows
from sera_jax.data.columns import Reading
from sera_jax.data.items import Item, PairItem, content_key, openings_of
from sera_jax.data.reasons import BadRow, LeftOut
from sera_jax.data.records import Prompt, Record
from sera_jax.data.report import LoadReport, TooManyBadRows
from sera_jax.data.sources import RawRow, open_source, parse_mixture

__all__ = [  # the report's names belong to this module's results and errors
    "Limits",
    "LoadReport",
    "TooManyBadRows",
    "flip_labels",
    "load_demonstrations",
    "load_preferences",
    "load_pretrain",
    "load_prompts",
    "load_records",
    "read_items",
    "read_records",
    "split_heldout",
    "truncate_prompt",
]

TRUNCATION_MODES = ("keep_end", "keep_start", "drop")
_AT_ONCE = 512  # rows given to the tokenizer together


class PromptTooLong(Exception):
    """The prompt is over the limit and the truncation mode is `drop`."""


T = TypeVar("T")
Encoded = tuple[Any, tuple[str, ...]] | BadRow | PromptTooLong
Encode = Callable[[Sequence[Record]], Sequence[Encoded]]


class EncodesText(Protocol):
    """What loading needs of a tokenizer (sera_jax.data.tokenizing.Tokenizer)."""

    bos_id: int | None
    end_id: int

    def encode_prompts(
        self, prompts: Sequence[Prompt], refused: MutableMapping[int, str] | None = None
    ) -> list[np.ndarray]: ...

    def encode_responses(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        complete: bool = True,
        refused: MutableMapping[int, str] | None = None,
    ) -> list[np.ndarray]: ...

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: np.ndarray) -> str: ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """Lengths in tokens, and what happens to a prompt that is longer.

    Attributes:
        max_prompt_length: BOS and template included.
        max_completion_length: EOS included; a longer response is cut and does not end in EOS.
        row_tokens: length of a packed row; an item (prompt and all responses) must fit into one.
        truncation_mode: `keep_end` cuts the start of a long prompt (its BOS stays first), `keep_start` the end, with it
            the generation prompt; `drop` leaves the row out and counts it.
        share_prompt: responses share one copy of the prompt in a row.
    """

    max_prompt_length: int
    max_completion_length: int
    row_tokens: int
    truncation_mode: str = "keep_end"
    share_prompt: bool = True

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_completion_length", "row_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1 token, got {getattr(self, name)}")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"data.truncation_mode must be one of {', '.join(TRUNCATION_MODES)}, got {self.truncation_mode!r}"
            )


def load_preferences(
    spec: str, tokenizer: EncodesText, *, limits: Limits, **options: Any
) -> tuple[list[PairItem], LoadReport]:
    """Preference pairs as items with two responses, (chosen, rejected).

    Args:
        spec: a source or a mixture, see sera_jax.data.sources.
        tokenizer: encodes prompts and responses; what it refuses with ValueError is a bad row.
        limits: lengths in tokens.
        **options: of `read_items`: max_bad_fraction, workdir, name, seed, host, host_count, reading.

    Returns:
        (pairs in file order, LoadReport).

    Raises:
        ValueError: a source that does not exist or cannot be opened, or a bad mixture.
        TooManyBadRows: the data are not usable as they are.
    """
    items, report = read_items(spec, rec.parse_preference, _encoder(tokenizer, limits), **options)
    return [PairItem(item) for item in items], report


def load_demonstrations(
    spec: str, tokenizer: EncodesText, *, limits: Limits, **options: Any
) -> tuple[list[Item], LoadReport]:
    """Demonstrations as items with one response; the rest as load_preferences. Returns (list[Item], LoadReport)."""
    return read_items(spec, rec.parse_demonstration, _encoder(tokenizer, limits), **options)


def load_pretrain(
    spec: str, tokenizer: EncodesText, *, limits: Limits, **options: Any
) -> tuple[list[Item], LoadReport]:
    """Demonstrations, or texts as they are (`text`): of a text the first token is the prompt. Returns as the others."""
    as_answers = _encoder(tokenizer, limits)

    def encode(batch: Sequence[Record]) -> list[Encoded]:
        texts = [record for record in batch if isinstance(record, rec.TextRecord)]
        others = [record for record in batch if not isinstance(record, rec.TextRecord)]
        encoded = iter(as_answers(others) if others else ())
        tokens = iter(tokenizer.encode_texts([str(record.prompt) for record in texts]) if texts else ())
        return [
            _text_item(record, next(tokens), limits) if isinstance(record, rec.TextRecord) else next(encoded)
            for record in batch
        ]

    return read_items(spec, rec.parse_pretrain, encode, **options)


def _text_item(record: rec.TextRecord, tokens: np.ndarray, limits: Limits) -> Encoded:
    if len(tokens) < 2:
        return BadRow("empty_response", "the text has fewer than two tokens")
    rest = tokens[1 : 1 + limits.max_completion_length]
    notes = ("truncated_response",) if len(rest) + 1 < len(tokens) else ()
    return Item(record.id, tokens[:1], (rest,), content_key(record.prompt)), notes


def load_records(spec: str, kind: str, **options: Any) -> tuple[list[Any], LoadReport]:
    """The records themselves, not tokenized; `kind` is a key of records.PARSERS. Returns (list[Record], LoadReport)."""
    return read_items(spec, rec.PARSERS[kind], lambda batch: [(record, ()) for record in batch], **options)


def load_prompts(spec: str, tokenizer: EncodesText, *, limits: Limits, **options: Any) -> tuple[list[Item], LoadReport]:
    """Prompts as items without responses; the rest as load_preferences. Returns (list[Item], LoadReport)."""
    return read_items(spec, rec.parse_prompt, _encoder(tokenizer, limits), **options)


def read_records(
    spec: str,
    parse: Callable[[dict, Reading], Record],
    report: LoadReport,
    *,
    seed: int = 0,
    host: int = 0,
    host_count: int = 1,
    reading: Reading = rec.AS_WRITTEN,
) -> Iterator[tuple[str, str, Record]]:
    """(source spec, `path:line`, record) of every good row of a mixture; the others are counted in `report`.

    Ids come out unique: a repetition gets `#2`, `#3`, ... Each host reads its share of the rows and sees the same
    failures.

    Args:
        seed: of the shares that weights below 1 take.
        host, host_count: which rows this process reads (every host_count-th); ids are unique per host.
        reading: of data.columns and data.thoughts.
    """
    contents: set[int] = set()
    ids: dict[str, int] = {}
    for name, weight in parse_mixture(spec, field=f"data.{report.name}"):
        source = open_source(name, field=f"data.{report.name}")
        if parse is not rec.parse_pretrain and not reading.columns:
            source = trees.of_messages(source)
        counts = report.sources[name] = {"weight": weight, "available": len(source), "rows": 0, "kept": 0}
        indices = weighted_rows(len(source), weight, seed, name)[host::host_count]
        previous = -1
        for index, row in zip(indices, source.rows(indices), strict=True):
            where = f"{row.path}:{row.line}"
            if row.error == "blank_line":
                report.add("noted", "blank_line", where)
                counts["available"] -= 1
                continue
            report.rows += 1
            counts["rows"] += 1
            record = _parse(row, lambda value: parse(value, reading), report, where)
            for k, one in enumerate((record, *getattr(record, "more", ())) if record is not None else ()):
                report.rows += k > 0  # a pair more counts as a row more
                counts["rows"] += k > 0
                if isinstance(one, BadRow):
                    report.add("bad", one.reason, where, one.detail)
                    continue
                report.read_as(name, one.form, one.unread)
                yield name, where, _unique(one, index == previous or k > 0, contents, ids, report, where)
            previous = index
        if source.failure is not None:
            report.rows += 1
            counts["rows"] += 1
            failure = source.failure
            report.add("bad", failure.error or "", f"{failure.path}:{failure.line}", failure.detail)


def read_items(
    spec: str,
    parse: Callable[[dict, Reading], Record],
    encode: Encode,
    *,
    max_bad_fraction: float = 0.05,
    workdir: pathlib.Path | None = None,
    name: str = "train",
    into: Callable[[Any], None] | None = None,
    **which: Any,
) -> tuple[list[Any], LoadReport]:
    """Read, parse and encode every row of a mixture.

    Args:
        spec: the mixture.
        parse: row -> record, or BadRow.
        encode: some records -> for each (item, notes), or the BadRow or PromptTooLong that says why there is none.
        max_bad_fraction: more bad rows than this stop the run.
        workdir: where the report goes; None writes none.
        name: field of the `data` group that `spec` was typed in; names the report.
        into: takes each item; None: they are returned.
        **which: rows, and how they are read: seed, host, host_count and reading of `read_records`.
    """
    report, items = LoadReport(name, spec), []
    add = items.append if into is None else into
    rows = read_records(spec, parse, report, **which)
    while batch := list(itertools.islice(rows, _AT_ONCE)):
        results = encode([record for _, _, record in batch])
        for (source, where, record), result in zip(batch, results, strict=True):
            if isinstance(result, BadRow):
                report.add("bad", result.reason, where, result.detail)
            elif isinstance(result, PromptTooLong):
                report.add("dropped", "prompt_too_long", where, str(result))
            else:
                item, notes = result
                add(item)
                report.kept += 1
                report.sources[source]["kept"] += 1
                for note in (*record.notes, *notes):
                    report.add("noted", note, where)
    report.finish(max_bad_fraction, workdir)
    return items, report


def truncate_prompt(tokens: np.ndarray, *, limit: int, keep_end: bool, bos_id: int | None) -> np.ndarray:
    """At most `limit` of the i32[P] tokens, the last or the first ones; a leading BOS stays first."""
    if len(tokens) <= limit:
        return tokens
    if not keep_end:
        return tokens[:limit]
    if bos_id is not None and tokens[0] == bos_id:
        return np.concatenate([tokens[:1], tokens[len(tokens) - limit + 1 :]])
    return tokens[len(tokens) - limit :]


def _encoder(tokenizer: EncodesText, limits: Limits) -> Encode:
    """records -> items, tokenized together: per record an item with its notes, or the reason why not."""
    spells = getattr(tokenizer, "spells_control", None)

    def encode(batch: Sequence[Record]) -> list[Encoded]:
        prompts = [record.prompt for record in batch]
        refused: dict[int, str] = {}
        encoded = tokenizer.encode_prompts(prompts, refused)
        sides: dict[str, list[np.ndarray]] = {}
        for side in ("chosen", "rejected", "response"):
            if hasattr(batch[0], side):
                texts = [getattr(record, side) for record in batch]
                sides[side] = tokenizer.encode_responses(prompts, texts, refused=refused)
        results: list[Encoded] = []
        for index, record in enumerate(batch):
            try:
                if index in refused:
                    raise BadRow("template_refused", refused[index])
                responses = [side[index] for side in sides.values()]
                item, notes = _item(record, encoded[index], responses, tokenizer, limits)
                if "carries_template" not in record.notes and spells is not None and any(map(spells, _texts(record))):
                    notes = (*notes, "carries_template")
                results.append((item, notes))
            except (BadRow, PromptTooLong) as reason:
                results.append(reason)
        return results

    return encode


def _texts(record: Record) -> list[str]:
    """Everything that a record says."""
    prompt = [record.prompt] if isinstance(record.prompt, str) else [turn["content"] for turn in record.prompt]
    return prompt + [getattr(record, side) for side in ("chosen", "rejected", "response") if hasattr(record, side)]


def _item(
    record: Record, prompt: np.ndarray, whole: Sequence[np.ndarray], tokenizer: EncodesText, limits: Limits
) -> tuple[Item, tuple[str, ...]]:
    """The item within the limits, and its notes."""
    notes = set()
    if not len(prompt):
        raise BadRow("empty_prompt", "the prompt has no tokens")
    if len(prompt) > limits.max_prompt_length:
        if limits.truncation_mode == "drop":
            raise PromptTooLong(f"{len(prompt)} tokens, at most {limits.max_prompt_length}")
        notes.add("truncated_prompt")
        prompt = truncate_prompt(
            prompt,
            limit=limits.max_prompt_length,
            keep_end=limits.truncation_mode == "keep_end",
            bos_id=tokenizer.bos_id,
        )
    responses = tuple(tokens[: limits.max_completion_length] for tokens in whole)
    if any(len(tokens) > limits.max_completion_length for tokens in whole):
        notes.add("truncated_response")
    if any(_says_nothing(tokens, tokenizer) for tokens in responses):
        raise BadRow("response_truncated_to_nothing", f"of {max(map(len, whole))} tokens no text is left")
    if len(responses) == 2 and np.array_equal(*responses):
        raise BadRow("identical_after_truncation", f"the first {len(responses[0])} tokens")
    item = Item(record.id, prompt, responses, content_key(record.prompt), openings_of(record.prompt))
    copies = 1 if limits.share_prompt else max(len(responses), 1)
    if (length := item.tokens + (copies - 1) * len(prompt)) > limits.row_tokens:
        way_out = "raise data.row_tokens, or lower data.max_prompt_length or data.max_completion_length"
        raise BadRow("longer_than_row", f"{length} tokens, a row holds {limits.row_tokens}; {way_out}")
    return item, tuple(sorted(notes))


def _says_nothing(tokens: np.ndarray, tokenizer: EncodesText) -> bool:
    """Whether a response holds nothing but white space and its end; the first tokens usually tell."""
    return not tokenizer.decode(tokens[:8]).strip() and not tokenizer.decode(tokens).strip()


def _parse(row: RawRow, parse: Callable[[dict], Record], report: LoadReport, where: str) -> Record | None:
    if row.value is None:
        report.add("bad", row.error or "", where, row.detail)
        return None
    try:
        return parse(row.value)
    except BadRow as bad:
        report.add("bad", bad.reason, where, bad.detail)
    except LeftOut as left:
        report.add("dropped", left.reason, where, str(left))
    return None


def _unique(record: Record, repeated: bool, contents: set, ids: dict, report: LoadReport, where: str) -> Record:
    """The record with an id of its own; duplicates that the weights did not ask for are noted."""
    texts = [getattr(record, side, None) for side in ("chosen", "rejected", "response")]
    key = rec.prompt_key(record.prompt)
    content = hash((key, *texts))  # 64 bits: of a million rows two share them practically never
    if not repeated and content in contents:
        report.add("noted", "duplicate_row", where)
    elif not repeated and record.id in ids:
        report.add("noted", "duplicate_id", where, record.id)
    elif not repeated and texts[0] is not None and hash((key, texts[1], texts[0], None)) in contents:
        report.add("noted", "opposite_label", where)
    contents.add(content)
    name, seen = record.id, ids.get(record.id, 0)
    while name in ids:  # the next free one, in case a row brings an id such as "7#2" itself
        seen += 1
        name = f"{record.id}#{seen}"
    ids[name] = 1
    ids[record.id] = max(seen, 1)
    return record if name == record.id else dataclasses.replace(record, id=name)
