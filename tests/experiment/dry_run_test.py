"""A dry run shows what a run reads and trains on, token by token, and leaves nothing behind."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from sera_jax import hosts, main
from sera_jax.checkpoint import StaleWorkdir, Workdir
from sera_jax.config import to_dict
from sera_jax.data.batches import ItemLoader, PairLoader
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout
from sera_jax.experiment import dry_run
from sera_jax.experiment.assembly import read_corpus
from sera_jax.experiment.dry_run_report import as_text
from sera_jax.experiment.methods import METHODS
from sera_jax.loops.runtime import Preempted
from tests.loops.tiny import BATCH, PAIRS, tiny_config, tiny_flags, tiny_srppo

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAKE = {
    "sera": lambda root: tiny_config(root, sera__arms=("daa", "sera"), sera__rounds=2),
    "online_dpo": lambda root: tiny_config(root, method="online_dpo", online__updates=3),
    "srppo": lambda root: tiny_srppo(
        root,
        world__preferences=40,
        world__prompts=30,
        ppo__arms=("srppo", "ppo_reward_model", "sft_longer"),
        ppo__prompt_overlap=0.5,
    ),
}


@pytest.fixture(scope="module", params=list(MAKE))
def looked(request, tmp_path_factory):
    """(config, facts of its dry run, the corpus that its run reads)."""
    root = tmp_path_factory.mktemp(request.param)
    config = MAKE[request.param](root / "run")
    facts = dry_run.look(config)
    assert list(root.iterdir()) == [], "nothing is made"
    return config, facts, read_corpus(config, Workdir(root / "other", {}), lambda text: None)


def test_every_method_has_a_dry_run():
    assert set(MAKE) == set(METHODS)


def test_json_says_what_the_text_shows(looked):
    _, facts, _ = looked
    read = json.loads(json.dumps(facts, allow_nan=False))
    assert read == facts
    text = as_text(read)
    for source in facts["sources"]:
        assert f"{source['name']}: {source['rows']} rows of " in text
        for of in source["lengths"].values():
            assert f"{of['p99']}" in text
    for training in facts["trainings"]:
        for entry in training.get("first", ()):
            assert entry["id"] in text
            assert all(json.dumps(part["text"], ensure_ascii=False) in text for part in entry["parts"])
    assert all(note in text for note in facts["notes"])


def test_the_counts_add_up_to_the_rows_that_a_run_keeps(looked):
    config, facts, corpus = looked
    for source in facts["sources"]:
        lost = sum(count["count"] for kind in ("bad", "dropped") for count in source[kind].values())
        assert source["rows"] == source["kept"] + lost
        assert source["rows"] == sum(sum(forms.values()) for forms in source["forms"].values())
        assert config.workdir in source["spec"], "where the run would have it"
    kept = {source["name"]: source["kept"] for source in facts["sources"]}
    by_pairs = METHODS[config.method].texts[0] == "preference"
    assert kept["pretrain"] == len(corpus.pretrain) == config.world.pretrain
    assert kept["train" if by_pairs else "demonstrations"] == len(corpus.train or corpus.demonstrations)
    assert facts["held_out"]["left_out"] == corpus.held_out_rows
    assert facts["prompts"] == len(corpus.prompts)
    assert set(facts["contamination"]) == set(corpus.held_out_rows)


def entries_of(corpus, training):
    entries = {"base model": corpus.pretrain, "SFT": corpus.demonstrations, "round": corpus.train}
    return (entries | {"reward model": corpus.reward_pairs})[training["what"]]


def test_the_boundaries_and_masks_shown_are_those_of_the_rows_that_training_gets(looked):
    config, facts, corpus = looked
    shown = [training for training in facts["trainings"] if training.get("first")]
    assert {"base model", "SFT"} < {training["what"] for training in shown}
    for training in shown:
        entries = list(entries_of(corpus, training))[: dry_run.ROWS]
        layout, how = Layout(config.data.row_tokens), {"batch_size": len(entries), "seed": 0}
        if isinstance(entries[0], Item):
            rows = ItemLoader(entries, layout, **how).batch(0).rows
        else:
            rows = PairLoader(entries, layout, **how).batch(0).batch.rows
        trained = [
            rows.target[r][rows.slot[r] == k].tolist()
            for r in range(len(rows.slot))
            for k in range(rows.num_slots)
            if (rows.slot[r] == k).any()
        ]
        for entry, facts_of in zip(entries, training["first"], strict=True):
            item = getattr(entry, "item", entry)
            prompt, *answers = facts_of["parts"]
            assert facts_of["id"] == item.id
            assert prompt["ids"] == item.prompt.tolist()
            assert not any(prompt["mask"])
            for answer, response in zip(answers, item.responses, strict=True):
                assert answer["ids"] == response.tolist()
                assert [i for i, m in zip(answer["ids"], answer["mask"], strict=True) if m] in trained
                assert answer["trained"] == sum(answer["mask"]) == len(response)
                assert (answer["end"] is not None) == (response[-1] == corpus.tokenizer.end_id)
            sides = [answer["name"] for answer in answers]
            assert sides == (["rejected", "chosen"] if facts_of["flipped"] else ["chosen", "rejected"])[
                : len(sides)
            ] or (sides == ["response"])
        assert sum(map(len, trained)) == sum(part["trained"] for entry in training["first"] for part in entry["parts"])


def test_what_is_trained_on_does_not_depend_on_how_prompts_are_shared():
    item = Item("a", np.arange(5, dtype=np.int32), tuple(np.arange(n, dtype=np.int32) + 7 for n in (3, 1)))
    for share_prompt in (True, False):
        masks = dry_run.trained_on(item, share_prompt)
        assert [mask.tolist() for mask in masks] == [[False] * 5, [True] * 3, [True]]


def test_tokens_are_counted_as_those_of_packed_rows_are():
    from sera_jax.aot import flops
    from sera_jax.data.batches import score_batches

    rng = np.random.default_rng(0)
    items = [
        Item(str(i), np.ones(rng.integers(1, 9), np.int32), tuple(np.ones(n, np.int32) for n in rng.integers(1, 9, 2)))
        for i in range(20)
    ]
    batches = score_batches(items, Layout(64), 4)
    packed = [flops.of_rows(batch.rows) for batch in batches]
    assert dry_run.tokens_of(items) == flops.Tokens(*(sum(part) for part in zip(*packed, strict=True)))


def test_updates_are_those_of_the_config(looked):
    config, facts, corpus = looked
    updates = {training["what"]: (training["updates"], training["times"]) for training in facts["trainings"]}
    assert updates["base model"] == (-(-len(corpus.pretrain) // config.pretrain.batch_size), 1)
    assert updates["SFT"] == (-(-len(corpus.demonstrations) // config.sft.batch_size), 1)
    more = {name: found for name, found in updates.items() if name not in ("base model", "SFT")}
    assert (
        more
        == {
            "sera": {"round": (PAIRS // BATCH, 3)},  # the first is shared by both arms
            "online_dpo": {"round": (PAIRS // BATCH, 1), "arm": (3, 1)},
            "srppo": {"iteration": (2, 8), "reward model": (1, 1), "longer SFT": (6, 1)},
        }[config.method]
    )


def test_nothing_is_compiled_and_a_folder_with_results_stays_as_it_is(tmp_path):
    config = tiny_config(tmp_path / "run")
    Workdir(tmp_path / "run", to_dict(config)).phase("one", {}, lambda folder: None)
    before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}
    compiled = []

    def ends(event, seconds, **details):
        compiled.extend([details] if "backend_compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(ends)
    try:
        dry_run.look(config)
        assert compiled == []
        jax.jit(lambda x: x + 1)(np.ones(3)).block_until_ready()
        assert compiled, "or nothing would be heard"
    finally:
        jax.monitoring.unregister_event_duration_listener(ends)
    assert before == {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")
    }
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=8))
    with pytest.raises(StaleWorkdir, match=r"train\.batch_size: 16 there, 8 now"):
        dry_run.look(other)


def test_what_a_run_refuses_is_refused_and_a_signal_is_heard(tmp_path):
    config = tiny_config(tmp_path / "run", world__name="", data__train=str(tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match=r"config\.data\.train=.* does not exist"):
        dry_run.look(config)
    long = tiny_config(
        tmp_path / "run", sampling__max_new_tokens=64, data__row_tokens=256, model__max_position_embeddings=64
    )
    with pytest.raises(ValueError, match="max_position_embeddings=64 together"):
        dry_run.look(long)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        dry_run.look(tiny_config(tmp_path / "file"))
    with pytest.raises(Preempted, match="leaves nothing behind"):
        dry_run.look(tiny_config(tmp_path / "run"), stop_requested=lambda: True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_prints_one_object_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "sera_jax.main", *tiny_flags(tmp_path / "run"), "--dry_run=json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(dry_run.look(tiny_config(tmp_path / "run"))))
    assert list(tmp_path.iterdir()) == []


def test_of_several_processes_the_first_one_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "place", lambda *given: hosts.Hosts(1, 2))
    for flag in ("_COORDINATOR", "_PROCESSES", "_PROCESS"):
        monkeypatch.setattr(main, flag, types.SimpleNamespace(value=None))
    main.dry_run(tiny_config(tmp_path / "run"), lambda: False)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "process 1 of 2: the first one does the dry run\n")
