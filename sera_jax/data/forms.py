"""The forms of rows that are read, a form a line of `FORMS`: the fields that identify it, what it says, an example.

A row takes the first form whose fields it has. Its fields become those of this project: `prompt` or `messages` (with
`system`, `history`), and `chosen` and `rejected`, or `response`, or `text`. docs/forms.md is `page()` of this table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from sera_jax.data import form_parts as part
from sera_jax.data import trees, turns
from sera_jax.data.form_parts import ASKED, Fields, Row, Take, nothing
from sera_jax.data.reasons import FORMS_PAGE, BadRow, LeftOut, shorten

GUANACO = "### Human, ### Assistant"
KINDS = {"preference": "pairs", "demonstration": "demonstrations", "prompt": "prompts", "text": "texts"}


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of rows.

    Attributes:
        name: as the load report shows it.
        kind: what it is beside prompts, which every form but texts gives.
        needs: fields that must be there and not null; "a|b" one of several.
        prompt, answers: take the project's fields from the row's.
        example, gives: a row, and what of it is read (`prompt` as turns or text; the answers).
        fits: what else must hold of the row.
        known: data sets of this form.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    prompt: Take
    answers: Take
    example: Row
    gives: Row
    fits: Callable[[Fields], bool] = lambda row: True
    known: str = ""

    def is_of(self, row: Fields) -> bool:
        given = row.value
        for names in _names(self.needs):
            for name in names:
                if given.get(name) is not None:
                    break
            else:
                return False
        return self.fits(row)


@functools.cache
def _names(needs: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """The names of which one is needed, of each need."""
    return tuple(tuple(need.split("|")) for need in needs)


def recognise(value: Mapping[str, Any], kind: str) -> tuple[str, Row, Row]:
    """(form's name, the project's fields, the row's other fields).

    Raises:
        BadRow, LeftOut: no form fits, or the row's label says nothing.
    """
    if kind != "text" and trees.is_message(value):
        _refuse_message(value)
    row = Fields(value)
    for form in FORMS:
        if (form.kind == kind or (kind == "prompt" and form.kind != "text")) and form.is_of(row):
            own = form.prompt(row)
            if kind != "prompt":
                own |= form.answers(row)
            elif form.kind == "preference" and "chosen" in form.needs:
                own |= form.answers(row)  # of two conversations the prompt is what they share
            for field in ("system", "system_prompt", "history"):
                if field not in row.taken and not turns.is_empty(part := value.get(field)):
                    row.taken.add(field)
                    own[field] = part
            return form.name, own, row.left()
    raise BadRow("missing_field", _nearest(value, kind))


def _refuse_message(value: Mapping[str, Any]) -> None:
    """Of a message of Open Assistant's flat file that is in no tree, say why: LeftOut where it was deleted or stands
    under one that was, or BadRow."""
    if value.get("deleted") is True:
        raise LeftOut("undesirable", "the message, or one that it stands under, was deleted")
    raise BadRow(
        "missing_field",
        f"a message without its tree: its parent {shorten(repr(value.get('parent_id')))} is not in the file, or in no "
        "tree itself, or the file does not begin with a message; take all messages, or a file of trees; all forms: "
        f"{FORMS_PAGE}",
    )


def _nearest(value: Mapping[str, Any], kind: str) -> str:
    """What the row has, which form is nearest, and the way out."""
    given = {field for field, part in value.items() if part is not None}
    options = [form for form in FORMS if form.kind == kind or (kind == "prompt" and form.kind != "text")]

    def lacks(form: Form) -> list[str]:
        return [need for need in form.needs if not given & set(need.split("|"))]

    best = max(options, key=lambda form: (len(form.needs) - 2 * len(lacks(form)), -len(form.needs)))
    wanted = {"preference": "prompt:FIELD,chosen:FIELD,rejected:FIELD", "demonstration": "prompt:FIELD,response:FIELD"}
    lists = [f for f, part in value.items() if isinstance(part, list) and part and isinstance(part[0], dict)]
    way_out = f"name the fields by data.columns={wanted.get(kind, f'{kind}:FIELD')}"
    if len(given) <= 3 and lists and not any(set(part) & {"role", "from"} for part in value[lists[0]][:1]):
        way_out += f", or take its rows out first: jq -c '.{lists[0]}[]' FILE > rows.jsonl"
    missing = lacks(best)
    near = f"nearest is {best.name}, which needs {', '.join(best.needs)}" if len(missing) < len(best.needs) else ""
    no = f"no {' or '.join(missing[0].split('|'))}; " if near and missing else ""
    if near and not missing:
        near = f"its fields are those of {best.name}, their contents are not"
    shown = ", ".join(shorten(str(field), 40) for field in list(value)[:30]) or "no field"
    return f"{no}the row has {shown}{'; ' + near if near else ''}; {way_out}; all forms: {FORMS_PAGE}"


_HERB = "Name a herb."
_ASK, _BASIL, _SAND = ({"role": "user", "content": _HERB}, {"role": "assistant", "content": "Basil."},
                       {"role": "assistant", "content": "Sand."})  # fmt: skip
_BRIEF = {"role": "system", "content": "Be brief."}
_SHARE = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": _HERB}]
_PAIR = {"prompt": _HERB, "chosen": "Basil.", "rejected": "Sand."}
_TALK_PAIR = {"prompt": [_ASK], "chosen": "Basil.", "rejected": "Sand."}
_DEMO = {"prompt": _HERB, "response": "Basil."}
_ANY = "|".join(ASKED)

FORMS: tuple[Form, ...] = (
    # pairs
    Form("OpenAI preference", "preference", ("input", "preferred_output", "non_preferred_output"),
         lambda row: {"prompt": row.take("input")["messages"]},
         part.copy(chosen="preferred_output", rejected="non_preferred_output"),
         {"input": {"messages": [_ASK]}, "preferred_output": [_BASIL], "non_preferred_output": [_SAND]}, _TALK_PAIR,
         lambda row: part.of_dict("input", "messages")(row) and turns.is_empty(row.value["input"].get("tools")),
         "OpenAI's preference fine-tuning files"),
    Form("prompt, chosen, rejected", "preference", ("prompt", "chosen", "rejected"),
         part.copy("prompt"), part.copy("chosen", "rejected"), _PAIR, _PAIR,
         known="UltraFeedback (binarized), TRL's own"),
    Form("two conversations", "preference", ("chosen", "rejected"), nothing, part.copy("chosen", "rejected"),
         {"chosen": [_ASK, _BASIL], "rejected": [_ASK, _SAND]}, _TALK_PAIR, part.two_talks, "dpo-mix"),
    Form("HH transcripts", "preference", ("chosen", "rejected"), nothing, part.copy("chosen", "rejected"),
         {"chosen": f"\n\nHuman: {_HERB}\n\nAssistant: Basil.", "rejected": f"\n\nHuman: {_HERB}\n\nAssistant: Sand."},
         _TALK_PAIR, part.two_transcripts, "Anthropic's HH"),
    Form("conversation and two answers", "preference", ("messages|conversations|conversation", "chosen", "rejected"),
         part.talk_as_prompt, part.copy("chosen", "rejected"),
         {"conversations": _SHARE, "chosen": {"from": "gpt", "value": "Basil."},
          "rejected": {"from": "gpt", "value": "Sand."}},
         {"prompt": [_BRIEF, _ASK], "chosen": "Basil.", "rejected": "Sand."}, known="LLaMA-Factory"),
    Form("question, chosen, rejected", "preference", ("instruction|question|query|problem|input|inputs", "chosen",
         "rejected"), part.asked, part.copy("chosen", "rejected"),
         {"system": "Be brief.", "question": _HERB, "chosen": "Basil.", "rejected": "Sand."},
         {"prompt": [_BRIEF, _ASK], "chosen": "Basil.", "rejected": "Sand."},
         known="Orca pairs (question), Alpaca pairs (instruction, input), distilabel (input)"),
    Form("chosen_response, rejected_response", "preference", (_ANY, "chosen_response", "rejected_response"), part.asked,
         part.copy(chosen="chosen_response", rejected="rejected_response"),
         {"instruction": _HERB, "chosen_response": "Basil.", "rejected_response": "Sand."}, _PAIR, known="Argilla"),
    Form("response_j, response_k", "preference", (_ANY, "response_j", "response_k"), part.asked,
         part.copy(chosen="response_j", rejected="response_k"),
         {"question": _HERB, "response_j": "Basil.", "response_k": "Sand."}, _PAIR, known="Stack Exchange, paired"),
    # two answers and a label
    Form("PKU-SafeRLHF", "preference", (_ANY, "response_0", "response_1", "better_response_id"), part.asked,
         part.labelled("response_0", "response_1", "better_response_id", (0, 1)),
         {"prompt": _HERB, "response_0": "Sand.", "response_1": "Basil.", "better_response_id": 1,
          "safer_response_id": 0}, _PAIR, known="PKU-SafeRLHF (the better one, not the safer one)"),
    Form("response_0, response_1, preferred", "preference", (_ANY, "response_0", "response_1"), part.asked,
         part.labelled("response_0", "response_1", "preferred", (0, 1)),
         {"prompt": _HERB, "response_0": "Sand.", "response_1": "Basil.", "preferred": 1}, _PAIR),
    Form("AlpacaEval annotations", "preference", (_ANY, "output_1", "output_2"), part.asked,
         part.graded("output_1", "output_2", "preference", 1, 2),
         {"instruction": _HERB, "output_1": "Sand.", "output_2": "Basil.", "preference": 1.93}, _PAIR,
         known="AlpacaEval, LLMBar: below 1.5 the first, above the second"),
    Form("HelpSteer2", "preference", ("prompt", "response_1", "response_2", "preference_strength"), part.helpsteer,
         part.graded("response_1", "response_2", "preference_strength", -3, 3),
         {"prompt": _HERB, "response_1": "Basil.", "response_2": "Sand.", "preference_strength": -2}, _PAIR,
         known="HelpSteer2's preferences: below 0 the first, above the second"),
    Form("HelpSteer3", "preference", ("context", "response1", "response2", "overall_preference"),
         part.copy(prompt="context"), part.graded("response1", "response2", "overall_preference", -3, 3),
         {"context": [_ASK], "response1": "Sand.", "response2": "Basil.", "overall_preference": 3}, _TALK_PAIR),
    Form("SHP", "preference", ("history", "human_ref_A", "human_ref_B", "labels"), part.copy(prompt="history"),
         part.labelled("human_ref_A", "human_ref_B", "labels", (1, 0)),
         {"history": _HERB, "human_ref_A": "Basil.", "human_ref_B": "Sand.", "labels": 1}, _PAIR,
         known="Stanford Human Preferences"),
    Form("WebGPT comparisons", "preference", ("question", "answer_0", "answer_1", "score_0", "score_1"), part.webgpt,
         part.webgpt_answers, {"question": {"full_text": _HERB, "id": "a"}, "answer_0": "Sand.", "answer_1": "Basil.",
                           "score_0": -0.5, "score_1": 0.5}, _PAIR),
    Form("TL;DR comparisons", "preference", ("info", "summaries", "choice"), part.tldr, part.tldr_answers,
         {"info": {"subreddit": "herbs", "title": "A gift", "post": "I was given basil."},
          "summaries": [{"text": "Sand."}, {"text": "Basil."}], "choice": 1},
         {"prompt": "SUBREDDIT: r/herbs\n\nTITLE: A gift\n\nPOST: I was given basil.\n\nTL;DR:", "chosen": "Basil.",
          "rejected": "Sand."},
         lambda row: isinstance(row.value["info"], dict) and isinstance(row.value["summaries"], list)
         and len(row.value["summaries"]) == 2, "OpenAI's summarize-from-feedback"),
    Form("Arena (Kaggle)", "preference", ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
         part.kaggle, part.kaggle_answers,
         {"prompt": f'["{_HERB}"]', "response_a": '["Basil."]', "response_b": '["Sand."]', "winner_model_a": 1,
          "winner_model_b": 0, "winner_tie": 0}, _PAIR, known="Chatbot Arena, 55k"),
    Form("Arena votes", "preference", ("conversation_a", "conversation_b", "winner"), part.arena, part.arena_answers,
         {"conversation_a": [_ASK, _BASIL], "conversation_b": [_ASK, _SAND], "winner": "model_a"}, _TALK_PAIR,
         part.lists("conversation_a", "conversation_b"), "Chatbot Arena, MT-Bench human judgments"),
    # part.lists of answers: the best against the worst
    Form("UltraFeedback", "preference", (_ANY, "completions"), part.asked, part.completions,
         {"instruction": _HERB, "completions": [{"response": "Sand.", "overall_score": 2},
                                                {"response": "Basil.", "overall_score": 8}]}, _PAIR,
         lambda row: isinstance(found := row.value["completions"], list) and len(found) > 0
         and all(isinstance(e, dict) and "response" in e for e in found),
         "UltraFeedback as published: by overall_score, else fine-grained_score, else the mean rating"),
    Form("Nectar", "preference", ("prompt", "answers"), part.copy("prompt"), part.nectar,
         {"prompt": f"\n\nHuman: {_HERB}\n\nAssistant: ", "answers": [{"answer": "Basil.", "rank": 1},
                                                                      {"answer": "Sand.", "rank": 7}]}, _TALK_PAIR,
         lambda row: isinstance(found := row.value["answers"], list) and len(found) > 0
         and all(isinstance(e, dict) and "rank" in e for e in found)),
    Form("Magpie, several responses", "preference", ("instruction", "responses", "rewards_armorm"), part.asked,
         part.magpie,
         {"instruction": _HERB, "responses": ["Sand.", "Basil."], "rewards_armorm": [{"score": 0.1}, {"score": 0.2}]},
         _PAIR),
    Form("OASST tree, two replies", "preference", ("prompt",), part.tree, part.tree_pair,
         {"message_tree_id": "a", "prompt": {"text": _HERB, "role": "prompter", "replies": [
             {"text": "Sand.", "role": "assistant", "rank": 1}, {"text": "Basil.", "role": "assistant", "rank": 0}]}},
         _PAIR, part.of_dict("prompt", "replies"),
         "Open Assistant's trees, and [its messages](#messages): the first answers, by rank"),
    # demonstrations
    Form("OASST tree, best reply", "demonstration", ("prompt",), part.tree, part.tree_best,
         {"prompt": {"text": _HERB, "replies": [{"text": "Sand.", "rank": 1}, {"text": "Basil.", "rank": 0}]}}, _DEMO,
         part.of_dict("prompt", "replies")),
    Form("prompt, response", "demonstration", ("prompt", "response"), part.copy("prompt"), part.copy("response"),
         _DEMO, _DEMO),
    Form("prompt, completion", "demonstration", ("prompt", "completion"), part.copy("prompt"),
         part.copy(response="completion"), {"prompt": _HERB, "completion": "Basil.", "label": True}, _DEMO,
         known="KTO's rows: label false is left out"),
    Form("LIMA", "demonstration", ("conversations",), part.talk, nothing, {"conversations": [_HERB, "Basil."]},
         {"prompt": [_ASK], "response": "Basil."},
         lambda row: isinstance(found := row.value["conversations"], list) and bool(found)
         and all(isinstance(turn, str) for turn in found) and not row.has("messages")),
    Form("ShareGPT", "demonstration", ("conversations|conversation",), part.talk, nothing,
         {"conversations": [*_SHARE, {"from": "gpt", "value": "Basil."}]},
         {"prompt": [_BRIEF, _ASK], "response": "Basil."},
         lambda row: not row.has("messages") and "'from'" in repr(part.talk(Fields(row.value)))[:200],
         "ShareGPT, OpenHermes, Magpie"),
    Form("conversations", "demonstration", ("conversations|conversation",), part.talk, nothing,
         {"conversation": [_ASK, _BASIL]}, {"prompt": [_ASK], "response": "Basil."},
         lambda row: not row.has("messages"), "LMSYS-Chat, WildChat, Capybara"),
    Form("messages", "demonstration", ("messages",), part.talk, nothing, {"messages": [_BRIEF, _ASK, _BASIL]},
         {"prompt": [_BRIEF, _ASK], "response": "Basil."}, known="UltraChat, no_robots, OpenAI's fine-tuning files"),
    Form("Alpaca", "demonstration", ("instruction", "output"), part.with_input("instruction", "input"),
         part.copy(response="output"), {"instruction": "Sort these.", "input": "b, a", "output": "a, b"},
         {"prompt": "Sort these.\n\nb, a", "response": "a, b"}),
    Form("Dolly", "demonstration", ("instruction", "response"), part.with_input("instruction", "context", "input"),
         part.copy("response"),
         {"instruction": "Sort these.", "context": "b, a", "response": "a, b", "category": "open_qa"},
         {"prompt": "Sort these.\n\nb, a", "response": "a, b"}, known="Dolly, GPTeacher, Magpie"),
    Form("question, response", "demonstration", ("question|query|problem|input", "response|output|solution"),
         part.asked,
         lambda row: {"response": row.take(next(n for n in ("response", "output", "solution") if row.has(n)))},
         {"system_prompt": "Be brief.", "question": _HERB, "response": "Basil."},
         {"prompt": [_BRIEF, _ASK], "response": "Basil."},
         part.texts(), "OpenOrca (question), MetaMath (query), NuminaMath (problem, solution)"),
    Form("question, answer", "demonstration", ("question", "answer"), part.copy(prompt="question"),
         part.copy(response="answer"), {"question": "1 + 1?", "answer": "2\n#### 2"},
         {"prompt": "1 + 1?", "response": "2\n#### 2"}, part.texts("question", "answer"), "GSM8K, Orca-Math"),
    Form("inputs, targets", "demonstration", ("inputs", "targets"), part.copy(prompt="inputs"),
         part.copy(response="targets"),
         {"inputs": _HERB, "targets": "Basil."}, _DEMO, known="FLAN, Aya"),
    Form(GUANACO, "demonstration", ("text",), part.hashed_talk, nothing,
         {"text": f"### Human: {_HERB}### Assistant: Basil."}, {"prompt": [_ASK], "response": "Basil."},
         part.is_hashed_talk, "guanaco; as `data.pretrain` it is a text"),
    # prompts alone
    Form("prompt", "prompt", ("prompt",), part.copy("prompt"), nothing, {"prompt": _HERB}, {"prompt": _HERB},
         known="IFEval"),
    Form("context_messages", "prompt", ("context_messages",), part.copy(messages="context_messages"), nothing,
         {"context_messages": [_ASK]}, {"prompt": [_ASK]}),
    Form("turns, the first", "prompt", ("turns",), lambda row: {"prompt": row.take("turns")[0]}, nothing,
         {"question_id": 1, "turns": [_HERB, "Another."]}, {"prompt": _HERB},
         lambda row: isinstance(found := row.value["turns"], list) and bool(found) and isinstance(found[0], str),
         "MT-Bench, Vicuna"),
    Form("instruction or question", "prompt", ("instruction|question|query|problem|input|inputs",), part.asked, nothing,
         {"question": _HERB}, {"prompt": _HERB}, known="AlpacaEval, Arena-Hard"),
    # texts for pretraining
    Form("text", "text", ("text",), nothing, part.copy("text"), {"text": "Basil is a herb."},
         {"text": "Basil is a herb."},
         part.texts("text"), "C4 and the like, guanaco"),
)  # fmt: skip


def page() -> str:
    """docs/forms.md."""
    lines = [
        "# Forms of rows",
        "",
        "Every form that is read by itself, in the order in which forms are tried. The load report says which one a",
        "source was read as. Of any form but a text the prompt can be taken, for `data.prompts`. Anything else is",
        "named by [data.columns](data.md#other-names). This page is written by `python -m sera_jax.data.forms`.",
        "",
    ]
    for kind, plural in KINDS.items():
        lines += [f"## {plural.capitalize()}", ""]
        for form in FORMS:
            if form.kind == kind:
                lines += [f"**{form.name}**" + (f" ({form.known})" if form.known else ""), "", "```json"]
                lines += [json.dumps(form.example), "```", ""]
    lines += [
        "## Messages",
        "",
        "**OASST messages** (`OpenAssistant/oasst1` and `oasst2` as the hub has them, a message a row): a source whose",
        "first row is one is read as the trees that its rows make, in whatever order they stand, and counted by trees.",
        "Deleted messages are left out and counted, and messages whose parent is not in the source are bad rows. As",
        "`data.pretrain` each message is a text; with `data.columns` each is a row.",
        "",
        "```json",
        *map(json.dumps, trees.EXAMPLE),
        "```",
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
