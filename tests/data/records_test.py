"""Records: every accepted row shape, and every reason why a row is refused."""

import collections
import gzip
import json

import pytest

from sera_jax.data.reasons import BAD_REASONS, NOTES, BadRow, LeftOut
from sera_jax.data.records import parse_demonstration, parse_preference, parse_prompt

USER, OTHER = {"role": "user", "content": "Hi?"}, {"role": "user", "content": "And?"}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
HH = "\n\nHuman: Hi?\n\nAssistant:"

# Reasons recorded in ../shared/data/badrows -> what the row must become: a refusal or a note. The same table, with the
# reasons for it, is in the docstring of sera_jax.data.records.
RECORDED = {
    "empty_chosen": "empty_chosen",
    "empty_rejected": "empty_rejected",
    "empty_response": "empty_response",
    "identical_pair": "identical_pair",
    "identical_after_strip": "identical_after_strip",
    "prompt_prefix_mismatch": "prompt_prefix_mismatch",
    "rejected_ends_with_human_turn": "ends_with_user_turn",
    "chosen_stray_role_marker": "stray_role_marker",
    "rejected_stray_role_marker": "stray_role_marker",
    "null_preference": "missing_preference_label",
    "missing_preference_label": "missing_preference_label",
    "tie_preference_0": "tie",
    "stray_role_marker_in_prompt": "stray_role_marker_in_prompt",
    "empty_earlier_turn": "empty_earlier_turn",
    "consecutive_same_role_in_prompt": "consecutive_same_role_in_prompt",
    "control_char": "control_char",
    "replacement_char_U+FFFD": "replacement_char",
    "duplicate_row": "duplicate_row",  # seen only beside its twin: see loading_test
}


def reason(parse, **row):
    with pytest.raises(BadRow) as caught:
        parse(row)
    assert caught.value.reason in BAD_REASONS
    return caught.value.reason


def outcome(parse, row):
    """(reason for refusing the row or None, notes)."""
    try:
        return None, set(parse(row).notes)
    except BadRow as bad:
        return bad.reason, set()


def test_every_shape_of_a_preference_row_gives_the_same_record():
    shapes = [
        dict(prompt=[USER], chosen="Yes.", rejected="No."),
        dict(prompt=[USER], chosen=[YES], rejected=[NO]),
        dict(prompt=[USER], chosen=YES, rejected=NO),
        dict(prompt=[USER], chosen=[USER, YES], rejected=[USER, NO]),
        dict(prompt="Hi?", chosen=[USER, YES], rejected=[USER, NO]),
        dict(chosen=[USER, YES], rejected=[USER, NO]),
        dict(chosen={"role": ["user", "assistant"], "content": ["Hi?", "Yes."]}, rejected=[USER, NO]),
        dict(chosen=f"{HH} Yes.", rejected=f"{HH} No.\n"),
        dict(prompt=HH, chosen=" Yes.", rejected="No."),
        dict(prompt=HH, chosen=f"{HH} Yes.", rejected=f"{HH} No."),
        dict(prompt=[USER], output_1="Yes.", output_2="No.", preference=1.0),
        dict(prompt=[USER], response_0="No.", response_1="Yes.", preferred="1"),
    ]
    for row in shapes:
        record = parse_preference(row)
        assert (record.prompt, record.chosen, record.rejected) == ((USER,), "Yes.", "No."), row
        assert record.id == parse_preference(shapes[0]).id


def test_plain_strings_are_kept_to_the_letter():
    record = parse_preference(dict(prompt=" The sky is", chosen=" blue.", rejected=" green.\n"))
    assert (record.prompt, record.chosen, record.rejected) == (" The sky is", " blue.", " green.\n")


def test_the_prompt_of_a_long_conversation_is_everything_but_the_last_answer():
    record = parse_preference(dict(chosen=[USER, YES, OTHER, YES], rejected=[USER, YES, OTHER, NO]))
    assert record.prompt == (USER, YES, OTHER)
    text = "\n\nHuman: Hi?\n\nAssistant: Yes.\n\nHuman: And?\n\nAssistant:"
    assert parse_preference(dict(chosen=text + " Yes.", rejected=text + " No.")).prompt == record.prompt


def test_demonstrations_come_as_prompt_and_response_or_as_messages():
    shapes = [
        dict(prompt=[USER], response="Yes."),
        dict(prompt=[USER], completion="Yes."),
        dict(prompt=[USER], completion=[YES]),
        dict(prompt=HH, response="Yes."),
        dict(messages=[USER, YES]),
        dict(prompt=HH, response="Yes.", messages=[USER, YES]),
    ]
    for row in shapes:
        record = parse_demonstration(row)
        assert (record.prompt, record.response) == ((USER,), "Yes."), row
    assert parse_demonstration(dict(prompt="Hi?", response="Yes.")).prompt == "Hi?"


def test_a_prompt_can_be_taken_from_any_row():
    rows = [
        dict(prompt=[USER]),
        dict(prompt=HH),
        dict(messages=[USER]),
        dict(messages=[USER, YES]),
        dict(chosen=[USER, YES], rejected=[USER, NO]),
        dict(prompt=[USER], response="Yes."),
    ]
    for row in rows:
        assert parse_prompt(row).prompt == (USER,), row


def test_the_id_is_the_rows_own_or_a_hash_of_content_and_source():
    row = dict(prompt="Hi?", chosen="Yes.", rejected="No.")
    assert parse_preference({**row, "id": 7}).id == "7"
    assert parse_preference(row).id == parse_preference({**row, "unrelated": 1}).id
    others = [{**row, "source": "x"}, {**row, "chosen": "Yes"}, {**row, "prompt": "Hi"}]
    assert len({parse_preference(other).id for other in [row, *others]}) == 4


def test_other_fields_are_kept():
    record = parse_preference(dict(prompt="Hi?", chosen="Yes.", rejected="No.", source="s", score=[1, 2]))
    assert record.extra == {"source": "s", "score": [1, 2]}


def test_a_row_of_a_wrong_shape_says_which():
    pair = dict(prompt="Hi?", chosen="Yes.", rejected="No.")
    assert reason(parse_preference) == "missing_field"
    assert reason(parse_preference, **{**pair, "chosen": None}) == "missing_field"
    assert reason(parse_preference, chosen="Yes.", rejected="No.") == "missing_field"
    assert reason(parse_preference, chosen=[YES], rejected=[NO]) == "missing_field"
    assert reason(parse_preference, **{**pair, "chosen": 3}) == "wrong_type"
    assert reason(parse_preference, **{**pair, "prompt": 3}) == "wrong_type"
    assert reason(parse_preference, **{**pair, "prompt": []}) == "missing_field"
    assert reason(parse_preference, **{**pair, "chosen": [{"role": "tool", "content": "x"}]}) == "tool_calls"
    assert reason(parse_preference, **{**pair, "chosen": [{"from": "robot", "value": "x"}]}) == "bad_message"
    assert reason(parse_preference, **{**pair, "chosen": [{"role": "assistant", "content": None}]}) == "bad_message"
    assert reason(parse_preference, **{**pair, "prompt": "\ud800"}) == "invalid_unicode"
    assert reason(parse_preference, prompt="Hi?", output_1="a", output_2="b", preference="x") == "wrong_type"
    assert reason(parse_demonstration, prompt="Hi?") == "missing_field"
    assert reason(parse_prompt, text="Hi?") == "missing_field"


def test_a_row_that_teaches_nothing_is_refused():
    pair = dict(prompt="Hi?", chosen="Yes.", rejected="No.")
    assert reason(parse_preference, **{**pair, "prompt": " "}) == "empty_prompt"
    assert reason(parse_preference, **{**pair, "chosen": " \n"}) == "empty_chosen"
    assert reason(parse_preference, **{**pair, "rejected": ""}) == "empty_rejected"
    assert reason(parse_preference, **{**pair, "rejected": "Yes."}) == "identical_pair"
    assert reason(parse_preference, **{**pair, "rejected": " Yes.\n"}) == "identical_after_strip"
    assert reason(parse_demonstration, prompt="Hi?", response="") == "empty_response"


def test_a_conversation_that_does_not_fit_together_is_refused():
    assert reason(parse_preference, chosen=[USER, YES], rejected=[OTHER, NO]) == "prompt_prefix_mismatch"
    assert reason(parse_preference, chosen=[USER, YES], rejected=[NO]) == "prompt_prefix_mismatch"
    assert reason(parse_preference, prompt="Ho?", chosen=[USER, YES], rejected=[USER, NO]) == "prompt_prefix_mismatch"
    assert reason(parse_preference, chosen=[USER, YES, OTHER], rejected=[USER, NO]) == "ends_with_user_turn"
    assert reason(parse_preference, prompt=[USER, YES], chosen="Yes.", rejected="No.") == "prompt_ends_with_answer"
    assert reason(parse_preference, prompt=HH, chosen="Yes.\n\nHuman: And?", rejected="No.") == "stray_role_marker"
    assert reason(parse_demonstration, messages=[USER]) == "ends_with_user_turn"


def test_turns_of_one_role_in_a_row_are_joined_and_noted():
    record = parse_preference(dict(prompt=[USER, OTHER], chosen="Yes.", rejected="No."))
    assert record.prompt == ({"role": "user", "content": "Hi?\n\nAnd?"},)
    assert record.notes == ("consecutive_same_role_in_prompt",)


def test_every_recorded_malformed_row_is_refused_or_accepted_as_documented(shared_data):
    assert set(RECORDED.values()) <= set(BAD_REASONS) | set(NOTES)
    seen = collections.Counter()
    with gzip.open(shared_data / "badrows" / "real_malformed_rows.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            expected = {RECORDED[recorded] for recorded in row["reasons"]} - {"duplicate_row"}
            parse = parse_demonstration if "response" in row["raw"] else parse_preference
            refused, notes = outcome(parse, row["raw"])
            where = (row["dataset"], row["index"], row["reasons"], refused, notes)
            assert refused in expected if refused else expected <= notes, where
            seen.update(row["reasons"])
    assert set(seen) == set(RECORDED)
    assert sum(seen.values()) >= 187


def test_numbers_and_names_that_are_no_text_are_refused_by_reason():
    row = {"prompt": "q", "response_0": "a", "response_1": "b"}
    assert reason(parse_preference, **row, preferred=10**400) == "wrong_type"
    assert reason(parse_preference, prompt="q", chosen="a", rejected="b", id="\ud800") == "invalid_unicode"


@pytest.mark.parametrize("names", ["score_chosen score_rejected", "chosen_score rejected_score"])
def test_a_pair_of_equal_scores_is_no_preference(names):
    first, second = names.split()
    with pytest.raises(LeftOut, match=f"{first} and {second} are 4"):
        parse_preference({"prompt": "q", "chosen": "a", "rejected": "b", first: 4.0, second: 4})
    for unequal in ({first: 4.5, second: 4.0}, {first: None, second: None}, {first: 4.0}):
        parse_preference({"prompt": "q", "chosen": "a", "rejected": "b", **unequal})
