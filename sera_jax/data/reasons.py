"""Why a row is refused, left out, or kept with a remark: the names that reports, messages and counts use."""

from __future__ import annotations

FORMS_PAGE = "docs/forms.md"

BAD_REASONS: dict[str, str] = {
    # of a whole file: what is lost cannot be counted, so these always stop the run
    "git_lfs_pointer": "a git-LFS pointer instead of the data",
    "corrupt_gzip": "the compressed stream is damaged or cut off",
    "corrupt_parquet": "not a readable Parquet file",
    "corrupt_arrow": "not a readable Arrow file",
    "corrupt_array": "a JSON array that is damaged or cut off",
    "empty_file": "the source holds no row",
    # of a line
    "non_utf8": "bytes that are not UTF-8",
    "invalid_json": "not JSON",
    "not_an_object": "JSON, but not an object with named fields",
    "ragged_csv": "a row of another number of cells than the header has",
    "enormous_row": "a row larger than any that can be trained on",
    "deep_row": "lists or objects nested too deeply",
    "duplicate_field": "a field stands twice, so that one of its values would be lost",
    # of the fields
    "missing_field": "a field is missing or null",
    "wrong_type": "a field is not a string or list of messages",
    "bad_message": "a message is not {role, content} with role system, user or assistant and a string content",
    "invalid_unicode": "a lone surrogate, which no UTF-8 text can hold",
    "missing_preference_label": "two responses without a label",
    "tie": "the label prefers neither response",
    "differing_sources": "two fields of the row say different things of what the model is to read",
    "serialised_messages": "a text field holds a list, written out as text",
    "content_parts": "a content holds images or other parts that are no text",
    "tools": "the row offers tools, which would not be shown to the model",
    "tool_calls": "a message calls a tool or is a tool's answer",
    "reasoning_content": "a field of thoughts beside an answer, which would be lost",
    "weight": "a weight of a row or of its answer, which would be lost",
    "thoughts": "the answer holds <think>...</think>, and data.thoughts is 'refuse'",
    # of the content
    "empty_prompt": "the prompt is empty",
    "empty_chosen": "the chosen response is empty",
    "empty_rejected": "the rejected response is empty",
    "empty_response": "the response is empty",
    "identical_pair": "chosen and rejected are the same text",
    "identical_after_strip": "chosen and rejected differ in surrounding white space only",
    "prompt_prefix_mismatch": "the conversations of the row do not share everything but the last turn",
    "ends_with_user_turn": "the conversation does not end in an answer",
    "prompt_ends_with_answer": "the prompt does not end in a user turn",
    "stray_role_marker": "a response holds a further turn's role marker",
    # of the tokens
    "template_refused": "the chat template or tokenizer refuses the prompt",
    "response_truncated_to_nothing": "no token of the response is left",
    "identical_after_truncation": "chosen and rejected are the same tokens",
    "longer_than_row": "prompt and responses do not fit into a row",
}
FILE_REASONS = ("git_lfs_pointer", "corrupt_gzip", "corrupt_parquet", "corrupt_arrow", "corrupt_array", "empty_file")

# What to do where one reason takes a large share of a file: then it is the form of the file, not an accident.
REMEDIES: dict[str, str] = {
    "missing_field": f"name the fields by data.columns=prompt:FIELD,...; {FORMS_PAGE} lists the forms",
    "wrong_type": f"name the right fields by data.columns=prompt:FIELD,...; {FORMS_PAGE} lists the forms",
    "bad_message": f"write role (system, user, assistant) and content in every message; {FORMS_PAGE} lists the forms",
    "not_an_object": "write one JSON object with named fields a row",
    "invalid_json": "write one JSON object a line, or one JSON array of objects",
    "ragged_csv": "write the file again with quoted cells, or as JSON Lines",
    "missing_preference_label": "name the label's field by data.columns, or remove rows without one",
    "tie": "remove the rows that prefer neither response",
    "differing_sources": "name the field that is meant, or leave one out on purpose by data.columns=FIELD: (nothing "
    "after the colon)",
    "serialised_messages": "write the messages as a list (JSON), not as text that shows one",
    "content_parts": "only text can be trained on; remove these rows",
    "tools": "remove the rows that need tools, or ignore the field on purpose by data.columns=tools:",
    "tool_calls": "tool calls cannot be trained on; remove these conversations",
    "reasoning_content": "write the thoughts into the answer as <think>...</think>, or leave them out by "
    "data.thoughts=drop",
    "weight": "remove the weights, or ignore a row's on purpose by data.columns=weight:",
    "thoughts": "set data.thoughts to keep or drop",
    "template_refused": "choose another data.chat_template; the detail says what this one refuses",
    "longer_than_row": "raise data.row_tokens, or lower data.max_prompt_length or data.max_completion_length",
    "stray_role_marker": "the answers hold further turns: cut them there",
    "ends_with_user_turn": "cut the conversations after an answer, or give them as data.prompts",
    "prompt_ends_with_answer": "cut the prompts after a user turn",
    "prompt_prefix_mismatch": "both answers of a pair must answer the same conversation; remove the others",
}

DROPPED: dict[str, str] = {
    "prompt_too_long": "longer than max_prompt_length, and truncation_mode is 'drop'",
    "equal_scores": "the row scores chosen and rejected alike, so it prefers neither",
    "undesirable": "the row marks its answer as one not to be imitated",
}

NOTES: dict[str, str] = {
    "blank_line": "an empty line, not counted as a row",
    "carries_template": "the text holds marks of a chat template (control tokens, role markers); kept as plain text",
    "stray_role_marker_in_prompt": "a turn of the prompt holds a role marker; kept as text",
    "empty_earlier_turn": "an empty turn in the prompt; kept",
    "consecutive_same_role_in_prompt": "turns of one role in a row; joined with a blank line",
    "control_char": "control characters; kept",
    "replacement_char": "U+FFFD, the trace of an earlier decoding error; kept",
    "duplicate_row": "the same content again; kept, with an id of its own",
    "duplicate_id": "the id of an earlier row with another content; kept, with an id of its own",
    "opposite_label": "the two responses of an earlier pair the other way round; kept",
    "lower_score_chosen": "the chosen response has the lower score in the row; kept",
    "thoughts_dropped": "<think>...</think> or a field of thoughts was left out (data.thoughts=drop)",
    "truncated_prompt": "the prompt was cut to max_prompt_length",
    "truncated_response": "a response was cut to max_completion_length and does not end in EOS",
}


class BadRow(ValueError):
    """A row that cannot be used: `reason` is a key of BAD_REASONS, `detail` says what was seen."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in BAD_REASONS, reason
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class LeftOut(Exception):
    """A sound row that says itself that it is not to be used so: `reason` is a key of DROPPED."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in DROPPED, reason
        super().__init__(detail)
        self.reason = reason


def shorten(text: str, limit: int = 80) -> str:
    """The text, or its beginning."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
