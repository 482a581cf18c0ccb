"""Every form of rows: its example is read as what it says, as a pair or demonstration and as a prompt."""

import json
import pathlib

import pytest

from sera_jax.data import forms
from sera_jax.data.columns import Reading, parse_columns
from sera_jax.data.loading import Limits, TooManyBadRows, load_preferences, load_pretrain, load_records
from sera_jax.data.reasons import BadRow, LeftOut
from sera_jax.data.records import PARSERS, parse_demonstration, parse_preference, parse_pretrain, parse_prompt
from tests.data.loading_test import WIDE, Bytes, texts, write

ASK = {"role": "user", "content": "Name a herb."}
BASIL = {"role": "assistant", "content": "Basil."}
SYSTEM = {"role": "system", "content": "Be brief."}
PAIR = {"chosen": "Basil.", "rejected": "Sand."}
of_rows = pytest.mark.parametrize("form", [f for f in forms.FORMS if f.kind != "text"], ids=lambda form: form.name)


def outcome(parse, row, **reading):
    """The reason for which a row is refused or left out, or its prompt and answers."""
    try:
        record = parse(row, Reading(**reading))
    except (BadRow, LeftOut) as why:
        return why.reason
    return (
        record.prompt,
        *(getattr(record, side) for side in ("chosen", "rejected", "response") if hasattr(record, side)),
    )


@of_rows
def test_a_form_reads_its_example_under_its_name(form):
    record = PARSERS[form.kind](form.example)
    prompt = form.gives["prompt"]
    assert record.form == form.name
    assert record.prompt == (tuple(prompt) if isinstance(prompt, list) else prompt)
    for side in ("chosen", "rejected", "response"):
        assert getattr(record, side, None) == form.gives.get(side)


@of_rows
def test_a_form_gives_as_a_prompt_what_it_gives_beside_its_answers(form):
    assert parse_prompt(form.example).prompt == PARSERS[form.kind](form.example).prompt


def test_the_page_of_forms_is_that_of_the_table():
    assert (pathlib.Path(__file__).parents[2] / "docs" / "forms.md").read_text() == forms.page()
    assert len({form.name for form in forms.FORMS}) == len(forms.FORMS)


SYSTEM_PAIR = ((SYSTEM, ASK), "Basil.", "Sand.")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Name a herb.", "system": "Be brief.", **PAIR}, SYSTEM_PAIR),
        ({"prompt": "Name a herb.", "system_prompt": "Be brief.", **PAIR}, SYSTEM_PAIR),
        ({"prompt": "Name a herb.", "system": "", **PAIR}, ("Name a herb.", "Basil.", "Sand.")),
        ({"prompt": "Name a herb.", "system": None, **PAIR}, ("Name a herb.", "Basil.", "Sand.")),
        ({"prompt": [SYSTEM, ASK], "system": "Be brief.", **PAIR}, SYSTEM_PAIR),
        ({"prompt": [SYSTEM, ASK], "system": "Be long.", **PAIR}, "differing_sources"),
        ({"prompt": "Name a herb.", "system": "Be brief.", "system_prompt": "Be long.", **PAIR}, "differing_sources"),
        ({"chosen": [ASK, BASIL], "rejected": [ASK, {**BASIL, "content": "Sand."}], "system": "Be brief."},
         SYSTEM_PAIR),
        ({"prompt": "And?", "history": [["Name a herb.", "Basil."]], **PAIR},
         ((ASK, BASIL, {"role": "user", "content": "And?"}), "Basil.", "Sand.")),
        ({"prompt": "Sort.", "input": "b, a", **PAIR}, "differing_sources"),
        ({"prompt": "Sort b, a.", "input": "b, a", **PAIR}, ("Sort b, a.", "Basil.", "Sand.")),
        ({"prompt": "Name a herb.", "messages": [{"role": "user", "content": "Other?"}, BASIL], **PAIR},
         "differing_sources"),
        ({"prompt": '["Name a herb."]', **PAIR}, "serialised_messages"),
        ({"prompt": "[{'role': 'user', 'content': 'Hi'}]", **PAIR}, "serialised_messages"),
        ({"prompt": json.dumps([ASK]), **PAIR}, ((ASK,), "Basil.", "Sand.")),
        ({"prompt": "Name a herb.", "tools": [{"name": "price"}], **PAIR}, "tools"),
        ({"prompt": "Name a herb.", "tools": "[]", **PAIR}, ("Name a herb.", "Basil.", "Sand.")),
        ({"prompt": "Name a herb.", "weight": 0.5, **PAIR}, "weight"),
        ({"prompt": "Name a herb.", "output_1": "Basil.", "output_2": "Sand.", "preference": 1.00004},
         ("Name a herb.", "Basil.", "Sand.")),
        ({"prompt": "Name a herb.", "output_1": "Basil.", "output_2": "Sand.", "preference": 1.5}, "tie"),
        ({"prompt": "Name a herb.", "response_0": "a", "response_1": "b", "better_response_id": None},
         "missing_preference_label"),
    ],
)  # fmt: skip
def test_what_a_pair_has_beside_its_prompt_is_read_or_the_row_is_refused(row, expected):
    assert outcome(parse_preference, row) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"tool_calls": [{"function": {"name": "price"}}]}, "tool_calls"),
        ({"tool_calls": None, "reasoning_content": None, "name": None}, ((ASK,), "Basil.")),
        ({"reasoning_content": "a herb"}, "reasoning_content"),
        ({"weight": 0}, "undesirable"),
        ({"weight": 1}, ((ASK,), "Basil.")),
        ({"content": [{"type": "text", "text": "Ba"}, {"type": "text", "text": "sil."}]}, ((ASK,), "Basil.")),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "content_parts"),
        ({"role": "tool"}, "tool_calls"),
    ],
)
def test_a_field_of_a_message_is_read_or_the_row_is_refused_under_its_name(message, expected):
    assert outcome(parse_demonstration, {"messages": [ASK, {**BASIL, **message}]}) == expected


def test_other_fields_are_named_and_null_is_nothing():
    row = {"messages": [{**ASK, "lang": "en"}, BASIL], "topic": "herbs", "rank": None, "source": "s"}
    assert parse_demonstration(row).unread == ("messages[].lang", "topic")


def test_a_row_marked_as_undesirable_is_no_demonstration_and_a_prompt_all_the_same():
    row = {"prompt": "Name a herb.", "completion": "Sand."}
    for label in (False, "False", 0):
        assert outcome(parse_demonstration, {**row, "label": label}) == "undesirable"
    assert outcome(parse_demonstration, {**row, "label": True}) == ("Name a herb.", "Sand.")
    assert outcome(parse_demonstration, {"messages": [ASK, BASIL], "label": False}) == "undesirable"
    assert parse_prompt({**row, "label": False}).prompt == "Name a herb."


def test_a_row_gives_the_same_prompt_as_a_prompt_and_as_a_demonstration():
    talk = [SYSTEM, ASK, BASIL, {"role": "user", "content": "Another."}, {"role": "assistant", "content": "Sage."}]
    row = {"prompt": "Name a herb.", "messages": talk}
    assert parse_prompt(row).prompt == parse_demonstration(row).prompt == tuple(talk[:4])
    pair = {"prompt": "Name a herb.", "chosen": talk, "rejected": [*talk[:4], BASIL]}
    assert parse_prompt(pair).prompt == parse_preference(pair).prompt == tuple(talk[:4])


def test_a_marker_in_an_answer_is_no_fault_of_the_prompt():
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.\n\nHumans: No.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}
    assert outcome(parse_preference, row) == "stray_role_marker"
    assert parse_prompt(row).prompt == ({"role": "user", "content": "Hi"},)


def test_a_list_of_answers_gives_one_pair_or_all_that_are_scored_apart(tmp_path):
    scores = {"Basil.": 9, "Sage.": 7, "Thyme.": 7, "Sand.": 1, " Sand.": 0.5, "<think>hm</think>Chalk.": 8}
    answers = [{"response": said, "overall_score": score} for said, score in scores.items()]
    row = {"id": "a", "instruction": "Name a herb.", "completions": answers}
    path = write(tmp_path / "a.jsonl", [row, {"prompt": "Another herb?", **PAIR}])
    best, report = load_records(path, "preference")
    assert [(r.chosen, r.rejected) for r in best] == [("Basil.", " Sand."), ("Basil.", "Sand.")]
    every, report = load_records(path, "preference", reading=Reading("", "refuse", "all"), max_bad_fraction=1)
    expected = {(a, b) for a in scores for b in scores if scores[a] > scores[b] and a.strip() != b.strip()}
    marked = {pair for pair in expected if any("think" in side for side in pair)}
    found = [(r.chosen, r.rejected) for r in every[:-1]]
    assert set(found) == expected - marked
    assert len(found) == len(set(found)) == len({r.id for r in every[:-1]})
    assert (report.kept, report.bad["thoughts"].count) == (len(every), len(marked))
    assert (
        report.rows
        == report.kept + report.bad_rows
        == sum(sum(f.values()) for f in report.forms.values()) + len(marked)
    )
    assert not report.noted, "they are no repetitions of the row"


def test_turns_that_stand_in_one_text_are_a_demonstration_and_as_a_text_stay_as_they_are():
    text = "### Human: Name a herb.### Assistant: Basil.### Human: Another?### Assistant: Sage."
    prompt = (ASK, BASIL, {"role": "user", "content": "Another?"})
    assert outcome(parse_demonstration, {"text": text}) == (prompt, "Sage.")
    assert outcome(parse_demonstration, {"text": f"{text}### Human: Thanks."}) == "ends_with_user_turn"
    for said in (text, f"{text}### Human: Thanks."):
        assert parse_pretrain({"text": said}).prompt == said
    assert outcome(parse_demonstration, {"text": "Basil is a herb. ### Human: no"}) == "missing_field"
    assert parse_pretrain({"text": text, "prompt": "Name a herb.", "response": "Basil."}).prompt == "Name a herb."


def test_a_message_alone_says_what_it_is():
    row = {"message_id": "a", "parent_id": "b", "message_tree_id": "b", "text": "Name a herb.", "role": "prompter"}
    for parse in (parse_demonstration, parse_preference, parse_prompt):
        with pytest.raises(BadRow, match=r"a message without its tree: its parent 'b' is not in the file"):
            parse(row)
        with pytest.raises(LeftOut, match="deleted"):
            parse(row | {"deleted": True})


def test_thoughts_are_kept_dropped_or_refused():
    row = {"prompt": "2+2?", "response": "<think>\ntwo and two\n</think>\n\n4"}
    assert outcome(parse_demonstration, row) == ("2+2?", row["response"])
    assert outcome(parse_demonstration, row, thoughts="drop") == ("2+2?", "4")
    assert outcome(parse_demonstration, row, thoughts="refuse") == "thoughts"
    talk = {"messages": [ASK, {**BASIL, "reasoning_content": "a herb"}]}
    assert outcome(parse_demonstration, talk, thoughts="drop") == ((ASK,), "Basil.")


def test_columns_are_read_by_dotted_paths_and_a_field_may_be_left_out_on_purpose():
    row = {"q": "Name a herb.", "meta": {"persona": "Be brief."}, "answers": ["Basil.", "Sand."], "tools": [1]}
    columns = "prompt:q,system:meta.persona,chosen:answers.0,rejected:answers.-1,tools:"
    assert outcome(parse_preference, row, columns=columns) == SYSTEM_PAIR
    assert "data.columns=prompt:q" in parse_preference(row, Reading(columns)).form
    other = {"prompt": "Name a herb.", **PAIR}
    assert outcome(parse_preference, other, columns=columns) == ("Name a herb.", "Basil.", "Sand.")
    for wrong in ("prompt", "promt:q", "prompt:q,prompt:r", ":q"):
        with pytest.raises(ValueError, match=r"data\.columns"):
            parse_columns(wrong)


def test_a_row_of_no_form_says_its_fields_the_nearest_form_and_the_way_out(tmp_path):
    with pytest.raises(BadRow) as caught:
        parse_preference({"frage": "Name a herb.", "chosen": "Basil."})
    for part in ("frage, chosen", "nearest is", "data.columns=prompt:FIELD", "docs/forms.md"):
        assert part in caught.value.detail
    with pytest.raises(BadRow, match=r"jq -c '\.data\[\]'"):
        parse_demonstration({"version": 1, "data": [{"a": 1}]})
    path = write(tmp_path / "a.jsonl", [{"frage": "x"}] * 4)
    with pytest.raises(TooManyBadRows, match=r"4 of 4 for one reason, missing_field.*data\.columns") as stopped:
        load_records(path, "preference")
    assert "raise data.max_bad_fraction" not in str(stopped.value)


def test_the_report_says_what_a_source_was_read_as_and_which_fields_nobody_reads(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "topic": "t"}] * 2)
    _, report = load_records(path, "demonstration")
    assert report.forms == {path: {"Alpaca": 2}}
    assert "read as Alpaca (2)" in report.table()
    assert "nobody reads the fields topic (2)" in report.table()


def test_many_rows_that_carry_a_template_stop_a_run_and_a_few_are_counted(tmp_path):
    marked = {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", **PAIR}
    plain = [{"prompt": f"prompt {i}", **PAIR} for i in range(30)]
    with pytest.raises(TooManyBadRows, match="carry a chat template already"):
        load_preferences(write(tmp_path / "a.jsonl", [marked, plain[0]]), Bytes(), limits=WIDE)
    _, report = load_preferences(write(tmp_path / "b.jsonl", [*plain, marked]), Bytes(), limits=WIDE)
    assert (report.noted["carries_template"].count, report.noted["carries_template"].first[-3:]) == (1, ":31")
    assert "carries_template" in parse_prompt({"prompt": "Be kind.\n\nHuman: Hi\n\nAssistant:"}).notes


def test_opposite_labels_and_a_lower_score_of_the_chosen_answer_are_noted(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "b", "rejected": "a"}]
    rows.append({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2})
    _, report = load_records(write(tmp_path / "a.jsonl", rows), "preference")
    assert {note: entry.count for note, entry in report.noted.items()} == {"opposite_label": 1, "lower_score_chosen": 1}


def test_a_text_is_pretrained_on_as_it_is_and_cut_to_the_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "Basil is a herb."}, {"prompt": "p", "response": "r"}])
    items, report = load_pretrain(path, Bytes(), limits=Limits(99, 6, 199))
    assert [texts(item) for item in items] == [["", "Basil "], ["p", "r"]]
    assert report.noted["truncated_response"].count == 1
    assert parse_pretrain({"text": "### Human: Hi"}).form == "text"
    assert outcome(parse_pretrain, {"texte": "Hi"}) == "missing_field"
