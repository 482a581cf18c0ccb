"""A run from the hub: names become folders and commits once, and a restart goes on with them."""

import dataclasses
import json
import pathlib

import pytest
import yaml

from sera_jax import experiment, hub, world
from sera_jax.checkpoint import StaleWorkdir
from sera_jax.checkpoint.papers import plain, write_json
from sera_jax.checkpoint.phases import check_config
from sera_jax.config import ModelGroup, to_dict
from sera_jax.core import Stream, key_for
from sera_jax.experiment import brought, dry_run
from sera_jax.experiment.card import card
from sera_jax.experiment.saved import find_policy
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.models.huggingface import save_pretrained
from tests.loops.tiny import tiny_config

CFG = ModelConfig(
    vocab_size=len(world.VOCABULARY),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
)


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of a model and of a data set."""
    root = tmp_path_factory.mktemp("made")
    tokenizer = world.write_tokenizer(root / "tokenizer")
    save_pretrained(root / "model", CFG, init_params(CFG, key_for(0, Stream.INIT)), tokenizer_dir=tokenizer)
    world.write_world(world.WorldSpec(preferences=64, demonstrations=4, pretrain=4, heldout_prompts=4), root / "rows")
    rows = {"data/train-00000-of-00001.jsonl": (root / "rows" / "preferences.jsonl").read_bytes()}
    return files_of(root / "model"), {**rows, ".gitattributes": b"\n"}


def config_of(workdir, **fields):
    names = {"model__model_name_or_path": "org/base", "data__train": "hub:org/rows", "world__name": ""}
    steps = {"sera__rounds": 1, "sft__max_steps": 1, "train__max_steps": 1, "eval__num_prompts": -1}
    return tiny_config(workdir, **names | steps | fields)


def test_a_run_records_the_commits_and_a_restart_goes_on_with_them(server, made, tmp_path, capsys):
    model, rows = (server.add(f"{kind}/org/{name}", files) for kind, name, files in
                   (("models", "base", made[0]), ("datasets", "rows", made[1])))  # fmt: skip
    config = config_of(tmp_path / "run")
    summary = experiment.run(config)
    assert summary["hub"] == {"model org/base": model, "data set org/rows": rows}
    assert summary["config"]["model"]["model_name_or_path"] == "org/base", "as it was asked for"
    said = "".join(capsys.readouterr())
    assert f"model org/base: commit {model}" in said
    inputs = json.loads((tmp_path / "run" / "phases" / "base" / "manifest.json").read_text())["inputs"]
    assert inputs["model"]["model_name_or_path"] == f"org/base@{model}", "wherever the cache lies"
    assert "revision" not in inputs["model"], "a field at its neutral value changes no inputs of before"
    text = card(tmp_path / "run", tmp_path / "run" / "phases" / "sft")
    head = yaml.safe_load(text.split("---")[1])
    assert (head["base_model"], head["datasets"], head["tags"]) == (
        "org/base",
        ["org/rows"],
        ["sera_jax", "sera", "dpo"],
    )
    facts = (f"org/base at commit {model}", f"| data.train: hub:org/rows | commit {rows} |", "| jax |", "| heldout")
    assert all(fact in text for fact in facts), text
    server.add("models/org/base", {**made[0], "README.md": b"newer"})
    server.down = 503
    again = experiment.run(config)
    assert again["hub"] == summary["hub"]
    assert again["params_sha256"] == summary["params_sha256"]


def test_a_dry_run_fetches_rows_config_and_tokenizer_and_no_weights(server, made, tmp_path):
    commit = server.add("models/org/base", made[0])
    server.add("datasets/org/rows", made[1])
    facts = dry_run.look(config_of(tmp_path / "run"))
    assert f"model org/base: commit {commit}" in facts["notes"]
    assert facts["sources"][0]["rows"] == 64
    here = {path.name for path in tmp_path.rglob("*")}
    assert "config.json" in here
    assert not any(name.endswith(".safetensors") for name in here)
    assert not (tmp_path / "run").exists()


def test_a_revision_is_of_the_model_wherever_it_is_named(server, made, tmp_path):
    old = server.add("models/org/base", made[0])
    server.repos["models/org/base"].revisions["v1"] = old
    server.add("models/org/base", {**made[0], "README.md": b"newer"})
    fields = {"model__revision": "v1", "model__sft_model_path": "org/base", "data__train": "a.jsonl"}
    found = brought.survey(config_of(tmp_path / "run", **fields))
    assert set(found.commits.values()) == {old}
    local = found.config.model
    assert (hub.name_of(local.sft_model_path), local.revision) == (f"org/base@{old}", "")
    assert len(found.models) == 1, "fetched once"
    with pytest.raises(
        ValueError, match=r"config\.model\.model_name_or_path='org/base': org/base has no revision 'v9'"
    ):
        brought.survey(config_of(tmp_path / "run", model__revision="v9"))


@pytest.mark.parametrize("name", ["", "here/model"])
def test_a_revision_of_no_repository_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("here/model").mkdir(parents=True)
    fields = {"model__revision": "v1", "model__model_name_or_path": name, "data__train": "a.jsonl"}
    with pytest.raises(ValueError, match="of a repository of the hub only"):
        brought.survey(config_of(tmp_path / "run", **fields))


def test_weights_and_specs_keep_their_form(server, made, tmp_path):
    rows = server.add("datasets/org/rows", made[1])
    spec = "hub:org/rows:train=0.5,mine.jsonl=2"
    found = brought.survey(config_of(tmp_path / "run", data__train=spec, model__model_name_or_path=""))
    assert found.config.data.train == f"hub:org/rows:default:train@{rows}=0.5,mine.jsonl=2.0"
    with pytest.raises(ValueError, match=r"config\.data\.train: org/rows: no config or split 'valid'"):
        brought.survey(config_of(tmp_path / "run", data__train="hub:org/rows:valid", model__model_name_or_path=""))


def test_a_config_without_names_is_left_alone_and_asks_for_nothing(tmp_path):
    config = tiny_config(tmp_path / "run")
    assert brought.survey(config) == brought.Brought(config, {})
    group = ModelGroup(model_name_or_path="models/mine")
    assert brought.named(group) == {k: v for k, v in dataclasses.asdict(group).items() if k != "revision"} | {
        "attn_implementation": "xla"  # as phases knew it before there were others
    }


def test_a_policy_is_opened_by_its_name(server, made):
    commit = server.add("models/org/base", made[0])
    found = find_policy("org/base")
    assert hub.name_of(str(found.folder)) == f"org/base@{commit}"
    assert found.cfg.hidden_size == CFG.hidden_size


def test_a_work_directory_that_is_older_than_the_field_is_gone_on_with(tmp_path):
    config = plain(to_dict(tiny_config(tmp_path / "run")))
    before = {**config, "model": {k: v for k, v in config["model"].items() if k != "revision"}}
    write_json(tmp_path / "config.json", before)
    check_config(tmp_path, config)
    with pytest.raises(StaleWorkdir, match=r"model\.revision: None there, 'v1' now"):
        check_config(tmp_path, {**config, "model": {**config["model"], "revision": "v1"}})
