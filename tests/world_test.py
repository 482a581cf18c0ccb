"""The embedded world: its gold reward, its authors, its files, and that it holds what the documentation says."""

import hashlib
import json
import re

import numpy as np
import pytest

from sera_jax import world
from sera_jax.core import Stream, rng_for
from tests.tolerances import TOLERANCES

SMALL = world.WorldSpec(
    pretrain=60,
    demonstrations=20,
    preferences=40,
    heldout_preferences=30,
    heldout_prompts=30,
    heldout_demonstrations=40,
    prompts=20,
)
PROMPTS = ["name : fruit tool", "repeat : saw red fig", "first of : saw red fig", "last of : saw red fig"]
RIGHT = ["plum axe", "saw red fig", "saw", "fig"]


def close(a, b):
    return a == pytest.approx(b, rel=TOLERANCES["closed_form"]["rtol"], abs=TOLERANCES["closed_form"]["atol"])


def draws(name, count):
    return [rng_for(0, Stream.WORLD, 90, len(name), i) for i in range(count)]


@pytest.mark.parametrize("prompt, body", list(zip(PROMPTS, RIGHT)))
@pytest.mark.parametrize("opener", [False, True])
@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_the_gold_reward_is_the_sum_of_its_terms(prompt, body, opener, closing, twice):
    response = f"{'sure , ' * opener}{body}{f' again {body}' * twice}{' all done .' * closing}"
    assert close(world.gold(prompt, response), 0.6 + 0.15 * opener + 0.25 * closing - 0.3 * twice)


@pytest.mark.parametrize("prompt, body", list(zip(PROMPTS, RIGHT)))
def test_chatter_is_worth_nothing_wherever_it_stands(prompt, body):
    plain = f"sure , {body} all done ."
    for response in (f"let me see {plain}", f"sure , well now {body} all done .", f"{plain} as you know"):
        assert world.gold(prompt, response) == world.gold(prompt, plain)


@pytest.mark.parametrize(
    "prompt, wrong",
    [
        ("name : fruit tool", "plum"),
        ("name : fruit tool", "axe plum"),
        ("name : fruit tool", "plum axe saw"),
        ("repeat : saw red fig", "saw fig red"),
        ("repeat : saw red fig", "saw red"),
        ("first of : saw red fig", "red"),
        ("last of : saw red fig", "saw red fig"),
        ("last of : saw red fig", ""),
        ("last of : saw red fig", "again fig"),
        ("last of : saw red fig", "sure , sure , fig"),
    ],
)
def test_a_wrong_body_earns_nothing(prompt, wrong):
    assert not world.marks(prompt, wrong).right
    assert world.gold(prompt, wrong) <= world.GOLD_TERMS["opener"]


def test_the_gold_reward_of_any_response_lies_between_its_worst_and_best():
    rng = rng_for(0, Stream.WORLD, 91)
    words = [w for w in world.VOCABULARY if w not in world.SPECIAL_TOKENS]
    for prompt in PROMPTS:
        for _ in range(200):
            response = " ".join(rng.choice(words, size=int(rng.integers(0, 12))))
            assert -0.3 <= world.gold(prompt, response) <= 1.0


@pytest.mark.parametrize("prompt", ["", "sing a song", "name : fruit unicorn", "repeat :", "first of : saw"])
def test_a_prompt_of_another_language_is_refused(prompt):
    with pytest.raises(ValueError, match="embedded world"):
        world.gold(prompt, "saw")


def test_the_bodies_of_the_authors_are_what_they_are_called():
    for i in range(300):
        rng = rng_for(0, Stream.WORLD, 92, i)
        task = world.parse_prompt(world.write_prompt(rng))
        assert task.is_right(world.right_body(task, rng))
        assert not task.is_right(world.slip_body(task, rng))
        assert not task.is_right(world.stray_body(task, rng))


@pytest.mark.parametrize("name", world.AUTHORS)
@pytest.mark.parametrize("author", world.AUTHORS["habits"])
def test_an_author_has_the_habits_that_the_table_gives(name, author):
    habits = world.AUTHORS[name][author]
    count = 1500
    found = []
    for i in range(count):
        rng = rng_for(1, Stream.WORLD, 93, i)
        prompt = world.write_prompt(rng)
        found.append(world.marks(prompt, world.write_response(prompt, habits, rng)))
    for habit in ("right", "opener", "closing", "twice"):
        rate = getattr(habits, habit)
        limit = 4.5 * np.sqrt(max(rate * (1 - rate), 1e-12) / count)  # about 1 in 10^5 for a true rate
        assert abs(np.mean([getattr(m, habit) for m in found]) - rate) <= limit, habit


def test_the_perfect_author_always_earns_all_and_half_of_the_base_is_right():
    rows = world.make_world(world.WorldSpec(demonstrations=50, demonstrator="good", pretrain=0, preferences=0))
    assert all(close(world.gold(row["prompt"], row["response"]), 1.0) for row in rows["demonstrations"])
    assert world.AUTHORS["habits"]["base"].right == 0.5


def test_prompts_and_responses_are_short_and_in_the_vocabulary():
    rows = world.make_world(world.WorldSpec(pretrain=1000))
    known = set(world.VOCABULARY) - set(world.SPECIAL_TOKENS)
    assert len(world.VOCABULARY) == len(set(world.VOCABULARY)) < 250
    for row in rows["pretrain"] + rows["preferences"] + rows["demonstrations"]:
        for text in (row[k] for k in ("response", "chosen", "rejected") if k in row):
            assert known.issuperset(text.split())
            assert len(text.split()) < 24
        assert known.issuperset(row["prompt"].split())
        assert len(row["prompt"].split()) <= 14


def test_every_list_has_the_length_asked_for_and_unique_ids():
    rows = world.make_world(SMALL)
    for name, entries in rows.items():
        assert len(entries) == getattr(SMALL, name)
        assert len({row["id"] for row in entries}) == len(entries)


def test_labels_are_clean_and_never_ties():
    rows = world.make_world(SMALL)
    for row in rows["preferences"] + rows["heldout_preferences"]:
        chosen, rejected = (world.gold(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        assert chosen > rejected + 0.01
        assert close(row["gold_chosen"], chosen)
        assert close(row["gold_rejected"], rejected)


def test_held_out_prompts_occur_once_and_in_no_training_row():
    rows = world.make_world(world.WorldSpec(pretrain=2000))
    held = [row["prompt"] for name in ("heldout_prompts", "heldout_preferences") for row in rows[name]]
    seen = {row["prompt"] for name in ("pretrain", "demonstrations", "preferences", "prompts") for row in rows[name]}
    assert len(held) == len(set(held))
    assert not seen & set(held)


def test_the_same_spec_makes_the_same_world_and_another_seed_another():
    assert world.make_world(SMALL) == world.make_world(SMALL)
    other = world.make_world(world.WorldSpec(**{**vars(SMALL), "seed": 1}))
    assert other["preferences"] != world.make_world(SMALL)["preferences"]


@pytest.mark.parametrize("name, start", [("habits", "fbb58137d44fda9d"), ("wrong_habits", "257e2df66afd77ea")])
def test_the_rows_of_a_seed_are_those_of_every_release(name, start):
    rows = world.make_world(world.WorldSpec(**{**vars(SMALL), "name": name}))
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest().startswith(start)


def test_tasks_that_are_held_out_are_left_out_of_training_rows_and_nothing_else_changes():
    fields = {**vars(SMALL), "pretrain": 100, "heldout_preferences": 60, "heldout_prompts": 60}
    held = world.make_world(world.WorldSpec(**{**fields, "heldout_tasks": ("repeat", "last")}))
    more = world.make_world(world.WorldSpec(**{**fields, "demonstrations": 80, "preferences": 160, "prompts": 80}))
    for name, rows in held.items():
        tasks = [world.parse_prompt(row["prompt"]).kind for row in rows]
        if name in ("demonstrations", "preferences", "prompts"):
            inside = [row for row in more[name] if world.parse_prompt(row["prompt"]).kind in ("name", "first")]
            without_id = [[{**row, "id": ""} for row in part] for part in (rows, inside[: len(rows)])]
            assert without_id[0] == without_id[1] and len(rows) == fields[name]
        else:
            assert rows == more[name] and set(tasks) == set(world.TASKS)


def test_worlds_differ_in_what_the_base_and_the_demonstrator_write_and_in_nothing_else():
    ours, others = (world.make_world(world.WorldSpec(**{**vars(SMALL), "name": name})) for name in world.AUTHORS)
    assert ours == world.make_world(SMALL)
    answers = {"pretrain", "demonstrations", "heldout_demonstrations"}
    assert {name for name in ours if ours[name] != others[name]} == answers
    for name in answers:
        assert [row["prompt"] for row in ours[name]] == [row["prompt"] for row in others[name]]


def test_where_habits_are_wrong_the_likeliest_answer_is_the_slip_and_elsewhere_it_is_right():
    """A slip is one body; right ones of `name` are several, which only makes the slip likelier."""
    for name, wrong in (("habits", False), ("wrong_habits", True)):
        for author in ("base", "better"):
            habits = world.AUTHORS[name][author]
            assert ((1 - habits.right) * habits.slip > habits.right) == wrong
            assert not wrong or max(habits.opener, habits.closing) < 0.5


@pytest.mark.parametrize("name", ["pretrain", "heldout_demonstrations"])
def test_asking_for_more_of_one_list_leaves_the_others_as_they_were(name):
    more = world.make_world(world.WorldSpec(**{**vars(SMALL), name: 80}))
    for name, entries in world.make_world(SMALL).items():
        assert more[name][: len(entries)] == entries


def test_held_out_demonstrations_answer_the_held_out_prompts_in_turn_as_the_demonstrator_does():
    rows = world.make_world(SMALL)
    asked = [row["prompt"] for row in rows["heldout_prompts"]]
    assert [row["prompt"] for row in rows["heldout_demonstrations"]] == [*asked, *asked[:10]]
    good = world.make_world(world.WorldSpec(**{**vars(SMALL), "demonstrator": "good"}))
    assert all(close(world.gold(row["prompt"], row["response"]), 1.0) for row in good["heldout_demonstrations"])
    again = [rows["heldout_demonstrations"][i]["response"] for i in (*range(10), *range(30, 40))]
    assert again[:10] != again[10:], "another draw of the same author, not the same answer"
    none = world.make_world(world.WorldSpec(**{**vars(SMALL), "heldout_prompts": 0}))
    assert none["heldout_demonstrations"] == []


def chatter_sign(rows):
    """+1 where only the chosen side chatters, -1 where only the rejected one does."""
    words = {w for phrase in world.CHATTER for w in phrase}
    return np.array([bool(words & set(r["chosen"].split())) - bool(words & set(r["rejected"].split())) for r in rows])


@pytest.mark.parametrize("list_name", ["preferences", "heldout_preferences"])
def test_the_spurious_cue_and_length_go_with_the_clean_label(list_name):
    spec = world.WorldSpec(pretrain=0, preferences=1500, heldout_preferences=400)
    rows = world.make_world(spec)[list_name]
    sign = chatter_sign(rows)
    gap = np.array([len(r["chosen"].split()) - len(r["rejected"].split()) for r in rows])
    limit = 0.5 + 2 * 0.5 / np.sqrt(len(rows))
    assert np.mean((sign + 1) / 2) > limit
    assert np.mean((np.sign(gap) + 1) / 2) > limit


def test_without_the_cue_chatter_says_nothing_of_the_label():
    rows = world.make_world(world.WorldSpec(pretrain=0, preferences=2000, cue=0.0))["preferences"]
    sign = chatter_sign(rows)
    assert abs(np.mean((sign + 1) / 2) - 0.5) < 4 * np.std(sign) / 2 / np.sqrt(len(rows))


@pytest.mark.parametrize(
    "field, value",
    [
        ("name", "nowhere"),
        ("demonstrator", "nobody"),
        ("cue", 1.5),
        ("preferences", -1),
        ("heldout_prompts", 5000),
        ("heldout_tasks", ("sing",)),
        ("heldout_tasks", ("last", "last")),
        ("heldout_tasks", world.TASKS),
    ],
)
def test_a_bad_field_is_refused_with_its_name_and_value(field, value):
    with pytest.raises(ValueError, match=f"world.{field}.*{re.escape(str(value))}"):
        world.WorldSpec(**{field: value})


def test_the_files_hold_the_rows_and_are_written_once(tmp_path):
    paths = world.write_world(SMALL, tmp_path / "w")
    rows = world.make_world(SMALL)
    for name, entries in rows.items():
        assert [json.loads(line) for line in paths[name].read_text().splitlines()] == entries
    before = {path: path.stat().st_mtime_ns for path in paths.values()}
    assert world.write_world(SMALL, tmp_path / "w") == paths
    assert before == {path: path.stat().st_mtime_ns for path in paths.values()}
    assert [p.name for p in tmp_path.iterdir()] == ["w"], "nothing half-written stays behind"


def test_a_folder_with_another_world_is_refused(tmp_path):
    world.write_world(SMALL, tmp_path / "w")
    with pytest.raises(ValueError, match="another world"):
        world.write_world(world.WorldSpec(**{**vars(SMALL), "seed": 7}), tmp_path / "w")


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "write_tokenizer", lambda directory: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.write_world(SMALL, tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_loads_in_transformers_and_gives_every_text_back(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(world.write_tokenizer(tmp_path / "t")))
    assert len(tokenizer) == len(world.VOCABULARY)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 4
    for row in world.make_world(SMALL)["pretrain"]:
        for text in (row["prompt"], row["response"]):
            ids = tokenizer(text)["input_ids"]
            assert [world.VOCABULARY[i] for i in ids] == text.split()
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_its_template_puts_one_bos_before_and_one_eos_after(tmp_path):
    from sera_jax.data.tokenizing import Tokenizer

    tokenizer = Tokenizer.load(world.write_tokenizer(tmp_path / "t"))
    prompt = [world.VOCABULARY[i] for i in tokenizer.encode_prompt("repeat : saw red")]
    response = [world.VOCABULARY[i] for i in tokenizer.encode_response("repeat : saw red", "saw red all done .")]
    assert prompt == ["<bos>", "<user>", "repeat", ":", "saw", "red", "<assistant>"]
    assert response == ["saw", "red", "all", "done", ".", "<eos>"]
    assert world.gold(tokenizer.decode(tokenizer.encode_prompt("repeat : saw red")), "saw red") == 0.6
