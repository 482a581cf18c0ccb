"""Rows of prompts as they were given, for who writes rows with new answers beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sera_jax.data.loading import read_items
from sera_jax.data.records import PREPARED, PromptRecord, parse_prompt


def read_asked(spec: str, **options: Any) -> dict[str, dict[str, Any]]:
    """By id (as `load_prompts` gives it), the fields of every prompt's row; see `given_fields`.

    Args:
        options: of `loading.read_items`, the same as the prompts were loaded with.
    """

    def parse(value: dict) -> PromptRecord:
        record = parse_prompt(value)
        return dataclasses.replace(record, extra=given_fields(value, record))

    records, _ = read_items(spec, parse, lambda batch: [(record, ()) for record in batch], **options)
    return {record.id: record.extra | {"id": record.id} for record in records}


def given_fields(value: Mapping[str, Any], record: PromptRecord) -> dict[str, Any]:
    """The fields of a row: `prompt` to the letter, `reference` where the row had an answer, and all others.

    A row without a prompt of its own has the messages that were taken for one; the conversations that they were taken
    from are left out. An answer is the field `response` or `completion`, or the last of `messages`.
    """
    own = value.get("prompt") is not None
    answers = {"messages", "response", "completion"}
    left_out = answers if own else answers | {"chosen", "rejected"}
    row = {key: part for key, part in value.items() if key not in left_out}
    if PREPARED in value:
        row = {key: part for key, part in row.items() if key not in (PREPARED, "extra")} | record.extra
    if PREPARED in value or not own:
        row["prompt"] = record.prompt
    given = [value.get("response"), value.get("completion"), _last_answer(value.get("messages"))]
    reference = next((answer for answer in given if answer is not None), None)
    return row if reference is None else {"reference": reference} | row


def _last_answer(messages: Any) -> str | None:
    """The answer that a conversation ends in, if it does."""
    last = messages[-1] if isinstance(messages, list | tuple) and messages else {}
    return last["content"] if isinstance(last, Mapping) and last.get("role") == "assistant" else None
