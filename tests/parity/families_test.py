"""Every family against transformers' own model of random weights: logits, log-probs of packed rows, decoding,
gradients, and the file on the way back."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: requirements-parity.txt")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402

from sera_jax.data.batches import score_batches  # noqa: E402
from sera_jax.data.items import Item  # noqa: E402
from sera_jax.data.packing import Layout, gather_scores  # noqa: E402
from sera_jax.export import export  # noqa: E402
from sera_jax.models.decoder import hidden_states, unembedding  # noqa: E402
from sera_jax.models.families import FAMILIES, family_of  # noqa: E402
from sera_jax.models.huggingface import file_tensors, load_pretrained, save_pretrained  # noqa: E402
from sera_jax.ops.logprob import sum_by_slot, token_logps  # noqa: E402
from sera_jax.sampling import Draws, SamplingParams, generate  # noqa: E402
from tests.tolerances import TOLERANCES  # noqa: E402

pytestmark = pytest.mark.parity

NEW_TOKENS = 32
STOP = 3
ROW = 160
SHAPE = dict(
    vocab_size=89,
    hidden_size=48,
    intermediate_size=104,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
    initializer_range=0.15,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
GROUPED = dict(num_key_value_heads=2)
LINEAR = dict(rope_type="linear", factor=4.0, rope_theta=1e4)
YARN = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, original_max_position_embeddings=32)
CASES = {
    "llama": GROUPED,
    "llama biases": GROUPED | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama linear": GROUPED | dict(rope_parameters=LINEAR),
    "llama dynamic": GROUPED | dict(rope_parameters=dict(rope_type="dynamic", factor=4.0, rope_theta=1e4)),
    "llama yarn": GROUPED | dict(rope_parameters=YARN),
    "llama yarn mscale": GROUPED
    | dict(rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5, beta_fast=8.0, beta_slow=2.0, truncate=False)),
    "mistral": GROUPED | dict(sliding_window=16),
    "mistral without a window": GROUPED | dict(sliding_window=None, head_dim=20),
    "qwen2": GROUPED,
    "qwen2 tied": GROUPED | dict(tie_word_embeddings=True, num_attention_heads=6, num_key_value_heads=3),
    "qwen2 windows": GROUPED | dict(use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "qwen2 yarn": GROUPED | dict(rope_parameters=YARN),
    "qwen3": GROUPED | dict(head_dim=16),
    "qwen3 biases": GROUPED | dict(head_dim=20, attention_bias=True, tie_word_embeddings=True),
    "smollm3": GROUPED,
    "smollm3 windows": GROUPED | dict(use_sliding_window=True, sliding_window=16, no_rope_layers=[1, 0, 1, 0]),
    "gemma": GROUPED | dict(head_dim=16),
    "gemma one key/value head": dict(num_key_value_heads=1, head_dim=32, tie_word_embeddings=False),
    "gemma2": GROUPED | dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=20),
    "gemma2 tight caps": GROUPED
    | dict(head_dim=16, sliding_window=24, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": GROUPED | dict(head_dim=16, sliding_window=16, num_hidden_layers=7),
    "gemma3_text scaled": GROUPED
    | dict(
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e5),
            "sliding_attention": dict(rope_type="default", rope_theta=1e3),
        },
    ),
    "phi3": GROUPED,
    "phi3 partly rotated": GROUPED | dict(partial_rotary_factor=0.5, sliding_window=16, hidden_size=64),
    "olmo2": GROUPED,
    "gpt_neox": dict(rotary_pct=0.5),
    "gpt_neox in series": dict(rotary_pct=1.0, use_parallel_residual=False, tie_word_embeddings=True),
    "gpt_neox without biases": dict(rotary_pct=0.25, hidden_size=64, attention_bias=False),
}
FIRST = {case.split()[0]: case for case in reversed(CASES)}  # one case of each family


def config_of(case):
    given = SHAPE | CASES[case]
    kind = transformers.CONFIG_MAPPING[case.split()[0]]
    return kind(**given, attn_implementation="eager")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """case -> (folder written by transformers, the model read back), each made once."""
    found = {}

    def make(case):
        if case not in found:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config_of(case))
            for name, value in model.named_parameters():  # none of them at its neutral value
                if "norm" in name:
                    torch.nn.init.uniform_(value, -0.3, 0.3) if "gemma" in case else torch.nn.init.uniform_(
                        value, 0.5, 1.5
                    )
                if name.endswith("bias"):
                    torch.nn.init.normal_(value, std=0.2)
            folder = tmp_path_factory.mktemp(case.replace("/", " ").replace(" ", "_"))
            model.save_pretrained(folder)
            found[case] = folder, read_back(folder)
        return found[case]

    return make


def read_back(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def items_of(vocab_size):
    """Prompts with two answers each, some longer than any window."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(4, vocab_size, n).astype(np.int32)  # noqa: E731
    sizes = [(30, 20, 41), (5, 33, 7), (61, 40, 25), (12, 2, 90)]
    return [Item(str(i), draw(p), (draw(a), draw(b))) for i, (p, a, b) in enumerate(sizes)]


def torch_logps(model, items):
    """Summed log-prob of each response, one sequence at a time, without padding."""
    out = []
    for item in items:
        for response in item.responses:
            tokens = torch.tensor(np.concatenate([item.prompt, response])[None].astype(np.int64))
            logps = torch.log_softmax(model(tokens).logits[0, :-1].float(), dim=-1)
            out.append(logps.gather(-1, tokens[0, 1:, None])[len(item.prompt) - 1 :, 0].sum())
    return torch.stack(out).reshape(-1, 2)


def our_logps(cfg, packed):
    def logps(params):
        hidden = hidden_states(cfg, params, packed.rows)
        return sum_by_slot(token_logps(hidden, unembedding(cfg, params), packed.rows, chunk=64), packed.rows)

    return logps


@pytest.mark.parametrize("case", CASES)
def test_packed_and_shared_rows_score_and_decode_as_transformers_does(made, case):
    folder, model = made(case)
    cfg, params = load_pretrained(folder)
    items = items_of(cfg.vocab_size)
    with torch.no_grad():
        theirs = torch_logps(model, items).numpy()
    bound = TOLERANCES["huggingface_logits"]
    for share in (True, False):
        batches = score_batches(items, Layout(320 if share else 400, share), 4)
        (packed,) = batches
        ours = gather_scores([jax.jit(our_logps(cfg, packed))(params)], batches, items)
        length = np.array([[len(r) for r in item.responses] for item in items])
        np.testing.assert_allclose(np.stack(ours) / length, theirs / length, rtol=0, atol=bound["atol"])

    prompts = [item.prompt for item in items]
    sampling = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, stop_ids=(STOP,))
    samples = generate(cfg, params, Draws(prompts, range(len(prompts))), sampling, slots=3)
    for prompt, sample in zip(prompts, samples, strict=True):
        np.testing.assert_array_equal(sample.tokens, torch_greedy(model, prompt))


def torch_greedy(model, prompt):
    """transformers' own cached decoding, to the stop token or NEW_TOKENS."""
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=STOP, bos_token_id=None
    )
    model.generation_config = settings
    tokens = torch.tensor(prompt[None].astype(np.int64))
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return out[0, len(prompt) :].numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(made, case):
    folder, model = made(case)
    cfg, params = load_pretrained(folder)
    (packed,) = score_batches([Item("0", np.zeros(1, np.int32), (np.zeros(299, np.int32),))], Layout(300), 1)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 300)).astype(np.int32)
    rows = packed.rows.replace(tokens=tokens)
    ours = jax.jit(lambda params: unembedding(cfg, params)(hidden_states(cfg, params, rows)))(params)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCES["huggingface_logits"]["atol"])


@pytest.mark.parametrize("family", FIRST)
def test_the_gradient_of_a_dpo_step_is_torchs(made, family):
    folder, model = made(FIRST[family])
    cfg, params = load_pretrained(folder)
    items = items_of(cfg.vocab_size)
    logps = torch_logps(model, items)
    reference = logps.detach() + torch.tensor([[0.3, -0.2]])
    margin = 0.1 * ((logps - reference)[:, 0] - (logps - reference)[:, 1])
    model.zero_grad()
    (-torch.nn.functional.logsigmoid(margin).mean()).backward()
    head = family_of(family).tied[0]  # GPT-NeoX's has another name in the file than in memory
    theirs = {name.replace("lm_head.weight", head): value.grad.numpy() for name, value in model.named_parameters()}

    (packed,) = score_batches(items, Layout(320), 4)
    of_margin = (-0.1 * torch.sigmoid(-margin) / len(items)).detach().numpy()
    by_response = np.stack([of_margin, -of_margin], axis=1)
    weight = np.where(packed.item >= 0, by_response[packed.item, packed.response], 0.0)
    grads = jax.jit(jax.grad(lambda params: (our_logps(cfg, packed)(params) * weight).sum()))(params)
    ours = dict(file_tensors(cfg, grads))
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        norm = np.linalg.norm(grad)
        assert np.linalg.norm(ours[name] - grad) <= 1e-3 * norm + 1e-7, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_same_file_and_the_same_model(made, tmp_path, family, dtype):
    model = made(FIRST[family])[1]
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "in", max_shard_size="60KB")
    model.to(torch.float32)
    cfg, params = load_pretrained(tmp_path / "in")
    assert cfg.export_dtype == dtype
    export(params, cfg, tmp_path / "out", source=tmp_path / "in")
    save_pretrained(tmp_path / "own", cfg, params)
    tokens = torch.tensor(np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 120)))
    before = read_back(tmp_path / "in")
    for name in ("out", "own"):  # with the source's config.json, and with one of ours
        after = read_back(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(after(tokens).logits, before(tokens).logits, rtol=0, atol=0)
        again, same = load_pretrained(tmp_path / name)
        assert again == cfg
        jax.tree.map(np.testing.assert_array_equal, same, params)
    wanted = json.loads((tmp_path / "in/config.json").read_text())
    assert json.loads((tmp_path / "out/config.json").read_text()) == wanted
