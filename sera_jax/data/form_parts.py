"""What forms are made of: functions that take the project's fields from a row's, and conditions on a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from sera_jax.data import judged, turns
from sera_jax.data.reasons import BadRow

Row = dict[str, Any]
ASKED = ("prompt", "instruction", "question", "query", "problem", "input", "inputs")
_HASHED = re.compile(r"### ?(Human|Assistant):")
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


def copy(*fields: str, **renamed: str) -> Take:
    """Fields as they are, and others under a new name: new=old."""
    names = {field: field for field in fields} | renamed
    return lambda row: {new: row.take(old) for new, old in names.items()}


def with_input(first: str, *further: str) -> Take:
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


def asked(row: Fields) -> Row:
    """The prompt under the first of its names; `input` belongs to an instruction."""
    name = next(name for name in ASKED if row.has(name))
    return with_input(name, "input", "context")(row) if name == "instruction" else {"prompt": row.take(name)}


def talk(row: Fields) -> Row:
    return {"messages": row.take(next(name for name in ("messages", "conversations", "conversation") if row.has(name)))}


def hashed_talk(row: Fields) -> Row:
    """Turns in one text, each after `### Human:` or `### Assistant:`."""
    _, *rest = _HASHED.split(row.take("text"))
    return {"messages": [{"role": role.lower(), "content": said.strip()} for role, said in zip(rest[::2], rest[1::2])]}


def is_hashed_talk(row: Fields) -> bool:
    return isinstance(text := row.value["text"], str) and _HASHED.split(text)[:2] in (["", "Human"], ["\n", "Human"])


def talk_as_prompt(row: Fields) -> Row:
    return {"prompt": talk(row)["messages"]}


def labelled(first: str, second: str, label: str, choices: tuple[float, float]) -> Take:
    def take(row: Fields) -> Row:
        return judged.by_choice(row.take(first), row.take(second), row.take(label), label, choices)

    return take


def graded(first: str, second: str, label: str, low: float, high: float) -> Take:
    def take(row: Fields) -> Row:
        return judged.by_grade(row.take(first), row.take(second), row.take(label), label, low, high)

    return take


def helpsteer(row: Fields) -> Row:
    """HelpSteer writes the turns of a conversation into one text."""
    text = row.take("prompt")
    if not isinstance(text, str) or "<extra_id_1>" not in text:
        return {"prompt": text}
    first, *rest = _EXTRA_ID.split(text)
    said = [{"role": "user", "content": first}]
    return {"prompt": said + [{"role": role.lower(), "content": part} for role, part in zip(rest[::2], rest[1::2])]}


def webgpt(row: Fields) -> Row:
    asked = row.take("question")
    return {"prompt": asked.get("full_text") if isinstance(asked, dict) else asked}


def webgpt_answers(row: Fields) -> Row:
    fields = ("score_0", "score_1")
    scores = (row.take(fields[0]), row.take(fields[1]))
    return judged.by_scores(row.take("answer_0"), row.take("answer_1"), scores, fields)


def tldr(row: Fields) -> Row:
    info = row.take("info")
    if info.get("post") is None:
        return {"prompt": None if info.get("article") is None else f"Article:\n\n{info['article']}\n\nTL;DR:"}
    parts = [("SUBREDDIT: r/", info.get("subreddit")), ("TITLE: ", info.get("title")), ("POST: ", info["post"])]
    return {"prompt": "\n\n".join([*(f"{head}{part}" for head, part in parts if part), "TL;DR:"])}


def tldr_answers(row: Fields) -> Row:
    texts = [part.get("text") if isinstance(part, dict) else part for part in row.take("summaries")]
    return judged.by_choice(texts[0], texts[1], row.take("choice"), "choice", (0, 1))


def judged_turns(raw: Any, row: Fields) -> Any:
    """A conversation up to the turn that was judged (MT-Bench counts turns; Arena judges all)."""
    turn = row.take("turn")
    return raw[: 2 * turn] if isinstance(raw, list) and isinstance(turn, int) and turn > 0 else raw


def arena(row: Fields) -> Row:
    seen = turns.Seen()
    said = turns.messages(judged_turns(row.take("conversation_a"), row), "conversation_a", seen)
    return {"prompt": list(said[:-1] if said[-1]["role"] == "assistant" else said)}


def arena_answers(row: Fields) -> Row:
    first, second = (judged_turns(row.take(f"conversation_{side}"), row) for side in "ab")
    return judged.by_winner(first, second, row.take("winner"), "winner")


def kaggle(row: Fields) -> Row:
    asked = judged.inner_list(row.take("prompt"), "prompt")
    if len(asked) > 1:
        raise BadRow("prompt_prefix_mismatch", f"the two answers belong to conversations of {len(asked)} turns each")
    return {"prompt": asked[0]}


def kaggle_answers(row: Fields) -> Row:
    first, second = (judged.inner_list(row.take(f"response_{side}"), f"response_{side}")[-1] for side in "ab")
    fields = ("winner_model_a", "winner_model_b")
    row.taken.add("winner_tie")
    return judged.by_flags(first, second, (row.take(fields[0]), row.take(fields[1])), fields)


def completions(row: Fields) -> Row:
    def score(entry: Any) -> float | None:
        known = [judged.finite(entry.get(name)) for name in ("overall_score", "fine-grained_score")]
        found = next((value for value in known if value is not None), None)
        return judged.mean_rating(entry.get("annotations")) if found is None else found

    entries = [entry for entry in row.take("completions") if isinstance(entry, dict)]
    return judged.of_list(entries, "completions", lambda entry: entry.get("response"), score, "score")


def nectar(row: Fields) -> Row:
    def rank(entry: Any) -> float | None:
        found = judged.finite(entry.get("rank"))
        return None if found is None else -found

    entries = [entry for entry in row.take("answers") if isinstance(entry, dict)]
    return judged.of_list(entries, "answers", lambda entry: entry.get("answer"), rank, "rank")


def magpie(row: Fields) -> Row:
    said, scores = row.take("responses"), row.take("rewards_armorm")
    if not isinstance(said, list) or not isinstance(scores, list) or len(said) != len(scores):
        raise BadRow("wrong_type", "responses and rewards_armorm are not two lists of one length")
    found = [judged.finite(s.get("score") if isinstance(s, dict) else s) for s in scores]
    return judged.of_list(list(zip(said, found)), "responses", lambda e: e[0], lambda e: e[1], "reward")


def tree(row: Fields) -> Row:
    return {"prompt": row.take("prompt").get("text")}


def replies(row: Fields) -> list[tuple[Any, float | None]]:
    given = row.take("prompt").get("replies")
    entries = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
    return [(entry.get("text"), judged.finite(entry.get("rank"))) for entry in entries]


def tree_pair(row: Fields) -> Row:
    ranked = [(text, None if rank is None else -rank) for text, rank in replies(row)]
    if not ranked:
        raise BadRow("missing_preference_label", "the tree has no reply")
    return judged.of_list(ranked, "replies", lambda e: e[0], lambda e: e[1], "rank")


def tree_best(row: Fields) -> Row:
    ranked = [(rank, text) for text, rank in replies(row) if rank is not None]
    if not ranked:
        raise BadRow("missing_field", "the tree has no reply with a rank")
    return {"response": min(ranked, key=lambda pair: pair[0])[1]}


def two_talks(row: Fields) -> bool:
    sides = [turns.decoded(row.value[side], side) for side in ("chosen", "rejected")]
    said = [len(turn.get("role") or ()) if isinstance(turn, dict) and isinstance(turn.get("role"), list) else 0
            for turn in sides]  # fmt: skip
    return any((isinstance(turn, list) and len(turn) > 1) or count > 1 for turn, count in zip(sides, said))


def two_transcripts(row: Fields) -> bool:
    return all(isinstance(t := row.value[side], str) and turns.is_transcript(t) for side in ("chosen", "rejected"))


def of_dict(field: str, part: str) -> Callable[[Fields], bool]:
    return lambda row: isinstance(found := row.value[field], dict) and found.get(part) is not None


def lists(*fields: str) -> Callable[[Fields], bool]:
    return lambda row: all(isinstance(row.value.get(field), list) for field in fields)


def texts(*fields: str) -> Callable[[Fields], bool]:
    return lambda row: all(isinstance(row.value.get(field), str) for field in fields)
