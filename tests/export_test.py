"""The export entry, run as a user runs it but in this process."""

import json

import jax
import numpy as np
import pytest

from sera_jax.export import main
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
