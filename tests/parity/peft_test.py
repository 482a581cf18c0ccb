"""Adapters against PEFT's: it loads ours, we load its, and logits agree."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with PEFT needs torch: requirements-parity.txt")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="parity with PEFT needs peft: requirements-parity.txt")

import jax  # noqa: E402

from sera_jax.data.batches import score_batches  # noqa: E402
from sera_jax.data.items import Item  # noqa: E402
from sera_jax.data.packing import Layout  # noqa: E402
from sera_jax.models.decoder import hidden_states, unembedding  # noqa: E402
from sera_jax.models.huggingface import load_pretrained  # noqa: E402
from sera_jax.models.lora import Lora, init_adapters, merged  # noqa: E402
from sera_jax.models.parts import merge  # noqa: E402
from sera_jax.models.peft import kernels_of, load_adapter, save_adapter  # noqa: E402
from tests.tolerances import TOLERANCES  # noqa: E402

pytestmark = pytest.mark.parity

SHAPE = dict(
    vocab_size=89,
    hidden_size=48,
    intermediate_size=104,
    num_hidden_layers=3,
    num_attention_heads=4,
    initializer_range=0.15,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
GROUPED = dict(num_key_value_heads=2)
FAMILIES = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "gemma2": GROUPED | dict(head_dim=16),
    "olmo2": GROUPED,
    "phi3": GROUPED,
    "gpt_neox": dict(num_attention_heads=3),
}
TARGETS = {
    "all": ("all-linear",),
    "attention": (r".*\.(q_proj|v_proj|qkv_proj|query_key_value)",),
    "mlp": (r".*\.mlp\..*",),
}


@pytest.fixture(params=FAMILIES, scope="module")
def base(request, tmp_path_factory):
    """Folder of a random model, as transformers writes it."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[request.param](**SHAPE | FAMILIES[request.param])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def torch_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TOKENS = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (1, 60)).astype(np.int32)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()


def our_logits(cfg, params):
    (packed,) = score_batches([Item("0", TOKENS[0, :1], (TOKENS[0, 1:],))], Layout(TOKENS.shape[1]), 1)
    return jax.jit(lambda p: unembedding(cfg, p)(hidden_states(cfg, p, packed.rows)))(params)


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCES["huggingface_logits"]["atol"])


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_ours(base, targets, use_rslora, tmp_path):
    cfg, params = load_pretrained(base)
    lora = Lora(4, 10.0, kernels_of(cfg, TARGETS[targets]), use_rslora)
    cfg = dataclasses.replace(cfg, lora_scale=lora.scale)
    fresh = init_adapters(lora, params, jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)
    save_adapter(tmp_path / "adapter", cfg, lora, adapters, base=str(base))
    again, same = load_adapter(tmp_path / "adapter", cfg)
    assert again == lora
    jax.tree.map(np.testing.assert_array_equal, same, adapters)
    theirs = torch_logits(peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "adapter").eval())
    assert np.abs(theirs - torch_logits(torch_model(base))).max() > 0.1  # the adapter does something
    applied = merge(params, adapters)
    assert_same(our_logits(cfg, applied), theirs)
    assert_same(our_logits(cfg, merged(cfg, applied)), theirs)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_load_pefts(base, use_rslora, tmp_path):
    settings = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules="all-linear", use_rslora=use_rslora, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(torch_model(base), settings)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    model.eval().save_pretrained(tmp_path)
    cfg, params = load_pretrained(base)
    lora, adapters = load_adapter(tmp_path, cfg)
    assert (lora.rank, lora.alpha, lora.use_rslora) == (4, 10.0, use_rslora)
    assert_same(
        our_logits(dataclasses.replace(cfg, lora_scale=lora.scale), merge(params, adapters)), torch_logits(model)
    )
