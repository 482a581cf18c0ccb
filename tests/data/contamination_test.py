"""Prompts that stand in rows: found where they were put, by an oracle of plain sets, and nowhere else."""

import random
import string

import pytest

from sera_jax.data import contamination
from sera_jax.data.contamination import NGRAM, PHRASE, SHORTEST, Search, Sought, words

HERBS = "Which of the many herbs that grow on a windowsill needs the least water in winter, and why is that?"
STARS = "How far away is the nearest star that can be seen with the naked eye from the southern half of the earth?"


def search(prompts, rows):
    """What is found of prompts (text or turns) in rows (prompt, *answers)."""
    found = Search(Sought(("asked", f"asked:{i}", prompt) for i, prompt in enumerate(prompts)))
    for line, (prompt, *answers) in enumerate(rows, 1):
        found.add(f"rows:{line}", prompt, answers)
    return found.found()["asked"]


def test_a_prompt_is_found_exactly_whatever_its_case_punctuation_white_space_and_system_turn():
    shouted = HERBS.upper().replace(",", " -").replace(" ", "\n ") + "!!"
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": shouted})
    found = search([STARS, HERBS], [("Name a herb.", "Basil."), (turns, "None of them.")])
    assert (found["prompts"], found["exact"], found["ngram"], found["common"], found["rows"]) == (2, 1, 0, 0, 1)
    (example,) = found["examples"]
    assert example == {"prompt": "asked:1", "says": example["says"], "row": "rows:2", "by": "exact"}
    assert HERBS.startswith(example["says"].removesuffix("..."))


@pytest.mark.parametrize("side", range(3), ids=["prompt", "chosen", "rejected"])
def test_thirteen_words_of_it_are_found_in_every_part_of_a_row_and_twelve_are_not(side):
    said = words(HERBS)

    def row(count):
        texts = ["one", "two", "three"]
        texts[side] = "Well: " + " ... ".join(said[2 : 2 + count]).title() + " etc."
        return texts

    assert search([HERBS], [row(NGRAM - 1)])["ngram"] == 0
    found = search([HERBS], [("a", "b", "c"), row(NGRAM)])
    assert (found["exact"], found["ngram"], found["rows"]) == (0, 1, 1)
    assert found["examples"][0]["row"] == "rows:2"
    assert found["examples"][0]["words"] == " ".join(said[2 : 2 + NGRAM])


def test_what_is_unrelated_is_not_found_nor_what_stands_astride_two_texts():
    said = words(HERBS)
    assert search([HERBS], [(STARS, HERBS[:40], HERBS[40:]), (" ".join(said[:10]), " ".join(said[10:]))])["rows"] == 0
    assert Search(Sought([])).found() == {}


@pytest.mark.parametrize("count", [SHORTEST - 1, SHORTEST, NGRAM - 1])
def test_a_short_prompt_is_looked_for_whole_and_a_very_short_one_as_a_whole_prompt_alone(count):
    short = " ".join(words(HERBS)[:count])
    within = search([short], [("a", f"You ask: {short}?")])
    assert within["ngram"] == (count >= SHORTEST)
    assert search([short], [("a", " ".join(words(short)[1:]))])["ngram"] == 0
    assert search([short], [(short.upper(), "a")])["exact"] == 1


def test_words_that_many_rows_have_are_a_phrase_and_counted_apart():
    rows = [(f"{STARS} {i}", "a") for i in range(PHRASE)]
    assert search([STARS], rows)["ngram"] == 1
    found = search([STARS], [*rows, (f"{STARS} or so", "a")])
    assert (found["ngram"], found["common"], found["rows"], found["examples"]) == (0, 1, 0, [])
    assert search([STARS], [*rows, (STARS, "a"), (STARS, "b")])["exact"] == 1, "the whole of it is no phrase"


def test_plain_letters_are_split_as_all_others_and_scripts_without_spaces_by_character():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice(string.printable) for _ in range(60))
        assert words(text) == words(text + " \u00e9")[:-1]
    assert words("STRASSE_stra\u00dfe, \uff21\uff22") == ["strasse", "strasse", "ab"]
    assert words("\u5929\u5730abc") == ["\u5929", "\u5730", "abc"]


@pytest.mark.parametrize("at_once", [1, 40, 1 << 16])
def test_the_counts_are_those_of_plain_sets_however_rows_are_cut_into_batches(monkeypatch, at_once):
    monkeypatch.setattr(contamination, "_AT_ONCE", at_once)
    rng = random.Random(1)
    pieces = [" ".join(rng.choice("abcdefgh") for _ in range(rng.randint(5, 9))) for _ in range(12)]

    def text(least, most):
        return " ".join(rng.choice(pieces) for _ in range(rng.randint(least, most)))

    prompts, rows = [text(1, 3) for _ in range(80)], [(text(2, 3), text(1, 4), text(1, 2)) for _ in range(60)]
    found = search(prompts, rows)

    def grams(said, size):
        return {tuple(said[i : i + size]) for i in range(len(said) - size + 1)}

    exact = [{r for r, row in enumerate(rows) if row[0].split() == prompt.split()} for prompt in prompts]
    near, common = [], []
    for prompt in prompts:
        said = prompt.split()
        size = min(len(said), NGRAM)
        own = grams(said, size) if len(said) >= SHORTEST else set()
        where = {
            gram: {r for r, row in enumerate(rows) if any(gram in grams(t.split(), size) for t in row)} for gram in own
        }
        near.append(set().union(*(at for at in where.values() if 0 < len(at) <= PHRASE)))
        common.append(any(len(at) > PHRASE for at in where.values()))
    assert found["exact"] == sum(map(bool, exact)) > 0
    assert found["ngram"] == sum(bool(n) and not e for n, e in zip(near, exact)) > 0
    assert found["common"] == sum(c and not n and not e for c, n, e in zip(common, near, exact)) > 0
    assert found["rows"] == len(set().union(*exact, *near)) < len(rows)
