"""Only marked parts of a text may become control tokens; the rest is encoded as transformers would."""

import json

import numpy as np
import pytest
import tokenizers

from sera_jax.data.escaping import EscapingEncoder, PromptRefused, Text

CONTROL = {"<s>": 256, "</s>": 257}


def spec(**flags) -> dict:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, **flags) for name in CONTROL])
    return json.loads(tokenizer.to_str())


def encode(text: Text, **flags) -> np.ndarray | PromptRefused:
    return EscapingEncoder(spec(**flags), CONTROL).encode([text])[0]


def ids(text: Text, **flags) -> list[int]:
    encoded = encode(text, **flags)
    assert isinstance(encoded, np.ndarray)
    return encoded.tolist()


def test_the_same_string_is_a_token_in_a_template_and_text_in_a_content():
    assert ids(Text(((True, "<s>"),))) == [256]
    assert 256 not in ids(Text(((False, "<s>"),)))
    assert ids(Text(((True, "<s>"), (False, "<s>"), (True, "</s>")))).count(256) == 1


def test_halves_of_a_control_token_do_not_join_across_a_seam():
    assert 256 not in ids(Text(((True, "<"), (False, "s>"))))
    assert 256 not in ids(Text(((False, "<s"), (True, ">"))))


def test_only_the_start_of_a_sequence_gets_the_dummy_space():
    start, middle = ids(Text(((False, "ab"),))), ids(Text(((False, "ab"),), start=False))
    assert start[1:] == middle
    assert len(middle) == 2


def test_a_conditioning_token_can_be_dropped_and_an_end_appended():
    whole = ids(Text(((True, "<s>"), (False, "ab"))))
    assert ids(Text(((True, "<s>"), (False, "ab")), skip=1, end=257)) == [*whole[1:], 257]


def test_the_control_token_that_ends_a_text_is_found():
    encoder = EscapingEncoder(spec(), CONTROL)
    assert encoder.trailing("x<s>") == "<s>"
    assert encoder.trailing("<s>x") == encoder.trailing("x") == encoder.trailing("<s>\n") == ""
    assert EscapingEncoder(spec(rstrip=True), CONTROL).trailing("<s>\n") == "<s>"
    assert encoder.split("a<s>b</s>") == ("a", "<s>")
    assert encoder.split("ab") == ("ab", None)


def test_a_model_that_writes_a_control_token_for_text_is_noticed():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<s>"])
    encoder = EscapingEncoder(json.loads(words.to_str()), {"<s>": 1})
    good, bad = encoder.encode([Text(((True, "<s> "), (False, "a"))), Text(((True, "<s> "), (False, "a <s>")))])
    assert isinstance(good, np.ndarray)
    assert good.tolist() == [1, 0]
    assert isinstance(bad, PromptRefused)


def test_what_is_no_text_is_refused():
    assert isinstance(encode(Text(((False, "\ud800"),))), PromptRefused)
    with pytest.raises(ValueError, match="single_word"):
        EscapingEncoder(spec(single_word=True), CONTROL)
