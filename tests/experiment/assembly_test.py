"""From a config to tokens and a base model: what is refused before any work."""

import contextlib
import dataclasses
import json

import jax
import pytest

from sera_jax import world
from sera_jax.config import Config, DataGroup, EvalGroup, ModelGroup, SamplingGroup
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.assembly import attention_in_words, base_model, check_positions, tried_attention
from sera_jax.mesh import make_mesh
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.models.huggingface import save_pretrained
from sera_jax.ops import backends

CFG = ModelConfig(max_position_embeddings=64)
FITS = Config(
    data=DataGroup(max_prompt_length=40, max_completion_length=24),
    sampling=SamplingGroup(max_new_tokens=24),
    eval=EvalGroup(max_new_tokens=24),
)


@pytest.mark.parametrize(
    "group, field", [("data", "max_completion_length"), ("sampling", "max_new_tokens"), ("eval", "max_new_tokens")]
)
def test_lengths_for_which_the_model_has_no_positions_are_refused_by_field(group, field):
    check_positions(FITS, CFG)
    long = dataclasses.replace(FITS, **{group: dataclasses.replace(getattr(FITS, group), **{field: 25})})
    with pytest.raises(ValueError, match=rf"max_prompt_length=40 and config.{group}.{field}=25 .*=64 together"):
        check_positions(long, CFG)


def test_embeddings_without_a_token_are_marked_wherever_they_lie_and_a_token_without_one_is_refused(tmp_path):
    written = world.write_tokenizer(tmp_path / "t")
    size = Tokenizer.load(written).vocab_size
    spec = json.loads((written / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": size + 3, "content": "<late>"})  # ids before it: none
    (written / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(written)
    assert tokenizer.vocab_size >= size + 1

    def model(embeddings):
        cfg = ModelConfig(vocab_size=embeddings, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        save_pretrained(tmp_path / str(embeddings), cfg, init_params(cfg, jax.random.key(0)))
        return base_model(ModelGroup(model_name_or_path=str(tmp_path / str(embeddings))), tokenizer, 0)[0]

    known = set(tokenizer.vocabulary().values())
    absent = {id for first, last in model(size + 9).absent_ids for id in range(first, last)}
    assert absent == set(range(size + 9)) - known and absent
    with pytest.raises(ValueError, match=r"config\.model\.tokenizer_name_or_path"):
        model(size - 1)


@pytest.mark.parametrize(
    ("devices", "changes", "said"),
    [
        ("cpu", {}, []),
        ("tpu", {}, ["attention: splash"]),
        ("tpu", {"attn_implementation": "xla_loop"}, ["attention: xla_loop"]),
        ("cuda", {"dtype": "bfloat16"}, ["attention: cudnn"]),
        (
            "cuda",
            {},
            ["attention: xla_loop, since cudnn computes in bfloat16, not in float32: set model.dtype=bfloat16"],
        ),
    ],
)
def test_which_attention_is_computed_is_said_where_there_is_a_kernel(monkeypatch, devices, changes, said):
    monkeypatch.setattr(backends, "devices", lambda mesh: devices)
    assert attention_in_words(FITS, dataclasses.replace(CFG, **changes), make_mesh()) == said


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (0.2, "attention: splash is 20% off what plain XLA computes here; set .*=xla_loop"),
        (float("nan"), "attention: splash is nan% off"),
        (
            RuntimeError("no such kernel"),
            r"attention: splash fails on these devices \(no such kernel\); set .*=xla_loop",
        ),
        (0.01, None),
    ],
)
def test_a_kernel_that_does_not_compute_attention_is_refused_before_any_work(monkeypatch, found, words):
    def error(name, asked):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(backends, "devices", lambda mesh: "tpu")
    monkeypatch.setattr(backends, "error_of", error)
    refused = pytest.raises(ValueError, match=words) if words else contextlib.nullcontext()
    with refused:
        assert tried_attention(FITS, CFG, make_mesh()) == ["attention: splash"]


def test_plain_xla_is_not_tried(monkeypatch):
    monkeypatch.setattr(backends, "error_of", lambda name, asked: 1.0)
    assert tried_attention(FITS, CFG, make_mesh()) == []
