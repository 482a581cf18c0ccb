"""Hugging Face folders in and out. What transformers itself makes of them: tests/parity/transformers_test.py."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sera_jax.models import huggingface
from sera_jax.models.config import ModelConfig, RopeScaling
from sera_jax.models.decoder import init_params
from sera_jax.models.families import config_to_hf
from sera_jax.models.huggingface import load_pretrained, read_source, save_pretrained

CFG = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    tie_word_embeddings=False,
)


def hf_tensors(cfg, dtype="float32", seed=0):
    """Random tensors under Hugging Face's names and in its layout, written out by hand."""
    rng = np.random.default_rng(seed)
    d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    q, kv = cfg.num_attention_heads * h, cfg.num_key_value_heads * h
    shapes = {"model.embed_tokens.weight": (cfg.vocab_size, d), "model.norm.weight": (d,)}
    for layer in range(cfg.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (d,),
            prefix + "post_attention_layernorm.weight": (d,),
            prefix + "self_attn.q_proj.weight": (q, d),
            prefix + "self_attn.k_proj.weight": (kv, d),
            prefix + "self_attn.v_proj.weight": (kv, d),
            prefix + "self_attn.o_proj.weight": (d, q),
            prefix + "mlp.gate_proj.weight": (f, d),
            prefix + "mlp.up_proj.weight": (f, d),
            prefix + "mlp.down_proj.weight": (d, f),
        }
    if not cfg.tie_word_embeddings:
        shapes["lm_head.weight"] = (cfg.vocab_size, d)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(path, cfg=CFG, tensors=None, shards=1, **config):
    path.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(cfg) if tensors is None else tensors
    (path / "config.json").write_text(json.dumps(config_to_hf(cfg) | config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_as_source(path, cfg, params, source):
    described = read_source(source)
    return save_pretrained(path, cfg, params, source_config=described.config, source_dtypes=described.dtypes)


def read_tensors(path):
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


def assert_same_bytes(left, right):
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].shape == right[name].shape, name
        assert left[name].tobytes() == right[name].tobytes(), name


def test_weights_land_transposed_and_stacked(tmp_path):
    tensors = hf_tensors(CFG)
    cfg, params = load_pretrained(write_folder(tmp_path / "in", tensors=tensors))
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].T)
    block = params["layers"]["block"]
    assert block["q"]["kernel"].shape == (3, 16, 24)
    np.testing.assert_array_equal(block["k"]["kernel"][1], tensors["model.layers.1.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(
        block["mlp_norm"]["scale"][2], tensors["model.layers.2.post_attention_layernorm.weight"]
    )
    assert jax.tree.structure(params) == jax.tree.structure(init_params(cfg, jax.random.key(0)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_loading_and_exporting_gives_the_same_names_and_bytes(tmp_path, dtype, shards):
    source = write_folder(tmp_path / "in", tensors=hf_tensors(CFG, dtype), shards=shards)
    cfg, params = load_pretrained(source)
    assert cfg.export_dtype == dtype
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    out = save_pretrained(tmp_path / "out", cfg, params, max_shard_bytes=10**9 if shards == 1 else 2000)
    assert_same_bytes(read_tensors(source), read_tensors(out))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
    assert (shards > 1) == (out / "model.safetensors.index.json").exists()
    assert_same_trees(load_pretrained(out)[1], params)


def assert_same_trees(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_a_mixture_of_dtypes_is_written_back_tensor_by_tensor_when_the_source_is_at_hand(tmp_path):
    tensors = hf_tensors(CFG, "bfloat16")
    tensors = {name: value.astype("float32") if "norm" in name else value for name, value in tensors.items()}
    source = write_folder(tmp_path / "in", tensors=tensors, torch_dtype="bfloat16", eos_token_id=7)
    cfg, params = load_pretrained(source)
    out = write_as_source(tmp_path / "out", cfg, params, source)
    assert_same_bytes(tensors, read_tensors(out))
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("with_head", [False, True])
def test_a_tied_model_is_read_and_written_with_or_without_its_copy_of_the_embedding(tmp_path, with_head):
    cfg = ModelConfig(**{**CFG.__dict__, "tie_word_embeddings": True})
    tensors = hf_tensors(cfg)
    if with_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = write_folder(tmp_path / "in", cfg, tensors)
    loaded, params = load_pretrained(source)
    assert "head" not in params
    assert_same_bytes(tensors, read_tensors(write_as_source(tmp_path / "out", loaded, params, source)))
    assert "lm_head.weight" not in read_tensors(save_pretrained(tmp_path / "plain", loaded, params))


def test_a_tied_output_projection_that_differs_from_the_embedding_is_refused(tmp_path):
    cfg = ModelConfig(**{**CFG.__dict__, "tie_word_embeddings": True})
    tensors = hf_tensors(cfg)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_pretrained(write_folder(tmp_path, cfg, tensors))


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(tmp_path):
    tensors = hf_tensors(CFG)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)
    tensors["model.norm.weight"] = np.zeros(17, np.float32)
    with pytest.raises(ValueError) as error:
        load_pretrained(write_folder(tmp_path, tensors=tensors))
    message = str(error.value)
    assert "missing tensors: model.layers.1.mlp.up_proj.weight" in message
    assert "unexpected tensors: model.layers.0.self_attn.q_proj.bias" in message
    assert "model.norm.weight is [17], config.json says [16]" in message


def test_a_long_list_of_missing_tensors_is_cut_and_counted(tmp_path):
    with pytest.raises(ValueError, match="and 21 more"):
        load_pretrained(write_folder(tmp_path, tensors={"model.norm.weight": np.ones(16, np.float32)}))


def test_rotary_buffers_of_old_files_are_passed_over(tmp_path):
    tensors = hf_tensors(CFG) | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    cfg, params = load_pretrained(write_folder(tmp_path / "in", tensors=tensors))
    out = write_as_source(tmp_path / "out", cfg, params, tmp_path / "in")
    assert sorted(read_tensors(out)) == sorted(hf_tensors(CFG))


def test_only_safetensors_are_read(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, which is not read.*only safetensors"):
        load_pretrained(folder)


def test_a_lfs_pointer_and_a_truncated_file_are_told_from_weights(tmp_path):
    folder = write_folder(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_pretrained(folder)


def test_a_missing_shard_and_an_index_that_leaves_the_folder_are_refused(tmp_path):
    folder = write_folder(tmp_path, shards=2)
    index = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        load_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="not a file of its own folder"):
        load_pretrained(folder)


def test_integer_weights_are_refused_by_name(tmp_path):
    tensors = hf_tensors(CFG) | {"model.norm.weight": np.ones(16, np.int8)}
    with pytest.raises(ValueError, match=r"model.norm.weight has dtype I8"):
        load_pretrained(write_folder(tmp_path, tensors=tensors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, dtype):
    bad = np.ones(16, np.float32)
    bad[3] = np.nan
    tensors = hf_tensors(CFG) | {"model.norm.weight": bad.astype(dtype)}
    folder = write_folder(tmp_path, tensors=tensors)
    with pytest.raises(ValueError, match=rf"{folder}: tensor model.norm.weight holds nan or infinity"):
        load_pretrained(folder)


def test_parameters_that_do_not_fit_their_config_are_not_written(tmp_path):
    params = init_params(CFG, jax.random.key(0))
    broken = {**params, "value": np.zeros(3), "embed": np.zeros((23, 16))}
    del broken["head"]
    with pytest.raises(ValueError, match=r"missing: head; unexpected: value; wrong shapes: embed is \(23, 16\)"):
        save_pretrained(tmp_path / "out", CFG, broken)
    assert not (tmp_path / "out").exists()


def test_a_source_that_describes_another_model_is_refused(tmp_path):
    params = init_params(CFG, jax.random.key(0))
    with pytest.raises(ValueError, match=r"rope_theta=20000.0 \(ours 10000.0\)"):
        save_pretrained(tmp_path / "out", CFG, params, source_config=config_to_hf(CFG) | {"rope_theta": 2e4})


def test_a_value_beyond_float16_is_refused_instead_of_becoming_infinite(tmp_path):
    params = jax.device_get(init_params(CFG, jax.random.key(0)))
    params["embed"] = np.full_like(params["embed"], 1e5)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has values beyond float16"):
        save_pretrained(tmp_path / "out", CFG, params, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="dtype='int8'"):
        save_pretrained(tmp_path / "out", CFG, params, dtype="int8")


def test_an_export_that_fails_leaves_the_old_folder_whole_and_no_other(tmp_path, monkeypatch):
    params = init_params(CFG, jax.random.key(0))
    out = save_pretrained(tmp_path / "out", CFG, params)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        save_pretrained(out, CFG, params)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "write_json", fail)
        with pytest.raises(OSError, match="disk full"):
            save_pretrained(out, CFG, params, dtype="bfloat16", overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    (tmp_path / ".out.partial").mkdir()  # what a killed process leaves behind
    save_pretrained(out, CFG, params, dtype="bfloat16", overwrite=True)
    assert read_source(out).dtypes["model.norm.weight"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tokenizer_files_come_along_and_name_the_special_tokens(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 5, "content": "<end>"}], "model": {"vocab": {"<s>": 3, "a": 4}}})
    )
    settings = {"bos_token": "<s>", "eos_token": {"content": "<end>"}, "pad_token": None}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": 5}')
    (tokenizer / "notes.txt").write_text("stays")
    out = save_pretrained(tmp_path / "out", CFG, init_params(CFG, jax.random.key(0)), tokenizer_dir=tokenizer)
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (3, 5, None)
    assert {file.name for file in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    }


def test_parameters_may_be_bfloat16_and_the_rotary_scaling_survives(tmp_path):
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    cfg = ModelConfig(
        **{**CFG.__dict__, "param_dtype": "bfloat16", "export_dtype": "bfloat16", "rope_scaling": scaling}
    )
    params = jax.jit(lambda: init_params(cfg, jax.random.key(1)))()
    out = save_pretrained(tmp_path / "out", cfg, params)
    again, loaded = load_pretrained(out, param_dtype="bfloat16")
    assert again == cfg
    assert all(leaf.dtype == ml_dtypes.bfloat16 for leaf in jax.tree.leaves(loaded))
    assert_same_trees(loaded, jax.device_get(params))
