"""The export entry, run as a user runs it but in this process."""

import json
import pathlib
from typing import ClassVar

import jax
import numpy as np
import pytest
import tokenizers

from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.ends import end_ids, ends_in_words
from sera_jax.experiment.saved import describe, find_policy
from sera_jax.export import export, main
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.models.huggingface import load_pretrained, read_source, save_pretrained

CFG = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    export_dtype="bfloat16",
)


@pytest.fixture
def folder(tmp_path):
    """A tied bfloat16 model whose file also holds the copy of the embedding, with a tokenizer beside it."""
    params = init_params(CFG, jax.random.key(0))
    names = {"lm_head.weight": "bfloat16"}
    out = save_pretrained(tmp_path / "in", CFG, params, source_dtypes=names)
    (out / "tokenizer.json").write_text("{}")
    return out


def write_vocabulary(folder, eos):
    """A word-level tokenizer of 24 ids: 0 and 1 are special, the others are words."""
    words = ["<eos>", "<turn>", *(f"w{i}" for i in range(2, 24))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w2"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(words[:2])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"eos_token": eos} if eos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def ends_of(folder):
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_an_exported_folder_has_the_dtype_names_and_tokenizer_of_the_one_trained_from(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([f"--checkpoint={folder}", f"--out={out}", f"--source={folder}"]) == 0
    assert "from_pretrained" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert read_source(out).dtypes["lm_head.weight"] == "bfloat16"


def test_another_dtype_is_written_on_request(folder, tmp_path):
    out = tmp_path / "out"
    assert main([f"--checkpoint={folder}", f"--out={out}", "--dtype=float32"]) == 0
    assert set(read_source(out).dtypes.values()) == {"float32"}
    assert "lm_head.weight" in read_source(out).dtypes, "the names stay those of the folder given"
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(out)[1], load_pretrained(folder)[1])


def test_a_folder_that_exists_is_kept_unless_overwriting_is_asked_for(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert main([f"--checkpoint={folder}", f"--out={out}"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["precious.txt"]
    assert main([f"--checkpoint={folder}", f"--out={out}", "--overwrite"]) == 0
    assert not (out / "precious.txt").exists()


def test_a_checkpoint_that_is_none_is_refused_without_a_traceback(tmp_path, capsys):
    assert main([f"--checkpoint={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


TURNS = "{% for m in messages %}{{ m.role }} {{ m.content }}<turn>{% endfor %}"


def test_an_export_ends_at_every_id_at_which_the_policy_was_trained_and_sampled(folder, tmp_path):
    """EOS, the end of the template's turn, and what the source names, in one list; its other fields are kept."""
    write_vocabulary(folder, "<eos>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5, 99], "top_p": 0.9}))
    (folder / "config.json").write_text(json.dumps(read_source(folder).config | {"eos_token_id": 7}))
    run = tmp_path / "run"
    tokenizer = Tokenizer.load(folder, TURNS)
    describe(run, CFG, tokenizer, str(folder))
    cfg, params = load_pretrained(folder)
    out = export(params, cfg, tmp_path / "out", source=folder, tokenizer_dir=run / "tokenizer")
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {"eos_token_id": [0, 1, 5, 7], "top_p": 0.9}, "and not 99, which the tokenizer does not have"
    assert end_ids(tokenizer, folder) == (0, 1, 5, 7)
    assert find_policy(out).ends(Tokenizer.load(out)) == (0, 1, 5, 7)


@pytest.mark.parametrize(
    ("eos", "named", "expected"), [("<eos>", None, 0), ("<eos>", 1, [0, 1]), (None, [1, 3], [1, 3])]
)
def test_a_folder_is_exported_with_its_own_ends_and_with_what_it_names(folder, tmp_path, eos, named, expected):
    write_vocabulary(folder, eos)
    (folder / "config.json").write_text(json.dumps(read_source(folder).config | {"eos_token_id": named}))
    assert main([f"--checkpoint={folder}", f"--out={tmp_path / 'out'}"]) == 0
    assert ends_of(tmp_path / "out") == expected


def test_an_end_that_is_no_id_is_refused_by_file_and_value(folder, tmp_path, capsys):
    (folder / "generation_config.json").write_text('{"eos_token_id": "<eos>"}')
    assert main([f"--checkpoint={folder}", f"--out={tmp_path / 'out'}"]) == 2
    assert "generation_config.json: eos_token_id='<eos>'" in capsys.readouterr().err


def test_the_user_is_told_where_answers_end_and_which_end_is_ordinary_text(folder):
    write_vocabulary(folder, "<eos>")
    tokenizer = Tokenizer.load(folder)
    assert ends_in_words(tokenizer, (0, 1)) == "answers end at 0 '<eos>', 1 '<turn>', in training, sampling and exports"
    assert "warning: 5 is ordinary text" in ends_in_words(tokenizer, (0, 5))


def test_an_export_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """What is written is what is held, whatever mesh it lies on; no more than a tensor of it is brought to the host."""
    from sera_jax.mesh import make_mesh
    from sera_jax.models import huggingface
    from sera_jax.training.parameters import load_params

    plain = save_pretrained(tmp_path / "plain", CFG, init_params(CFG, jax.random.key(0)))
    sizes, tensor = [], huggingface._tensor
    monkeypatch.setattr(huggingface, "_tensor", lambda *args: (out := tensor(*args), sizes.append(out.nbytes))[0])
    monkeypatch.setattr(jax, "device_get", None)
    mesh = make_mesh(2, 4, 1)
    out = save_pretrained(tmp_path / "out", CFG, load_params(CFG, mesh, plain), max_shard_bytes=1500)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert len(sizes) == len(read_source(out).dtypes)
    assert max(sizes) * 3 < sum(sizes)
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(out)[1], load_pretrained(plain)[1])


class Api:
    """huggingface_hub's own, which does not speak to a server; `pushed` holds what it would have sent."""

    pushed: ClassVar[dict] = {}

    def __init__(self, **_):
        pass

    def create_repo(self, id, *, private, exist_ok):
        self.pushed.update(id=id, private=private, exist_ok=exist_ok)
        return f"https://hub/{id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        names = {file.name for file in pathlib.Path(folder_path).iterdir()}
        self.pushed.update(repo_id=repo_id, names=names, commit_message=commit_message)


def test_an_export_is_pushed_on_request_only_and_privately(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "mine")
    out = tmp_path / "out"
    assert main([f"--checkpoint={folder}", f"--out={out}"]) == 0
    assert not Api.pushed
    assert main([f"--checkpoint={folder}", f"--out={out}", "--overwrite", "--push_to_hub=org/name"]) == 0
    assert "pushed to https://hub/org/name" in capsys.readouterr().out
    assert Api.pushed["private"] and Api.pushed["exist_ok"] and Api.pushed["repo_id"] == "org/name"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= Api.pushed["names"]


@pytest.mark.parametrize(
    ("name", "token", "words"), [("name", "mine", "write org/name"), ("org/name", None, "set HF_TOKEN to one that may")]
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_written(
    folder, tmp_path, monkeypatch, capsys, name, token, words
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    assert main([f"--checkpoint={folder}", f"--out={tmp_path / 'out'}", f"--push_to_hub={name}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_push_that_the_hub_refuses_leaves_the_folder_and_says_so(folder, tmp_path, monkeypatch, capsys, server):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "mine")
    server.down = 403
    assert main([f"--checkpoint={folder}", f"--out={tmp_path / 'out'}", "--push_to_hub=org/name"]) == 2
    said = capsys.readouterr().err
    assert "is written, but not pushed: the hub answers 403 to writing org/name; set HF_TOKEN" in said
    assert (tmp_path / "out" / "config.json").exists()
