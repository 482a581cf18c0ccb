"""What Self-Rewarding PPO reads: which demonstrations are held out, which prompts are new, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from sera_jax import world
from sera_jax.checkpoint import Workdir
from sera_jax.data import loading
from sera_jax.data.items import Item
from sera_jax.data.loading import TooManyBadRows
from sera_jax.evaluation import gold
from sera_jax.experiment.assembly import check_sources, read_corpus
from sera_jax.experiment.corpus import HeldOut, as_text, new_prompts
from tests.loops.tiny import tiny_config, tiny_srppo


def item(name, prompt, response=()):
    responses = (np.array(response, np.int32),) if len(response) else ()
    return Item(name, np.array(prompt, np.int32), responses)


def prompts_of(items):
    return {item.prompt.tobytes() for item in items}


def ids(items):
    return [item.id for item in items]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    return world.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def rows():
    """Demonstrations and prompts in the made-up language, to be read as files of one's own."""
    return world.make_world(
        world.WorldSpec(seed=3, pretrain=40, demonstrations=60, heldout_demonstrations=12, prompts=30)
    )


@pytest.fixture
def read(tmp_path, tokenizer_dir, rows):
    """Reads files with the given rows in place of the embedded world: (corpus, what was said)."""

    def write(name, entries):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in entries))
        return str(tmp_path / name)

    def corpus(workdir="run", demonstrations=rows["demonstrations"], pretrain=(), heldout=(), prompts=(), **changes):
        changes = {
            "world__name": "",
            "model__tokenizer_name_or_path": str(tokenizer_dir),
            "data__demonstrations": write("demonstrations.jsonl", demonstrations),
            "data__pretrain": write("pretrain.jsonl", pretrain) if pretrain else "",
            "data__eval": write("eval.jsonl", heldout) if heldout else "",
            "data__prompts": write("prompts.jsonl", prompts) if prompts else "",
            **changes,
        }
        config = tiny_srppo(tmp_path / workdir, **changes)
        said: list[str] = []
        return read_corpus(config, Workdir(tmp_path / workdir, {}), said.append), "\n".join(said)

    return corpus


def test_the_embedded_world_gives_demonstrations_and_new_prompts_but_no_pairs(tmp_path):
    config = tiny_srppo(tmp_path, world__prompts=50, ppo__prompt_overlap=0.5)
    said: list[str] = []
    corpus = read_corpus(config, Workdir(tmp_path, {}), said.append)
    assert (corpus.train, corpus.heldout) == ([], [])
    assert len(corpus.demonstrations) == config.world.demonstrations
    assert len(corpus.heldout_demonstrations) == config.world.heldout_demonstrations
    assert all(len(item.responses) == 1 for item in [*corpus.demonstrations, *corpus.heldout_demonstrations])
    assert prompts_of(corpus.heldout_demonstrations) <= prompts_of(corpus.eval_prompts)
    assert len(corpus.eval_prompts) == config.world.heldout_prompts
    assert not prompts_of(corpus.prompts) & prompts_of([*corpus.demonstrations, *corpus.eval_prompts])
    assert len(corpus.prompts) + sum(corpus.prompts_left_out.values()) == 50
    assert len(corpus.pretrain) == config.world.pretrain
    held = corpus.heldout_demonstrations[0]
    assert corpus.gold is not None
    assert -0.3 <= corpus.gold(held, held.responses[0]) <= 1


REWARD_MODEL = {"ppo__arms": ("srppo", "ppo_reward_model")}


def test_a_reward_model_gets_the_worlds_pairs_with_noise_and_is_judged_by_its_held_out_ones_without(tmp_path):
    sizes = {"world__preferences": 40, "world__heldout_preferences": 12}
    config = tiny_srppo(tmp_path, **sizes, data__label_noise=0.25, **REWARD_MODEL)
    corpus = read_corpus(config, Workdir(tmp_path, {}), lambda text: None)
    assert (len(corpus.reward_pairs), len(corpus.heldout_reward_pairs)) == (40, 12)
    assert sum(pair.flipped for pair in corpus.reward_pairs) == 10
    assert not any(pair.flipped for pair in corpus.heldout_reward_pairs)
    assert (corpus.train, corpus.heldout) == ([], []), "these are SeRA's"
    without = read_corpus(tiny_srppo(tmp_path / "b", **sizes), Workdir(tmp_path / "b", {}), lambda text: None)
    assert (without.reward_pairs, without.heldout_reward_pairs) == ([], [])


@pytest.fixture(scope="module")
def pairs():
    """Preference pairs that are demonstrations, too."""
    rows = world.make_world(world.WorldSpec(seed=4, preferences=50, demonstrations=5))["preferences"]
    return [{**row, "response": row["chosen"]} for row in rows]


@pytest.mark.parametrize("source", ["one file", "another file", "another file with data.eval"])
def test_of_ones_own_pairs_a_share_judges_the_reward_model_whose_prompts_neither_it_nor_sft_has_seen(
    read, rows, pairs, tmp_path, source
):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    own = {"data__train": str(tmp_path / "pairs.jsonl"), "data__eval_fraction": 0.3, **REWARD_MODEL}
    demonstrations = pairs if source == "one file" else [*rows["demonstrations"], *pairs[:25]]
    corpus, said = read(demonstrations=demonstrations, heldout=pairs[:5] if "eval" in source else (), **own)
    known = prompts_of(pair.item for pair in corpus.reward_pairs)
    judged = prompts_of(pair.item for pair in corpus.heldout_reward_pairs)
    assert known and judged and not judged & (known | prompts_of(corpus.demonstrations))
    assert not known & prompts_of(corpus.heldout_demonstrations)
    left_out = corpus.held_out_rows["train"]
    assert len(corpus.reward_pairs) + len(corpus.heldout_reward_pairs) + left_out == len(pairs)
    assert f"held out {len(corpus.heldout_reward_pairs)} of {len(pairs)} pairs for the reward model" in said


def test_a_reward_model_without_pairs_is_refused(read, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no pair|no row"):
        read(data__train=str(tmp_path / "pairs.jsonl"), **REWARD_MODEL)


def test_without_new_prompts_there_are_none_and_sera_has_no_held_out_demonstrations(tmp_path):
    corpus = read_corpus(tiny_srppo(tmp_path / "a"), Workdir(tmp_path / "a", {}), lambda text: None)
    assert (corpus.prompts, corpus.prompts_left_out) == ([], {})
    sera = read_corpus(tiny_config(tmp_path / "b"), Workdir(tmp_path / "b", {}), lambda text: None)
    assert (sera.heldout_demonstrations, sera.prompts_left_out) == ([], {})
    assert sera.train and sera.prompts


def test_a_share_of_the_prompts_is_held_out_by_a_hash_that_the_order_does_not_change(read, rows):
    first, said = read(data__eval_fraction=0.3)
    again, _ = read("other", demonstrations=rows["demonstrations"][::-1], data__eval_fraction=0.3, seed=7)
    other, _ = read("third", data__eval_fraction=0.3, data__split_seed=1)
    assert 0 < len(first.heldout_demonstrations) < 60
    assert len(first.demonstrations) + len(first.heldout_demonstrations) == 60
    assert prompts_of(first.heldout_demonstrations) == prompts_of(again.heldout_demonstrations)
    assert prompts_of(first.heldout_demonstrations) != prompts_of(other.heldout_demonstrations)
    assert not prompts_of(first.heldout_demonstrations) & prompts_of(first.demonstrations)
    assert f"held out {len(first.heldout_demonstrations)} of 60 demonstrations" in said
    assert prompts_of(first.eval_prompts) == prompts_of(first.heldout_demonstrations)
    assert all(not item.responses for item in first.eval_prompts)


def test_demonstrations_with_the_prompt_of_a_named_held_out_one_are_left_out_and_said(read, rows):
    first = rows["demonstrations"][0]
    corpus, said = read(heldout=[*rows["heldout_demonstrations"], first])
    shared = sum(row["prompt"] == first["prompt"] for row in rows["demonstrations"])
    assert len(corpus.demonstrations) == 60 - shared
    assert len(corpus.heldout_demonstrations) == 13
    assert f"demonstrations: left out {shared} of 60 rows, whose prompts are held out" in said
    _, quiet = read("other", heldout=rows["heldout_demonstrations"])
    assert "left out" not in quiet


def as_messages(row):
    """The row with its prompt as one message, and more white space around it."""
    return {**row, "prompt": [{"role": "user", "content": f" {row['prompt']}\n"}]}


PAIRS = [
    {"prompt": f"name : {tool} animal", "chosen": "cow drill", "rejected": "cow"} for tool in ("axe", "saw", "rake")
]
PAIRS += [
    {"prompt": f"repeat : {tool}", "chosen": tool, "rejected": f"{tool} {tool}"} for tool in ("axe", "saw", "rake")
]


@pytest.mark.parametrize("form", [dict, as_messages])
def test_a_held_out_prompt_stands_in_no_source_of_a_method_that_learns_from_pairs(tmp_path, tokenizer_dir, form):
    others = {"train": PAIRS, "demonstrations": [{**row, "response": row["chosen"]} for row in PAIRS[:5]]}
    others |= {"pretrain": others["demonstrations"][:4], "prompts": [{"prompt": row["prompt"]} for row in PAIRS[:3]]}
    files = {"eval": [form(row) for row in PAIRS[:2]], **others}
    for name, entries in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entries))
    config = tiny_config(
        tmp_path / "run",
        world__name="",
        model__tokenizer_name_or_path=str(tokenizer_dir),
        **{f"data__{name}": str(tmp_path / f"{name}.jsonl") for name in files},
    )
    said: list[str] = []
    corpus = read_corpus(config, Workdir(tmp_path / "run", {}), said.append)
    held = {item.content for item in corpus.eval_prompts}
    assert len(held) == 2
    trained = [pair.item for pair in corpus.train], corpus.demonstrations, corpus.pretrain, corpus.prompts
    assert [len(items) for items in trained] == [4, 3, 2, 1]
    assert not held & {item.content for items in trained for item in items}
    assert corpus.held_out_rows == dict.fromkeys(others, 2)
    for name, entries in others.items():
        assert f"{name}: left out 2 of {len(entries)} rows, whose prompts are held out" in said


@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_without_demonstrations_sft_imitates_what_the_labels_say_after_the_noise(tmp_path, tokenizer_dir, noise):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    config = tiny_config(
        tmp_path / "run",
        world__name="",
        model__tokenizer_name_or_path=str(tokenizer_dir),
        data__train=str(path),
        data__eval_fraction=0.0,
        data__label_noise=noise,
    )
    corpus = read_corpus(config, Workdir(tmp_path / "run", {}), lambda text: None)
    decode = corpus.tokenizer.decode_response
    imitated = [decode(item.responses[0]) for item in corpus.demonstrations]
    labelled = [decode(pair.item.responses[pair.pairs[0][0]]) for pair in corpus.train]
    assert imitated == labelled
    as_the_rows_say = [
        row["rejected" if pair.flipped else "chosen"] for row, pair in zip(PAIRS, corpus.train, strict=True)
    ]
    assert imitated == as_the_rows_say
    assert sum(pair.flipped for pair in corpus.train) == round(6 * noise)
    assert corpus.demonstrations_are.endswith(", after label noise") == bool(noise)
    assert ids(corpus.pretrain) == [
        f"{pair.item.id}/{side}" for pair in corpus.train for side in ("chosen", "rejected")
    ]


@pytest.fixture
def exact(monkeypatch):
    """A gold reward that needs no package: 1 for an answer that is a reference of its prompt."""
    reward = gold.OfText(lambda said, references: float(said in references), compares=True)
    monkeypatch.setitem(gold.OF_TEXT, "chrf", lambda: reward)


def golds(corpus, items, responses):
    return [corpus.gold(item, corpus.tokenizer.encode_response("", said)) for item, said in zip(items, responses)]


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_answers_are_compared_with_the_preferred_ones_before_the_flips(tmp_path, tokenizer_dir, exact, noise):
    rows = [*PAIRS, {**PAIRS[0], "chosen": "cow axe"}, {"prompt": "repeat : oak", "chosen": "oak", "rejected": "elm"}]
    prompts = [{"prompt": row["prompt"]} for row in (PAIRS[1], {"prompt": "repeat : fig"})]
    files = {"train": rows[:-1], "eval": rows[-1:], "prompts": prompts}
    for name, entries in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entries))
    config = tiny_config(
        tmp_path / "run",
        world__name="",
        model__tokenizer_name_or_path=str(tokenizer_dir),
        data__label_noise=noise,
        eval__gold="chrf",
        **{f"data__{name}": str(tmp_path / f"{name}.jsonl") for name in files},
    )
    said: list[str] = []
    corpus = read_corpus(config, Workdir(tmp_path / "run", {}), said.append)
    assert sum(pair.flipped for pair in corpus.train) == noise * len(corpus.train)
    items = [pair.item for pair in corpus.train]
    for row in rows[:-1]:
        assert set(golds(corpus, [items[rows.index(row)]], [row["chosen"]])) == {1.0}
    assert golds(corpus, items[1:6], [row["rejected"] for row in PAIRS[1:]]) == [0.0] * 5
    assert golds(corpus, [*corpus.eval_prompts] * 2, ["oak", "elm"]) == [1.0, 0.0]
    assert np.isnan(golds(corpus, corpus.prompts, ["cow drill", "fig"])).tolist() == [False, True]
    assert "gold: 1 of 2 prompts have no preferred answer, and so no gold reward" in said


def test_a_gold_that_compares_nothing_is_of_prompts_without_a_preferred_answer_too(read, rows, monkeypatch):
    reward = gold.OfText(lambda said, references: float(said == "oak"), compares=False)
    monkeypatch.setitem(gold.OF_TEXT, "sentiment", lambda: reward)
    corpus, said = read(heldout=rows["heldout_demonstrations"], prompts=rows["prompts"], eval__gold="sentiment")
    assert golds(corpus, corpus.prompts[:2], ["oak", "elm"]) == [1.0, 0.0]
    assert "preferred answer" not in said


def test_self_rewarding_ppo_compares_answers_with_the_demonstrations(read, rows, exact):
    corpus, said = read(heldout=rows["heldout_demonstrations"], prompts=rows["prompts"], eval__gold="chrf")
    decode = corpus.tokenizer.decode_response
    for items in (corpus.demonstrations, corpus.heldout_demonstrations):
        assert golds(corpus, items, [decode(item.responses[0]) for item in items]) == [1.0] * len(items)
    assert not np.isnan([corpus.gold(item, items[0].responses[0]) for item in corpus.eval_prompts]).any()
    assert np.isnan([corpus.gold(item, items[0].responses[0]) for item in corpus.prompts]).all()
    assert f"gold: {len(corpus.prompts)} of {len(corpus.prompts)} prompts have no preferred answer" in said


def test_pairs_that_are_all_held_out_are_refused_with_the_way_out(tmp_path, tokenizer_dir):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    path = str(tmp_path / "pairs.jsonl")
    config = tiny_config(
        tmp_path / "run",
        world__name="",
        model__tokenizer_name_or_path=str(tokenizer_dir),
        data__train=path,
        data__eval=path,
    )
    with pytest.raises(ValueError, match=r"config\.data\.train: the prompts of all 6 rows are held out; name others"):
        read_corpus(config, Workdir(tmp_path / "run", {}), lambda text: None)


def test_nothing_left_to_imitate_is_refused_with_the_way_out(read, rows):
    held = set(ids(read(data__eval_fraction=0.5)[0].heldout_demonstrations))
    only = [row for row in rows["demonstrations"] if row["id"] in held]
    with pytest.raises(ValueError, match=rf"eval_fraction=0\.5 holds out all {len(only)} .*lower it"):
        read("other", demonstrations=only, data__eval_fraction=0.5)


def test_held_out_evaluation_is_cut_to_what_the_config_asks_for(read, rows):
    twice = [
        *rows["heldout_demonstrations"],
        *({**row, "id": "b" + row["id"]} for row in rows["heldout_demonstrations"]),
    ]
    corpus, _ = read(heldout=twice)
    assert (len(corpus.heldout_demonstrations), len(corpus.eval_prompts)) == (24, 12)
    corpus, _ = read("other", heldout=twice, eval__max_pairs=5, eval__num_prompts=3)
    assert (len(corpus.heldout_demonstrations), len(corpus.eval_prompts)) == (5, 3)
    assert prompts_of(corpus.eval_prompts) <= prompts_of(corpus.heldout_demonstrations)
    corpus, _ = read("none", heldout=twice, eval__num_prompts=-1)
    assert (len(corpus.heldout_demonstrations), len(corpus.eval_prompts)) == (24, 0), "held out, but not answered"


def test_the_base_reads_the_whole_demonstrations_that_are_not_held_out(read):
    corpus, _ = read(data__eval_fraction=0.3)
    assert ids(corpus.pretrain) == ids(corpus.demonstrations)
    for text, demonstration in zip(corpus.pretrain, corpus.demonstrations, strict=True):
        whole = np.concatenate([demonstration.prompt, *demonstration.responses])
        np.testing.assert_array_equal(np.concatenate([text.prompt, *text.responses]), whole)
        assert len(text.prompt) == 1


def test_texts_for_the_base_that_have_a_split_off_prompt_are_left_out(read, rows):
    corpus, said = read(pretrain=rows["demonstrations"] + rows["pretrain"], data__eval_fraction=0.3)
    assert not prompts_of(corpus.pretrain) & prompts_of(corpus.heldout_demonstrations)
    left_out = 100 - len(corpus.pretrain)
    assert left_out >= len(corpus.heldout_demonstrations)
    assert f"pretrain: left out {left_out} of 100 rows" in said


def test_a_prompt_that_opens_a_held_out_conversation_is_left_out_of_the_prompts_alone():
    opening, other = Item("o", np.array([1]), (), "key of A"), Item("x", np.array([2]), (), "key of X")
    talk = Item("t", np.array([1, 2, 3]), (), "key of A B C", ("key of A",))
    held = HeldOut([talk], [], lambda line: None)
    assert ids(held.keep_out([opening, other], "prompts")) == ["x"]
    assert ids(held.keep_out([opening, other], "demonstrations")) == ["o", "x"]


def test_new_prompts_are_those_that_no_demonstration_has_each_once(read, rows):
    given = [*rows["prompts"], *rows["prompts"][:4], *rows["demonstrations"][:5], *rows["heldout_demonstrations"][:3]]
    corpus, said = read(heldout=rows["heldout_demonstrations"], prompts=given, ppo__prompt_overlap=0.5)
    known = prompts_of([*corpus.demonstrations, *corpus.heldout_demonstrations])
    assert not prompts_of(corpus.prompts) & known
    assert len(prompts_of(corpus.prompts)) == len(corpus.prompts)
    assert len(corpus.prompts) + corpus.prompts_left_out["known"] + corpus.prompts_left_out["repeated"] == len(given)
    assert corpus.prompts_left_out["known"] >= 8
    assert corpus.prompts_left_out["repeated"] >= 1
    assert f"new prompts: {len(corpus.prompts)} that no demonstration has" in said
    assert all(not item.responses for item in corpus.prompts)


def test_new_prompts_keep_their_order_and_get_ids_of_their_own():
    known = [item("a", [1, 2], [9]), item("b", [1, 3], [9])]
    given = [item("c", [1, 5]), item("a", [1, 4]), item("d", [1, 3]), item("e", [1, 5])]
    fresh, left_out = new_prompts(given, known)
    assert [(i.id, i.prompt.tolist()) for i in fresh] == [("c", [1, 5]), ("new/a", [1, 4])]
    assert left_out == {"known": 1, "repeated": 1}


def test_prompts_that_are_all_known_are_refused_where_new_ones_are_asked_for(read, rows):
    known = [{"id": row["id"], "prompt": row["prompt"]} for row in rows["demonstrations"]]
    with pytest.raises(
        ValueError, match=r"prompt_overlap=0\.5 .*holds none \(60 known, 0 repeated\).*prompt_overlap=1"
    ):
        read(prompts=known, ppo__prompt_overlap=0.5)
    corpus, _ = read("other", prompts=known, ppo__prompt_overlap=1.0)
    assert len(corpus.prompts) == 0


def test_a_tokenizer_for_a_model_from_scratch_is_trained_on_demonstrations_and_texts(read, rows, tmp_path):
    odd = [{"prompt": "name : zzyzx", "response": "zzyzx zzyzx"}] * 20
    corpus, _ = read(pretrain=odd, model__tokenizer_name_or_path="", model__vocab_size=400, data__chat_template="none")
    pieces = corpus.tokenizer.vocabulary()
    assert "zzyzx" in {piece.removeprefix("Ġ") for piece in pieces}
    assert corpus.tokenizer_dir.startswith(str(tmp_path / "run" / "phases" / "tokenizer"))
    text = rows["demonstrations"][0]["response"]
    assert corpus.tokenizer.decode_response(corpus.demonstrations[0].responses[0]) == text


def test_a_tokenizer_that_cannot_end_a_response_is_refused(read, tokenizer_dir, tmp_path):
    folder = tmp_path / "endless"
    folder.mkdir()
    (folder / "tokenizer.json").write_text((tokenizer_dir / "tokenizer.json").read_text())
    config = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    del config["eos_token"], config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no token ends a response: .*set eos_token in tokenizer_config\.json"):
        read(model__tokenizer_name_or_path=str(folder))


def test_a_source_that_is_not_there_is_refused_before_any_is_read(tmp_path):
    config = tiny_srppo(tmp_path, world__name="", data__demonstrations="absent.jsonl")
    with pytest.raises(ValueError, match=r"config\.data\.demonstrations='absent\.jsonl'.*does not exist"):
        check_sources(config.data, config.model)


def test_a_text_is_its_first_token_and_the_rest():
    text = as_text(item("x", [1, 2, 3], [4, 5]))
    assert (text.prompt.tolist(), [r.tolist() for r in text.responses]) == ([1], [[2, 3, 4, 5]])
    assert dataclasses.asdict(text)["id"] == "x"


def test_a_corpus_is_read_once_and_said_at_every_start(read, rows, monkeypatch):
    first, said = read(demonstrations=[*rows["demonstrations"], {"prompt": "copy : a"}], data__max_bad_fraction=0.5)
    loads = []
    encode = loading.read_items
    monkeypatch.setattr(loading, "read_items", lambda *args, **how: loads.append(how["name"]) or encode(*args, **how))

    def again(**changes):
        loads.clear()
        demonstrations = [*rows["demonstrations"], {"prompt": "copy : a"}]
        return *read(**dict(demonstrations=demonstrations, data__max_bad_fraction=0.5) | changes), list(loads)

    corpus, same, loaded = again()
    assert (same, loaded) == (said, []) and "1 bad" in said
    assert ids(corpus.demonstrations) == ids(first.demonstrations)
    assert again(data__max_prompt_length=31)[2] == ["demonstrations"], "other limits"
    assert again(demonstrations=rows["demonstrations"])[2] == ["demonstrations"], "another file"
    assert again()[2] == []
    with pytest.raises(TooManyBadRows, match="1 of 61 rows are bad"):
        again(data__max_bad_fraction=0.01)


def test_damage_to_a_kept_corpus_is_refused_with_the_way_out(read, tmp_path):
    read()
    (tokens,) = (tmp_path / "run" / "phases" / "corpus").glob("demonstrations-*/tokens.npy")
    data = bytearray(tokens.read_bytes())
    data[-1] ^= 1
    tokens.write_bytes(bytes(data))
    with pytest.raises(
        ValueError, match=rf"tokens\.npy is not what its manifest says; delete {tokens.parent} and start"
    ):
        read()
