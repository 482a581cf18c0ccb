"""Why a row is refused, left out, or kept with a remark: the names that reports, messages and counts use."""

from __future__ import annotations

BAD_REASONS: dict[str, str] = {
    # of a whole file: what is lost cannot be counted, so these always stop the run
    "git_lfs_pointer": "a git-LFS pointer instead of the data",
    "corrupt_gzip": "the compressed stream is damaged or cut off",
    "corrupt_parquet": "not a readable Parquet file",
    "empty_file": "the source holds no row",
    # of a line
    "non_utf8": "bytes that are not UTF-8",
    "invalid_json": "not JSON",
    "not_an_object": "JSON, but not an object with named fields",
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
    # of the content
    "empty_prompt": "the prompt is empty",
    "empty_chosen": "the chosen response is empty",
    "empty_rejected": "the rejected response is empty",
    "empty_response": "the response is empty",
    "identical_pair": "chosen and rejected are the same text",
    "identical_after_strip": "chosen and rejected differ in surrounding white space only",
    "prompt_prefix_mismatch": "chosen and rejected do not share everything but the last turn",
    "ends_with_user_turn": "the conversation does not end in an answer",
    "prompt_ends_with_answer": "the prompt does not end in a user turn",
    "stray_role_marker": "a response holds a further turn's role marker",
    # of the tokens
    "template_refused": "the chat template or tokenizer refuses the prompt",
    "response_truncated_to_nothing": "no token of the response is left",
    "identical_after_truncation": "chosen and rejected are the same tokens",
    "longer_than_row": "prompt and responses do not fit into a row",
}
FILE_REASONS = ("git_lfs_pointer", "corrupt_gzip", "corrupt_parquet", "empty_file")

DROPPED: dict[str, str] = {
    "prompt_too_long": "longer than max_prompt_length, and truncation_mode is 'drop'",
    "equal_scores": "the row scores chosen and rejected alike, so it prefers neither",
}

NOTES: dict[str, str] = {
    "blank_line": "an empty line, not counted as a row",
    "stray_role_marker_in_prompt": "a turn of the prompt holds a role marker; kept as text",
    "empty_earlier_turn": "an empty turn in the prompt; kept",
    "consecutive_same_role_in_prompt": "turns of one role in a row; joined with a blank line",
    "control_char": "control characters; kept",
    "replacement_char": "U+FFFD, the trace of an earlier decoding error; kept",
    "duplicate_row": "the same content again; kept, with an id of its own",
    "duplicate_id": "the id of an earlier row with another content; kept, with an id of its own",
    "truncated_prompt": "the prompt was cut to max_prompt_length",
    "truncated_response": "a response was cut to max_completion_length and does not end in EOS",
}
