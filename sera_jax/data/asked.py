"""Rows of prompts as they were given, for who writes rows with new answers beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sera_jax.data.columns import Reading
from sera_jax.data.loading import read_items
from sera_jax.data.reasons import BadRow
from sera_jax.data.records import PREPARED, PromptRecord, parse_prompt


def read_asked(spec: str, **options: Any) -> dict[str, dict[str, Any]]:
    """By id (as `load_prompts` gives it), the fields of every prompt's row; see `given_fields`.

    Args:
        options: of `loading.read_items`, the same as the prompts were loaded with.
    """

    def parse(value: dict, reading: Reading) -> PromptRecord:
        record = parse_prompt(value, reading)
        return dataclasses.replace(record, extra=given_fields(value, record))

    records, _ = read_items(spec, parse, lambda batch: [(record, ()) for record in batch], **options)
    return {record.id: record.extra | {"id": record.id} for record in records}


def given_fields(value: Mapping[str, Any], record: PromptRecord) -> dict[str, Any]:
    """The fields of a row: `prompt` to the letter, `reference` where the row had an answer, and all others.

    A row whose prompt is more than its own field has the messages that were taken for one; what they were taken from,
    answers and conversations, is left out. An answer is `response` or `completion`, or the last of `messages`.
    """
    answers = {"messages", "response", "completion", "chosen", "rejected"}
    row = {key: part for key, part in record.extra.items() if key not in answers}
    own = value.get("prompt") is not None and PREPARED not in value and _is_own(value["prompt"], record)
    row["prompt"] = value["prompt"] if own else record.prompt
    if own:
        row |= {key: value[key] for key in ("chosen", "rejected") if key in value}
    given = [value.get("response"), value.get("completion"), _last_answer(value.get("messages"))]
    reference = next((answer for answer in given if answer is not None), None)
    return row if reference is None else {"reference": reference} | row


def _is_own(prompt: Any, record: PromptRecord) -> bool:
    """Whether the record's prompt is the row's field and nothing else."""
    try:
        return parse_prompt({"prompt": prompt}).prompt == record.prompt
    except BadRow:
        return False


def _last_answer(messages: Any) -> str | None:
    """The answer that a conversation ends in, if it does."""
    last = messages[-1] if isinstance(messages, list | tuple) and messages else {}
    return last["content"] if isinstance(last, Mapping) and last.get("role") == "assistant" else None
