"""config.json <-> ModelConfig: what is read, what is passed over, what is refused by name."""

import jax
import pytest

from sera_jax.mesh import path_name
from sera_jax.models.config import RopeScaling
from sera_jax.models.decoder import abstract_params
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


def small(name, **fields):
    """A small config.json of a family."""
    of_keys = {"rotary_pct": 0.5} if name == "gpt_neox" else {"num_key_value_heads": 2}
    return (
        {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
        | of_keys
        | fields
        | {"model_type": name}
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
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}),
        ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
        ("attention_bias", 1),
        ("hidden_act", "relu"),
        ("rope_scaling", {"rope_type": "default", "mscale": 1.2}),
        ("rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}),
        ("partial_rotary_factor", 0.25),
        ("rope_interleaved", True),
        ("sliding_window", 128),
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
    with pytest.raises(ValueError, match=r"model_type='mamba'.*llama.*gpt_neox"):
        config_from_hf(SMALL | {"model_type": "mamba"})
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
def test_a_family_says_of_every_parameter_which_tensor_it_lies_in(name):
    family = family_of(name)
    assert len(family.paths) == len(family.tensors)  # no parameter twice
    assert set(family.tied) <= {tensor.name for tensor in family.tensors}
    for tied in (True, False):
        cfg = config_from_hf(small(name, tie_word_embeddings=tied))
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params(cfg))
        assert {path_name(path) for path, _ in leaves} <= set(family.paths)
        assert config_from_hf(config_to_hf(cfg)) == cfg


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_of_a_tensor_are_all_of_it_once(name):
    cfg = config_from_hf(small(name))
    shapes = jax.tree_util.tree_leaves_with_path(abstract_params(cfg))
    sizes = {path_name(path): leaf.shape[-1] for path, leaf in shapes}
    parts: dict[str, list[int]] = {}
    for tensor in family_of(name).tensors:
        if tensor.rows is not None and tensor.path in sizes:
            rows = tensor.rows(cfg)
            assert len(rows) == sizes[tensor.path]
            parts.setdefault(tensor.name, []).extend(rows.tolist())
    assert all(sorted(rows) == list(range(len(rows))) for rows in parts.values())


WINDOWED = {
    "mistral": ({"sliding_window": 8}, 8, ()),
    "mistral without": ({"sliding_window": None}, None, ()),
    "mistral left out": ({}, 4096, ()),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 8, "fs"),
    "qwen2 switched off": ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}, None, ()),
    "qwen3": ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, 8, ()),
    "gemma2": ({"sliding_window": 8}, 8, "sf"),
    "gemma3_text": ({"sliding_window": 8}, 8, ()),
    "gemma3_text pattern": ({"sliding_window": 8, "sliding_window_pattern": 2}, 8, "sf"),
    "gemma3_text full": ({"sliding_window": 8, "layer_types": ["full_attention"] * 2}, None, ()),
    "smollm3": ({"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0]}, 8, "fs"),
    "phi3": ({"sliding_window": 8}, 8, ()),
}


@pytest.mark.parametrize("case", WINDOWED)
def test_windows_are_of_the_layers_that_transformers_gives_them_to(case):
    fields, window, types = WINDOWED[case]
    cfg = config_from_hf(SMALL | {"model_type": case.split()[0]} | fields)
    names = {"f": "full_attention", "s": "sliding_attention"}
    assert (cfg.sliding_window, cfg.layer_types) == (window, tuple(names[kind] for kind in types))
    assert config_from_hf(config_to_hf(cfg)) == cfg


def test_gemma3_has_a_base_of_angles_for_layers_with_a_window():
    old = SMALL | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    cfg = config_from_hf(old)
    assert (cfg.rope_theta, cfg.rope_local_base_freq, cfg.rope_scaling.factor) == (1e6, 1e4, 8.0)
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    new = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert config_from_hf(SMALL | {"model_type": "gemma3_text", "rope_parameters": new}) == cfg
    for block in ({"sliding_attention": full}, {"rope_theta": 1e6, "full_attention": full}):
        with pytest.raises(ValueError, match="rope_parameters"):
            config_from_hf(SMALL | {"model_type": "gemma3_text", "rope_parameters": block})


def test_softcaps_that_are_null_are_none_and_left_out_are_the_families():
    gemma2 = SMALL | {"model_type": "gemma2"}
    assert config_from_hf(gemma2).attn_logit_softcapping == 50.0
    assert config_from_hf(gemma2 | {"attn_logit_softcapping": None}).attn_logit_softcapping is None


@pytest.mark.parametrize(
    "name, words", [("mistral", "mlp_bias"), ("phi3", "attention_bias"), ("gpt_neox", "hidden_dropout")]
)
def test_what_a_family_does_not_have_is_refused(name, words):
    value = 0.1 if words == "hidden_dropout" else True
    with pytest.raises(ValueError, match=words):
        config_from_hf(small(name) | {words: value})


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
