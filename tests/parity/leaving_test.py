"""A policy that leaves the house: transformers gives it the same prompt, and it answers and stops as it did here."""

import json

import numpy as np
import pytest
import tokenizers

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: requirements-parity.txt")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402

from sera_jax.data.bpe import train_bpe  # noqa: E402
from sera_jax.data.tokenizing import Tokenizer  # noqa: E402
from sera_jax.experiment.saved import describe, export, find_policy  # noqa: E402
from sera_jax.models.config import ModelConfig  # noqa: E402
from sera_jax.models.decoder import init_params  # noqa: E402
from sera_jax.models.huggingface import save_pretrained  # noqa: E402
from sera_jax.sampling import Draws, SamplingParams, generate  # noqa: E402

pytestmark = pytest.mark.parity

NEW_TOKENS = 24
TEXTS = ["what is a fig, a fruit of the ficus tree", "no idea at all"]
PROMPTS = ["what is a fig", "no idea", " a tree\n", "at all", "fruit of what", "the ficus"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [A]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
KINDS = {  # (does the tokenizer put BOS before text, its own template, config.data.chat_template)
    "from scratch": None,
    "ChatML on a base": (False, None, CHATML),
    "a chat model": (True, CHAT, ""),
    "a plain base": (True, None, ""),
}


def write_tokenizer(folder, kind):
    """The folder of a base's or chat model's tokenizer, or of one that is trained for a model from scratch."""
    if KINDS[kind] is None:
        return train_bpe(TEXTS * 5, 300, out_dir=folder), ""
    puts_bos, own, given = KINDS[kind]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS * 5, trainer)
    if puts_bos:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({"chat_template": own} if own else {})))
    return folder, given


def our_answers(folder, prompts, ends):
    saved = find_policy(folder)
    params = jax.jit(lambda: init_params(saved.cfg, jax.random.key(5)))()
    sampling = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, stop_ids=ends)
    samples = generate(saved.cfg, params, Draws(prompts, range(len(prompts))), sampling, slots=2, max_prompt_tokens=64)
    return [(s.tokens.tolist(), s.finished) for s in samples]


@pytest.mark.parametrize(
    ("kind", "add_bos"),
    [*((kind, "tokenizer") for kind in KINDS), ("ChatML on a base", "always"), ("a plain base", "never")],
)
def test_an_exported_policy_reads_answers_and_stops_in_transformers_as_it_does_here(tmp_path, kind, add_bos):
    folder, template = write_tokenizer(tmp_path / "tokenizer", kind)
    tokenizer = Tokenizer.load(folder, template, add_bos=add_bos)
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    source = save_pretrained(tmp_path / "source", cfg, init_params(cfg, jax.random.key(5)), tokenizer_dir=folder)
    prompts = [tokenizer.encode_prompt(text) for text in PROMPTS]
    free = our_answers(source, prompts, tokenizer.stop_ids)
    named = free[0][0][min(4, len(free[0][0]) - 1)]  # an end that only the source names, and that answers meet
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [named], "temperature": 0.3}))

    describe(tmp_path / "run", cfg, tokenizer, str(source))
    params = init_params(cfg, jax.random.key(5))
    out = export(params, cfg, tmp_path / "out", source=source, tokenizer_dir=tmp_path / "run" / "tokenizer")
    ends = find_policy(out).ends(Tokenizer.load(out))
    assert set(ends) == {named, *tokenizer.stop_ids}
    ours = our_answers(out, prompts, ends)
    assert any(finished and tokens[-1] == named for tokens, finished in ours)

    outside = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert model.generation_config.temperature == 0.3, "the source's other fields are kept"
    for text, prompt, (tokens, finished) in zip(PROMPTS, prompts, ours, strict=True):
        if outside.chat_template:
            talk = [{"role": "user", "content": text}]
            ids = outside.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        else:
            ids = outside(text)["input_ids"]
        np.testing.assert_array_equal(ids, prompt)
        told = torch.tensor([ids])
        answer = model.generate(told, attention_mask=torch.ones_like(told), do_sample=False, max_new_tokens=NEW_TOKENS)
        assert answer[0, len(ids) :].tolist() == tokens
        assert finished == (len(tokens) < NEW_TOKENS or tokens[-1] in ends)
