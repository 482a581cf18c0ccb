"""Which repositories of the hub are models, and what is fetched of them."""

import json

import pytest

from sera_jax import hub
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.hub import Repository
from sera_jax.models import repository
from sera_jax.models.folder import INDEX

INDEXED = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
OTHERS = {"pytorch_model.bin": b"0", "consolidated.safetensors": b"1", "tokenizer.json": b"{}", ".gitattributes": b"\n"}


@pytest.mark.parametrize(
    "weights",
    [{"model.safetensors": b"2"}, {INDEX: INDEXED, "model-1.safetensors": b"3", "model-2.safetensors": b"4"}],
)
def test_the_weights_that_the_loader_reads_are_fetched_and_no_others(server, weights):
    server.add("models/org/name", {"config.json": b'{"model_type": "llama"}', **OTHERS, **weights})
    found = repository.look(Repository("org/name"))
    assert not {name for name in server.files_sent() if name.endswith((".safetensors", ".bin"))}, "not before they must"
    hub.fetch(found, repository.weights(found))
    sent = {name for name in server.files_sent() if name.endswith((".safetensors", ".bin"))}
    assert sent == {name for name in weights if name != INDEX}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"0"}, ["only pytorch_model.bin", "save_pretrained"]),
        (
            {"config.json": b'{"auto_map": {"AutoModel": "a.B"}}', "model.safetensors": b"0"},
            ["code of its own", "auto_map"],
        ),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"0"}, ["adapter: name its base"]),
        ({"README.md": b"0"}, ["no config.json"]),
    ],
)
def test_what_is_no_model_is_refused_with_the_way_out(server, files, words):
    server.add("models/org/name", {**files, ".gitattributes": b"\n"})
    with pytest.raises(ValueError) as caught:
        repository.look(Repository("org/name"))
    assert all(word in str(caught.value) for word in ["org/name", *words]), str(caught.value)


def test_an_index_that_names_what_is_not_there_is_refused(server):
    server.add("models/org/name", {"config.json": b"{}", INDEX: INDEXED, "model-1.safetensors": b"3"})
    with pytest.raises(ValueError, match=r"the repository has not: model-2\.safetensors"):
        repository.weights(repository.look(Repository("org/name")))


def test_a_tokenizer_is_loaded_by_name_from_its_files_alone(server, tmp_path):
    from sera_jax import world

    folder = world.write_tokenizer(tmp_path / "tokenizer")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    server.add("models/org/name", {**files, "model.safetensors": b"0", "config.json": b'{"model_type": "llama"}'})
    assert Tokenizer.load("org/name").vocabulary() == Tokenizer.load(folder).vocabulary()
    assert "model.safetensors" not in server.files_sent()
