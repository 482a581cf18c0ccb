"""The configs of the papers' runs (docs/models.md) at their full sizes: every compiled program of each is traced and
lowered for a mesh of 8; nothing is allocated and nothing is compiled.

The hub is not asked. A model is a folder with nothing but the config.json that transformers writes for its published
sizes, which is all that a look ahead reads; that they are those of the model, its number of parameters tells.
"""

import importlib

import jax
import pytest
import transformers

from sera_jax.experiment.methods import parse
from tests.lowering import (
    assert_arguments_lie_as_asked,
    assert_state_returns_in_place,
    bytes_on_a_device,
    lowered_by_name,
    programs_for_eight,
)

DEVICES = 8
MISTRAL = transformers.MistralConfig(max_position_embeddings=32768), 7_241_732_096
# Of each config the model's sizes as they are published, and its number of parameters.
MODELS = {
    "tinyllama_sera": (
        transformers.LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_key_value_heads=4,
            max_position_embeddings=2048,
        ),
        1_100_048_384,
    ),
    "pythia_sera": (
        transformers.GPTNeoXConfig(
            vocab_size=50304, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
        ),
        2_775_208_960,
    ),
    "mistral_sera": MISTRAL,
    "mistral_srppo": MISTRAL,
    "llama_sera_lora": (transformers.LlamaConfig(max_position_embeddings=4096), 6_738_415_616),
    "qwen_sera": (
        transformers.Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
        7_615_616_512,
    ),
    "gemma_dpo": (transformers.Gemma2Config(), 2_614_341_888),
}


def config_of(name, folder):
    """The config as it stands, but with a folder in place of its model's name on the hub."""
    raw = importlib.import_module(f"configs.{name}").get_config()
    MODELS[name][0].save_pretrained(folder)
    for field in ("model_name_or_path", "sft_model_path"):
        if raw.model[field]:
            raw.model[field] = str(folder)
    return parse(raw)


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "name", [name if name == "tinyllama_sera" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_every_program_of_the_run_lowers_at_full_size(name, tmp_path):
    programs, mesh, planned = programs_for_eight(config_of(name, tmp_path))
    assert dict(mesh.shape) == {"data": 1, "fsdp": DEVICES, "tensor": 1}
    base = jax.tree.leaves(planned.models[0])
    assert sum(leaf.size for leaf in base) == MODELS[name][1], "the model that it is named after"
    lowered = lowered_by_name(programs, mesh, programs)
    updates = [update for update in lowered if update.endswith("update")]
    assert updates
    for update in updates:
        found, (state, *rest) = lowered[update]
        assert_state_returns_in_place(found, state, found.out_info[0])
        assert not rest[1:] or bytes_of(rest[1:]) == pytest.approx(bytes_of(base), rel=0.1), "the base is frozen"
        models = rest[1:] or state  # adapters, small as they are, are not split over fsdp
        held = sum(map(bytes_on_a_device, jax.tree.leaves(models)))
        assert held == pytest.approx(bytes_of(models) / DEVICES, rel=0.01), "split over all devices"
    scored = next(name for name in ("score pairs", "srppo: score") if name in lowered)
    found, arguments = lowered[scored]
    assert_arguments_lie_as_asked(found, *arguments)
