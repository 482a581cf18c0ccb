"""The decoder and the Hugging Face folders against transformers itself."""

import gzip
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: requirements-parity.txt")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402

from sera_jax.core import Rows  # noqa: E402
from sera_jax.export import export  # noqa: E402
from sera_jax.models.config import ModelConfig, RopeScaling  # noqa: E402
from sera_jax.models.decoder import head_matrix, hidden_states, init_params  # noqa: E402
from sera_jax.models.huggingface import load_pretrained, read_source, save_pretrained  # noqa: E402
from tests.tolerances import TOLERANCES  # noqa: E402

pytestmark = pytest.mark.parity

NEW_TOKENS = 32
SHAPE = dict(
    vocab_size=89,
    hidden_size=48,
    intermediate_size=104,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.15,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
CASES = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "one key/value head": dict(num_key_value_heads=1),
    "as many key/value heads": dict(num_key_value_heads=4),
    "explicit head_dim": dict(head_dim=20),
    "llama3 rotary scaling": dict(rope_parameters=LLAMA3),
    "large theta and epsilon": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6), rms_norm_eps=1e-3),
}


def write_checkpoint(path, *, dtype=None, max_shard_size="1GB", **changes):
    """A random checkpoint written by transformers, norms included; returns it read back in float32."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SHAPE | changes)))
    for name, value in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    model.to(dtype or torch.float32).save_pretrained(path, max_shard_size=max_shard_size)
    return read_back(path)


def read_back(path):
    model, info = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def torch_greedy(model, prompts):
    """32 tokens of transformers' own cached decoding; no token ends it."""
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None, bos_token_id=None
    )
    model.generation_config = settings
    tokens = torch.tensor(prompts)
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings).numpy()


def our_logits_function(cfg, params):
    def forward(params, tokens):
        ones, nothing = np.ones(tokens.shape, np.int32), np.zeros((tokens.shape[0], 1), np.int32)
        steps = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        rows = Rows(tokens, steps, ones, ones * 0, nothing, nothing, nothing, num_slots=1)
        return hidden_states(cfg, params, rows) @ head_matrix(cfg, params)

    compiled = jax.jit(forward)
    return lambda tokens: np.asarray(compiled(params, np.asarray(tokens, np.int32)))


def our_greedy(logits, prompts):
    start = prompts.shape[1]
    tokens = np.pad(prompts, ((0, 0), (0, NEW_TOKENS)))
    for end in range(start, start + NEW_TOKENS):
        tokens[:, end] = logits(tokens)[:, end - 1].argmax(-1)
    return tokens


def assert_parity(path, model, *, longest=300):
    cfg, params = load_pretrained(path)
    logits = our_logits_function(cfg, params)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab_size, (2, longest))
    bound = TOLERANCES["huggingface_logits"]
    np.testing.assert_allclose(logits(tokens), torch_logits(model, tokens), rtol=0, atol=bound["atol"])
    prompts = rng.integers(0, cfg.vocab_size, (4, 9))
    np.testing.assert_array_equal(our_greedy(logits, prompts), torch_greedy(model, prompts))
    return cfg, params


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, case):
    assert_parity(tmp_path, write_checkpoint(tmp_path, **CASES[case]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_files_of_half_precision_and_in_shards_are_read_as_transformers_reads_them(tmp_path, dtype):
    model = write_checkpoint(tmp_path, dtype=getattr(torch, dtype), max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    cfg, _ = assert_parity(tmp_path, model)
    assert cfg.export_dtype == dtype


@pytest.mark.parametrize("case", ["untied", "tied", "llama3 rotary scaling", "explicit head_dim"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("keep_source", [True, False])
def test_an_export_is_the_same_file_and_the_same_model_in_transformers(tmp_path, case, dtype, keep_source):
    model = write_checkpoint(tmp_path / "in", dtype=getattr(torch, dtype), **CASES[case])
    cfg, params = load_pretrained(tmp_path / "in")
    out = export(params, cfg, tmp_path / "out", source=tmp_path / "in" if keep_source else None)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    again = read_back(out)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 120))
    np.testing.assert_array_equal(torch_logits(again, tokens), torch_logits(model, tokens))
    written = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert written.dtype == getattr(torch, dtype)
    if keep_source:
        assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "in/config.json").read_text())


def test_a_model_of_our_own_is_the_same_model_in_transformers(tmp_path):
    cfg = ModelConfig(
        vocab_size=61,
        hidden_size=40,
        intermediate_size=72,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=8,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32),
        initializer_range=0.2,
    )
    params = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    save_pretrained(tmp_path / "out", cfg, params, max_shard_bytes=20_000)
    model = read_back(tmp_path / "out")
    assert model.config.eos_token_id is None
    assert_parity(tmp_path / "out", model)


def test_verls_tiny_llama_gives_transformers_logits_and_greedy_tokens(shared_data, tmp_path):
    source = shared_data / "models" / "verl_tiny_llama"
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    with gzip.open(source / "model.safetensors.gz") as packed, (tmp_path / "model.safetensors").open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    cfg, params = assert_parity(tmp_path, read_back(tmp_path))
    assert len(read_source(tmp_path).dtypes) == 39
    out = export(params, cfg, tmp_path / "out", source=tmp_path, tokenizer_dir=tmp_path)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert (out / "config.json").read_text() and (out / "generation_config.json").exists()
    read_back(out)
