"""config.json <-> ModelConfig: what is read, what is passed over, what is refused by name."""

import dataclasses

import pytest

from sera_jax.models.config import RopeScaling
from sera_jax.models.families import FAMILIES, config_from_hf, config_to_hf, family_of

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED = {
    "Llama-2-7b": LLAMA
    | dict(
        _name_or_path="meta-llama/Llama-2-7b-hf",
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=4096,
        initializer_range=0.02,
        intermediate_size=11008,
        max_position_embeddings=4096,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        tie_word_embeddings=False,
        torch_dtype="float16",
        transformers_version="4.31.0.dev0",
        vocab_size=32000,
    ),
    "Llama-3.1-8B": LLAMA
    | dict(
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        hidden_size=4096,
        initializer_range=0.02,
        intermediate_size=14336,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=LLAMA3_SCALING,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        transformers_version="4.43.0.dev0",
        vocab_size=128256,
    ),
    "Llama-3.2-1B": LLAMA
    | dict(
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=128001,
        head_dim=64,
        hidden_size=2048,
        initializer_range=0.02,
        intermediate_size=8192,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=32,
        num_hidden_layers=16,
        num_key_value_heads=8,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=LLAMA3_SCALING | {"factor": 32.0},
        rope_theta=500000.0,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        transformers_version="4.45.0.dev0",
        vocab_size=128256,
    ),
    "TinyLlama-1.1B": LLAMA
    | dict(
        attention_bias=False,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=2048,
        initializer_range=0.02,
        intermediate_size=5632,
        max_position_embeddings=2048,
        num_attention_heads=32,
        num_hidden_layers=22,
        num_key_value_heads=4,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
        transformers_version="4.35.0",
        vocab_size=32000,
    ),
    "SmolLM2-135M": {
        **LLAMA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "transformers_version": "4.42.3",
        "vocab_size": 49152,
    },
}
SMALL = dict(
    model_type="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_llama_configs_are_accepted_and_survive_the_way_back(name):
    cfg = config_from_hf(PUBLISHED[name])
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps"):
        assert getattr(cfg, field) == PUBLISHED[name][field]
    assert cfg.export_dtype == PUBLISHED[name]["torch_dtype"]
    assert config_from_hf(config_to_hf(cfg)) == cfg


def test_head_dim_and_key_value_heads_left_out_are_derived_as_transformers_does():
    cfg = config_from_hf(PUBLISHED["SmolLM2-135M"])
    assert (cfg.head_dim, cfg.num_key_value_heads, cfg.rope_theta) == (64, 3, 100000.0)
    config = dict(SMALL)
    del config["num_key_value_heads"]
    cfg = config_from_hf(config)
    assert (cfg.num_key_value_heads, cfg.rope_theta, cfg.rms_norm_eps, cfg.tie_word_embeddings) == (4, 1e4, 1e-6, False)


def test_both_ways_of_writing_the_rotary_scaling_mean_the_same():
    old = SMALL | {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING}
    older = SMALL | {"rope_theta": 5e5, "rope_scaling": {k.replace("rope_", ""): v for k, v in LLAMA3_SCALING.items()}}
    new = SMALL | {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}}
    assert config_from_hf(old) == config_from_hf(new) == config_from_hf(older)
    assert config_from_hf(new).rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert config_from_hf(SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}).rope_scaling is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"rope_type": "default", "mscale": 1.2}),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}),
        ("partial_rotary_factor", 0.25),
        ("rope_interleaved", True),
        ("sliding_window", 128),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("quantization_config", {"quant_method": "gptq"}),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 8.0),
        ("attention_multiplier", 0.015625),
        ("num_local_experts", 8),
        ("no_rope_layers", [1, 1, 0]),
        ("use_qk_norm", True),
        ("auto_map", {"AutoModelForCausalLM": "modeling_other.Other"}),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("vocab_size", "32"),
        ("hidden_size", True),
        ("tie_word_embeddings", 1),
        ("num_attention_heads", 3),
    ],
)
def test_a_field_that_would_change_the_mathematics_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        config_from_hf(SMALL | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sliding_window", None),
        ("sliding_window", 2048),
        ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
        ("attn_logit_softcapping", None),
        ("use_qk_norm", False),
        ("pretraining_tp", 2),
        ("attention_dropout", 0),
        ("temperature", 0.6),
        ("_attn_implementation_autoset", True),
        ("hidden_act", "swish"),
        ("some_future_option", None),
    ],
)
def test_a_field_that_leaves_the_logits_alone_is_passed_over(field, value):
    assert config_from_hf(SMALL | {field: value}) == config_from_hf(SMALL)


def test_an_unknown_family_is_refused_with_the_list_of_families():
    with pytest.raises(ValueError, match=r"model_type='gpt_neox'.*llama"):
        config_from_hf(SMALL | {"model_type": "gpt_neox"})
    with pytest.raises(ValueError, match="model_type=None"):
        config_from_hf({})


def test_a_missing_size_is_named():
    with pytest.raises(ValueError, match="no intermediate_size"):
        config_from_hf({k: v for k, v in SMALL.items() if k != "intermediate_size"})


def test_contradicting_rotary_fields_are_refused():
    with pytest.raises(ValueError, match=r"rope_theta=10000.0 contradicts"):
        config_from_hf(SMALL | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    with pytest.raises(ValueError, match=r"rope_scaling=.*contradicts rope_parameters"):
        config_from_hf(
            SMALL | {"rope_scaling": LLAMA3_SCALING, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
        )


def test_precision_is_the_callers_and_not_the_files():
    cfg = config_from_hf(SMALL | {"dtype": "bfloat16"}, param_dtype="bfloat16", remat="full")
    assert (cfg.dtype, cfg.param_dtype, cfg.export_dtype, cfg.remat) == ("float32", "bfloat16", "bfloat16", "full")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_a_family_has_its_own_name_and_path(name):
    family = family_of(name)
    assert len({tensor.name for tensor in family.tensors}) == len(family.tensors)
    assert len({tensor.path for tensor in family.tensors}) == len(family.tensors)
    assert set(family.tied) <= {tensor.name for tensor in family.tensors}
    cfg = config_from_hf(SMALL | {"model_type": name})
    assert {field.name for field in family.fields} <= {field.name for field in dataclasses.fields(cfg)}


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("hidden_size", "32", "hidden_size='32' should be of type int"),
        ("num_attention_heads", 0, "num_attention_heads=0 is below 1"),
        ("rope_theta", 0.0, "rope_theta=0.0"),
        ("rms_norm_eps", -1.0, "rms_norm_eps=-1.0"),
    ],
)
def test_a_field_that_no_model_can_have_is_refused_by_name(field, value, words):
    config = {**PUBLISHED["Llama-2-7b"], "head_dim": None, "num_key_value_heads": None, field: value}
    with pytest.raises(ValueError, match=words):
        config_from_hf(config)
