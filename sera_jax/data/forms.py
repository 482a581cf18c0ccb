"""The forms of rows that are read, a form a line of `FORMS`: the fields that identify it, what it says, an example.

A row takes the first form whose fields it has. Its fields become those of this project: `prompt` or `messages` (with
`system`, `history`), and `chosen` and `rejected`, or `response`, or `text`. docs/forms.md is `page()` of this table.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from sera_jax.data import judged, turns
from sera_jax.data.reasons import FORMS_PAGE, BadRow, shorten

Row = dict[str, Any]
KINDS = {"preference": "pairs", "demonstration": "demonstrations", "prompt": "prompts", "text": "texts"}
ASKED = ("prompt", "instruction", "question", "query", "problem", "input", "inputs")
_EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant)\n?")


class Fields:
    """A row's fields; those that were taken are known to be read."""

    def __init__(self, value: Mapping[str, Any]):
        self.value = value
        self.taken: set[str] = set()

    def has(self, *fields: str) -> bool:
        return all(self.value.get(field) is not None for field in fields)

    def take(self, field: str) -> Any:
        self.taken.add(field)
        return self.value.get(field)

    def left(self) -> Row:
        return {key: part for key, part in self.value.items() if key not in self.taken}


Take = Callable[[Fields], Row]


def nothing(row: Fields) -> Row:
    return {}


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
        return all(any(row.has(name) for name in need.split("|")) for need in self.needs) and self.fits(row)


def recognise(value: Mapping[str, Any], kind: str) -> tuple[str, Row, Row]:
    """(form's name, the project's fields, the row's other fields).

    Raises:
        BadRow, LeftOut: no form fits, or the row's label says nothing.
    """
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


# -- the parts of forms


def _copy(*fields: str, **renamed: str) -> Take:
    """Fields as they are, and others under a new name: new=old."""
    names = {field: field for field in fields} | renamed
    return lambda row: {new: row.take(old) for new, old in names.items()}


def _with_input(first: str, *further: str) -> Take:
    """An instruction and, after a blank line, what it is about, where that is not empty."""

    def take(row: Fields) -> Row:
        asked = row.take(first)
        for field in further:
            added = row.value.get(field)
            if field not in row.value or turns.is_empty(added):
                row.taken.add(field)
            elif isinstance(asked, str) and isinstance(added, str):
                asked = f"{asked}\n\n{row.take(field)}"
        return {"prompt": asked}

    return take


def _asked(row: Fields) -> Row:
    """The prompt under the first of its names; `input` belongs to an instruction."""
    name = next(name for name in ASKED if row.has(name))
    return _with_input(name, "input", "context")(row) if name == "instruction" else {"prompt": row.take(name)}


def _talk(row: Fields) -> Row:
    return {"messages": row.take(next(name for name in ("messages", "conversations", "conversation") if row.has(name)))}


def _talk_as_prompt(row: Fields) -> Row:
    return {"prompt": _talk(row)["messages"]}


def _labelled(first: str, second: str, label: str, choices: tuple[float, float]) -> Take:
    def take(row: Fields) -> Row:
        return judged.by_choice(row.take(first), row.take(second), row.take(label), label, choices)

    return take


def _graded(first: str, second: str, label: str, low: float, high: float) -> Take:
    def take(row: Fields) -> Row:
        return judged.by_grade(row.take(first), row.take(second), row.take(label), label, low, high)

    return take


def _helpsteer(row: Fields) -> Row:
    """HelpSteer writes the turns of a conversation into one text."""
    text = row.take("prompt")
    if not isinstance(text, str) or "<extra_id_1>" not in text:
        return {"prompt": text}
    first, *rest = _EXTRA_ID.split(text)
    said = [{"role": "user", "content": first}]
    return {"prompt": said + [{"role": role.lower(), "content": part} for role, part in zip(rest[::2], rest[1::2])]}


def _webgpt(row: Fields) -> Row:
    asked = row.take("question")
    return {"prompt": asked.get("full_text") if isinstance(asked, dict) else asked}


def _webgpt_answers(row: Fields) -> Row:
    fields = ("score_0", "score_1")
    scores = (row.take(fields[0]), row.take(fields[1]))
    return judged.by_scores(row.take("answer_0"), row.take("answer_1"), scores, fields)


def _tldr(row: Fields) -> Row:
    info = row.take("info")
    if info.get("post") is None:
        return {"prompt": None if info.get("article") is None else f"Article:\n\n{info['article']}\n\nTL;DR:"}
    parts = [("SUBREDDIT: r/", info.get("subreddit")), ("TITLE: ", info.get("title")), ("POST: ", info["post"])]
    return {"prompt": "\n\n".join([*(f"{head}{part}" for head, part in parts if part), "TL;DR:"])}


def _tldr_answers(row: Fields) -> Row:
    texts = [part.get("text") if isinstance(part, dict) else part for part in row.take("summaries")]
    return judged.by_choice(texts[0], texts[1], row.take("choice"), "choice", (0, 1))


def _judged_turns(raw: Any, row: Fields) -> Any:
    """A conversation up to the turn that was judged (MT-Bench counts turns; Arena judges all)."""
    turn = row.take("turn")
    return raw[: 2 * turn] if isinstance(raw, list) and isinstance(turn, int) and turn > 0 else raw


def _arena(row: Fields) -> Row:
    seen = turns.Seen()
    said = turns.messages(_judged_turns(row.take("conversation_a"), row), "conversation_a", seen)
    return {"prompt": list(said[:-1] if said[-1]["role"] == "assistant" else said)}


def _arena_answers(row: Fields) -> Row:
    first, second = (_judged_turns(row.take(f"conversation_{side}"), row) for side in "ab")
    return judged.by_winner(first, second, row.take("winner"), "winner")


def _kaggle(row: Fields) -> Row:
    asked = judged.inner_list(row.take("prompt"), "prompt")
    if len(asked) > 1:
        raise BadRow("prompt_prefix_mismatch", f"the two answers belong to conversations of {len(asked)} turns each")
    return {"prompt": asked[0]}


def _kaggle_answers(row: Fields) -> Row:
    first, second = (judged.inner_list(row.take(f"response_{side}"), f"response_{side}")[-1] for side in "ab")
    fields = ("winner_model_a", "winner_model_b")
    row.taken.add("winner_tie")
    return judged.by_flags(first, second, (row.take(fields[0]), row.take(fields[1])), fields)


def _completions(row: Fields) -> Row:
    def score(entry: Any) -> float | None:
        known = [judged.finite(entry.get(name)) for name in ("overall_score", "fine-grained_score")]
        found = next((value for value in known if value is not None), None)
        return judged.mean_rating(entry.get("annotations")) if found is None else found

    entries = [entry for entry in row.take("completions") if isinstance(entry, dict)]
    return judged.of_list(entries, "completions", lambda entry: entry.get("response"), score, "score")


def _nectar(row: Fields) -> Row:
    def rank(entry: Any) -> float | None:
        found = judged.finite(entry.get("rank"))
        return None if found is None else -found

    entries = [entry for entry in row.take("answers") if isinstance(entry, dict)]
    return judged.of_list(entries, "answers", lambda entry: entry.get("answer"), rank, "rank")


def _magpie(row: Fields) -> Row:
    said, scores = row.take("responses"), row.take("rewards_armorm")
    if not isinstance(said, list) or not isinstance(scores, list) or len(said) != len(scores):
        raise BadRow("wrong_type", "responses and rewards_armorm are not two lists of one length")
    found = [judged.finite(s.get("score") if isinstance(s, dict) else s) for s in scores]
    return judged.of_list(list(zip(said, found)), "responses", lambda e: e[0], lambda e: e[1], "reward")


def _tree(row: Fields) -> Row:
    return {"prompt": row.take("prompt").get("text")}


def _replies(row: Fields) -> list[tuple[Any, float | None]]:
    given = row.take("prompt").get("replies")
    entries = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
    return [(entry.get("text"), judged.finite(entry.get("rank"))) for entry in entries]


def _tree_pair(row: Fields) -> Row:
    ranked = [(text, None if rank is None else -rank) for text, rank in _replies(row)]
    if not ranked:
        raise BadRow("missing_preference_label", "the tree has no reply")
    return judged.of_list(ranked, "replies", lambda e: e[0], lambda e: e[1], "rank")


def _tree_best(row: Fields) -> Row:
    ranked = [(rank, text) for text, rank in _replies(row) if rank is not None]
    if not ranked:
        raise BadRow("missing_field", "the tree has no reply with a rank")
    return {"response": min(ranked, key=lambda pair: pair[0])[1]}


def _is_talk(raw: Any) -> bool:
    return isinstance(turns.decoded(raw, ""), list | Mapping)


def _two_talks(row: Fields) -> bool:
    sides = [turns.decoded(row.value[side], side) for side in ("chosen", "rejected")]
    said = [len(turn.get("role") or ()) if isinstance(turn, dict) and isinstance(turn.get("role"), list) else 0
            for turn in sides]  # fmt: skip
    return any((isinstance(turn, list) and len(turn) > 1) or count > 1 for turn, count in zip(sides, said))


def _two_transcripts(row: Fields) -> bool:
    return all(isinstance(t := row.value[side], str) and turns.is_transcript(t) for side in ("chosen", "rejected"))


def _of_dict(field: str, part: str) -> Callable[[Fields], bool]:
    return lambda row: isinstance(found := row.value[field], dict) and found.get(part) is not None


def _lists(*fields: str) -> Callable[[Fields], bool]:
    return lambda row: all(isinstance(row.value.get(field), list) for field in fields)


def _texts(*fields: str) -> Callable[[Fields], bool]:
    return lambda row: all(isinstance(row.value.get(field), str) for field in fields)


# -- the table

_HERB, _OAK = "Name a herb.", "Name a tree."
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
         _copy(chosen="preferred_output", rejected="non_preferred_output"),
         {"input": {"messages": [_ASK]}, "preferred_output": [_BASIL], "non_preferred_output": [_SAND]}, _TALK_PAIR,
         lambda row: _of_dict("input", "messages")(row) and turns.is_empty(row.value["input"].get("tools")),
         "OpenAI's preference fine-tuning files"),
    Form("prompt, chosen, rejected", "preference", ("prompt", "chosen", "rejected"),
         _copy("prompt"), _copy("chosen", "rejected"), _PAIR, _PAIR, known="UltraFeedback (binarized), TRL's own"),
    Form("two conversations", "preference", ("chosen", "rejected"), nothing, _copy("chosen", "rejected"),
         {"chosen": [_ASK, _BASIL], "rejected": [_ASK, _SAND]}, _TALK_PAIR, _two_talks, "dpo-mix"),
    Form("HH transcripts", "preference", ("chosen", "rejected"), nothing, _copy("chosen", "rejected"),
         {"chosen": f"\n\nHuman: {_HERB}\n\nAssistant: Basil.", "rejected": f"\n\nHuman: {_HERB}\n\nAssistant: Sand."},
         _TALK_PAIR, _two_transcripts, "Anthropic's HH"),
    Form("conversation and two answers", "preference", ("messages|conversations|conversation", "chosen", "rejected"),
         _talk_as_prompt, _copy("chosen", "rejected"),
         {"conversations": _SHARE, "chosen": {"from": "gpt", "value": "Basil."},
          "rejected": {"from": "gpt", "value": "Sand."}},
         {"prompt": [_BRIEF, _ASK], "chosen": "Basil.", "rejected": "Sand."}, known="LLaMA-Factory"),
    Form("question, chosen, rejected", "preference", ("instruction|question|query|problem|input|inputs", "chosen",
         "rejected"), _asked, _copy("chosen", "rejected"),
         {"system": "Be brief.", "question": _HERB, "chosen": "Basil.", "rejected": "Sand."},
         {"prompt": [_BRIEF, _ASK], "chosen": "Basil.", "rejected": "Sand."},
         known="Orca pairs (question), Alpaca pairs (instruction, input), distilabel (input)"),
    Form("chosen_response, rejected_response", "preference", (_ANY, "chosen_response", "rejected_response"), _asked,
         _copy(chosen="chosen_response", rejected="rejected_response"),
         {"instruction": _HERB, "chosen_response": "Basil.", "rejected_response": "Sand."}, _PAIR, known="Argilla"),
    Form("response_j, response_k", "preference", (_ANY, "response_j", "response_k"), _asked,
         _copy(chosen="response_j", rejected="response_k"),
         {"question": _HERB, "response_j": "Basil.", "response_k": "Sand."}, _PAIR, known="Stack Exchange, paired"),
    # two answers and a label
    Form("PKU-SafeRLHF", "preference", (_ANY, "response_0", "response_1", "better_response_id"), _asked,
         _labelled("response_0", "response_1", "better_response_id", (0, 1)),
         {"prompt": _HERB, "response_0": "Sand.", "response_1": "Basil.", "better_response_id": 1,
          "safer_response_id": 0}, _PAIR, known="PKU-SafeRLHF (the better one, not the safer one)"),
    Form("response_0, response_1, preferred", "preference", (_ANY, "response_0", "response_1"), _asked,
         _labelled("response_0", "response_1", "preferred", (0, 1)),
         {"prompt": _HERB, "response_0": "Sand.", "response_1": "Basil.", "preferred": 1}, _PAIR),
    Form("AlpacaEval annotations", "preference", (_ANY, "output_1", "output_2"), _asked,
         _graded("output_1", "output_2", "preference", 1, 2),
         {"instruction": _HERB, "output_1": "Sand.", "output_2": "Basil.", "preference": 1.93}, _PAIR,
         known="AlpacaEval, LLMBar: below 1.5 the first, above the second"),
    Form("HelpSteer2", "preference", ("prompt", "response_1", "response_2", "preference_strength"), _helpsteer,
         _graded("response_1", "response_2", "preference_strength", -3, 3),
         {"prompt": _HERB, "response_1": "Basil.", "response_2": "Sand.", "preference_strength": -2}, _PAIR,
         known="HelpSteer2's preferences: below 0 the first, above the second"),
    Form("HelpSteer3", "preference", ("context", "response1", "response2", "overall_preference"),
         _copy(prompt="context"), _graded("response1", "response2", "overall_preference", -3, 3),
         {"context": [_ASK], "response1": "Sand.", "response2": "Basil.", "overall_preference": 3}, _TALK_PAIR),
    Form("SHP", "preference", ("history", "human_ref_A", "human_ref_B", "labels"), _copy(prompt="history"),
         _labelled("human_ref_A", "human_ref_B", "labels", (1, 0)),
         {"history": _HERB, "human_ref_A": "Basil.", "human_ref_B": "Sand.", "labels": 1}, _PAIR,
         known="Stanford Human Preferences"),
    Form("WebGPT comparisons", "preference", ("question", "answer_0", "answer_1", "score_0", "score_1"), _webgpt,
         _webgpt_answers, {"question": {"full_text": _HERB, "id": "a"}, "answer_0": "Sand.", "answer_1": "Basil.",
                           "score_0": -0.5, "score_1": 0.5}, _PAIR),
    Form("TL;DR comparisons", "preference", ("info", "summaries", "choice"), _tldr, _tldr_answers,
         {"info": {"subreddit": "herbs", "title": "A gift", "post": "I was given basil."},
          "summaries": [{"text": "Sand."}, {"text": "Basil."}], "choice": 1},
         {"prompt": "SUBREDDIT: r/herbs\n\nTITLE: A gift\n\nPOST: I was given basil.\n\nTL;DR:", "chosen": "Basil.",
          "rejected": "Sand."},
         lambda row: isinstance(row.value["info"], dict) and isinstance(row.value["summaries"], list)
         and len(row.value["summaries"]) == 2, "OpenAI's summarize-from-feedback"),
    Form("Arena (Kaggle)", "preference", ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
         _kaggle, _kaggle_answers,
         {"prompt": f'["{_HERB}"]', "response_a": '["Basil."]', "response_b": '["Sand."]', "winner_model_a": 1,
          "winner_model_b": 0, "winner_tie": 0}, _PAIR, known="Chatbot Arena, 55k"),
    Form("Arena votes", "preference", ("conversation_a", "conversation_b", "winner"), _arena, _arena_answers,
         {"conversation_a": [_ASK, _BASIL], "conversation_b": [_ASK, _SAND], "winner": "model_a"}, _TALK_PAIR,
         _lists("conversation_a", "conversation_b"), "Chatbot Arena, MT-Bench human judgments"),
    # lists of answers: the best against the worst
    Form("UltraFeedback", "preference", (_ANY, "completions"), _asked, _completions,
         {"instruction": _HERB, "completions": [{"response": "Sand.", "overall_score": 2},
                                                {"response": "Basil.", "overall_score": 8}]}, _PAIR,
         lambda row: isinstance(found := row.value["completions"], list) and len(found) > 0
         and all(isinstance(e, dict) and "response" in e for e in found),
         "UltraFeedback as published: by overall_score, else fine-grained_score, else the mean rating"),
    Form("Nectar", "preference", ("prompt", "answers"), _copy("prompt"), _nectar,
         {"prompt": f"\n\nHuman: {_HERB}\n\nAssistant: ", "answers": [{"answer": "Basil.", "rank": 1},
                                                                      {"answer": "Sand.", "rank": 7}]}, _TALK_PAIR,
         lambda row: isinstance(found := row.value["answers"], list) and len(found) > 0
         and all(isinstance(e, dict) and "rank" in e for e in found)),
    Form("Magpie, several responses", "preference", ("instruction", "responses", "rewards_armorm"), _asked, _magpie,
         {"instruction": _HERB, "responses": ["Sand.", "Basil."], "rewards_armorm": [{"score": 0.1}, {"score": 0.2}]},
         _PAIR),
    Form("OASST tree, two replies", "preference", ("prompt",), _tree, _tree_pair,
         {"message_tree_id": "a", "prompt": {"text": _HERB, "role": "prompter", "replies": [
             {"text": "Sand.", "role": "assistant", "rank": 1}, {"text": "Basil.", "role": "assistant", "rank": 0}]}},
         _PAIR, _of_dict("prompt", "replies"), "Open Assistant's ready trees: the first answers, by rank"),
    # demonstrations
    Form("OASST tree, best reply", "demonstration", ("prompt",), _tree, _tree_best,
         {"prompt": {"text": _HERB, "replies": [{"text": "Sand.", "rank": 1}, {"text": "Basil.", "rank": 0}]}}, _DEMO,
         _of_dict("prompt", "replies")),
    Form("prompt, response", "demonstration", ("prompt", "response"), _copy("prompt"), _copy("response"),
         _DEMO, _DEMO),
    Form("prompt, completion", "demonstration", ("prompt", "completion"), _copy("prompt"),
         _copy(response="completion"), {"prompt": _HERB, "completion": "Basil.", "label": True}, _DEMO,
         known="KTO's rows: label false is left out"),
    Form("LIMA", "demonstration", ("conversations",), _talk, nothing, {"conversations": [_HERB, "Basil."]},
         {"prompt": [_ASK], "response": "Basil."},
         lambda row: isinstance(found := row.value["conversations"], list) and bool(found)
         and all(isinstance(turn, str) for turn in found) and not row.has("messages")),
    Form("ShareGPT", "demonstration", ("conversations|conversation",), _talk, nothing,
         {"conversations": [*_SHARE, {"from": "gpt", "value": "Basil."}]},
         {"prompt": [_BRIEF, _ASK], "response": "Basil."},
         lambda row: not row.has("messages") and "'from'" in repr(next(iter(_talk(Fields(row.value)).values())))[:200],
         "ShareGPT, OpenHermes, Magpie"),
    Form("conversations", "demonstration", ("conversations|conversation",), _talk, nothing,
         {"conversation": [_ASK, _BASIL]}, {"prompt": [_ASK], "response": "Basil."},
         lambda row: not row.has("messages"), "LMSYS-Chat, WildChat, Capybara"),
    Form("messages", "demonstration", ("messages",), _talk, nothing, {"messages": [_BRIEF, _ASK, _BASIL]},
         {"prompt": [_BRIEF, _ASK], "response": "Basil."}, known="UltraChat, no_robots, OpenAI's fine-tuning files"),
    Form("Alpaca", "demonstration", ("instruction", "output"), _with_input("instruction", "input"),
         _copy(response="output"), {"instruction": "Sort these.", "input": "b, a", "output": "a, b"},
         {"prompt": "Sort these.\n\nb, a", "response": "a, b"}),
    Form("Dolly", "demonstration", ("instruction", "response"), _with_input("instruction", "context", "input"),
         _copy("response"),
         {"instruction": "Sort these.", "context": "b, a", "response": "a, b", "category": "open_qa"},
         {"prompt": "Sort these.\n\nb, a", "response": "a, b"}, known="Dolly, GPTeacher, Magpie"),
    Form("question, response", "demonstration", ("question|query|problem|input", "response|output|solution"), _asked,
         lambda row: {"response": row.take(next(n for n in ("response", "output", "solution") if row.has(n)))},
         {"system_prompt": "Be brief.", "question": _HERB, "response": "Basil."},
         {"prompt": [_BRIEF, _ASK], "response": "Basil."},
         _texts(), "OpenOrca (question), MetaMath (query), NuminaMath (problem, solution)"),
    Form("question, answer", "demonstration", ("question", "answer"), _copy(prompt="question"),
         _copy(response="answer"), {"question": "1 + 1?", "answer": "2\n#### 2"},
         {"prompt": "1 + 1?", "response": "2\n#### 2"}, _texts("question", "answer"), "GSM8K, Orca-Math"),
    Form("inputs, targets", "demonstration", ("inputs", "targets"), _copy(prompt="inputs"), _copy(response="targets"),
         {"inputs": _HERB, "targets": "Basil."}, _DEMO, known="FLAN, Aya"),
    # prompts alone
    Form("prompt", "prompt", ("prompt",), _copy("prompt"), nothing, {"prompt": _HERB}, {"prompt": _HERB},
         known="IFEval"),
    Form("context_messages", "prompt", ("context_messages",), _copy(messages="context_messages"), nothing,
         {"context_messages": [_ASK]}, {"prompt": [_ASK]}),
    Form("turns, the first", "prompt", ("turns",), lambda row: {"prompt": row.take("turns")[0]}, nothing,
         {"question_id": 1, "turns": [_HERB, "Another."]}, {"prompt": _HERB},
         lambda row: isinstance(found := row.value["turns"], list) and bool(found) and isinstance(found[0], str),
         "MT-Bench, Vicuna"),
    Form("instruction or question", "prompt", ("instruction|question|query|problem|input|inputs",), _asked, nothing,
         {"question": _HERB}, {"prompt": _HERB}, known="AlpacaEval, Arena-Hard"),
    # texts for pretraining
    Form("text", "text", ("text",), nothing, _copy("text"), {"text": "Basil is a herb."}, {"text": "Basil is a herb."},
         _texts("text"), "C4 and the like; guanaco: the text as it is"),
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
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
