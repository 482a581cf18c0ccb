"""Tokens made of those of words are those of the tokenizer, or it is asked."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from sera_jax import processor
from sera_jax.data import escaping, words
from sera_jax.data.escaping import EscapingEncoder, PromptRefused, Text

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUT = {
    "GPT-2": GPT2,
    "Llama 3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CL100K), "isolated"), BYTES]),
    "Qwen 2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CL100K.replace("{1,3}", "")), "removed", invert=True), BYTES]
    ),
    "SmolLM 2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
}
LEFT = {
    "classes of other characters": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(O200K), "isolated"), BYTES]),
    "a space before": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "SentencePiece": pre_tokenizers.Metaspace(),
}
SOME = "It's 12345 o'clock, CAN'T you'LL see?\n\n  \tÜber naïve “quotes” – x²+1/½ → done.\r\n A  b\x1cc\x00 ſ'S İ K"
OTHERS = "\u00a0\u2003日本語 हिंदी \U0001f600 e\u0301 \u0085 \ufdd0 ſ"


def backend(cut, normalizer=None):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.normalizer = cut, normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator([SOME, "the cat and the hat, then 123 and 1234; don't, we'll"] * 20, trainer)
    return made


def of(made, encode=None):
    encode = encode or (lambda text: np.array(made.encode(text, add_special_tokens=False).ids, np.int32))
    return words.of_tokenizer(json.loads(made.to_str()), encode, ["<s>", "</s>"])


def drawn(characters, count=200):
    draw = random.Random(1)
    return ["".join(draw.choices(characters, k=draw.randrange(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("normalizer", [None, tokenizers.normalizers.NFC()])
def test_they_are_those_of_the_tokenizer(name, normalizer):
    made = backend(CUT[name], normalizer)
    found = of(made)
    assert found is not None
    western = [SOME.split("ſ")[0], *drawn(SOME.split("ſ")[0])]
    assert all(found.tokens(text) is not None for text in western)
    for text in [*western, *drawn(SOME + OTHERS)]:
        tokens = found.tokens(text)
        expected = made.encode(text, add_special_tokens=False).ids
        assert tokens is None or np.frombuffer(tokens, np.int32).tolist() == expected, text


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_plainly_a_row_of_words_is_left_to_the_tokenizer(name):
    assert of(backend(LEFT[name])) is None


def test_so_is_one_that_encodes_otherwise_than_it_says_or_changes_texts_before():
    made = backend(GPT2)
    assert of(made) is not None
    assert of(made, lambda text: np.array(made.encode(text.replace("é1", "e1")).ids, np.int32)) is None
    assert of(backend(GPT2, tokenizers.normalizers.Lowercase())) is None


def test_and_texts_with_other_characters_or_with_an_added_token():
    found = of(backend(GPT2))
    assert found is not None
    assert [found.tokens(text) for text in ("a\u00a0b", "日本", "a <s>", "ſ")] == [None] * 4
    assert found.tokens("") == b""


def test_many_texts_are_encoded_as_each_of_them(monkeypatch):
    """With control tokens of a template and in contents, other added tokens, ends, and what conditions."""
    made = backend(CUT["SmolLM 2"])
    made.add_tokens(["<think>"])
    encoder = EscapingEncoder(json.loads(made.to_str()), {"<s>": 0, "</s>": 1})
    contents = [*drawn("ab '\n1<s></s>thinké日 ", 100), "a <s> b", "<think>so</think>", SOME, ""]
    texts = [
        Text(((True, "<s>\nuser: "), (False, content), (True, " </s>\n")), skip=k % 2, end=1 if k % 3 else None)
        for k, content in enumerate(contents)
    ]
    monkeypatch.setattr(processor, "cores", lambda: 1)
    asked = []
    by_words = escaping._Backend.by_words
    monkeypatch.setattr(escaping._Backend, "by_words", lambda *given: asked.append(by_words(*given)) or asked[-1])
    together = encoder.encode(texts)
    assert len(asked) == len(texts)
    assert 0 < asked.count(None) < len(asked)
    for text, found in zip(texts, together, strict=True):
        (alone,) = encoder.encode([text])
        assert not isinstance(found, PromptRefused) and not isinstance(alone, PromptRefused)
        np.testing.assert_array_equal(found, alone)
        assert found.dtype == alone.dtype == np.int32
    assert len(asked) == len(texts), "one by one none is made of words"
