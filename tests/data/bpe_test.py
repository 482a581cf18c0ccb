"""The small byte-level BPE: lossless, deterministic, complete or absent."""

import json

import numpy as np
import pytest

from sera_jax.data import bpe
from sera_jax.data.bpe import SPECIAL_TOKENS, train_bpe
from sera_jax.data.tokenizing import Tokenizer

TEXTS = [
    f"the {word} sat on the {word}, and the {word} was {number}" for word in ("cat", "mat") for number in range(40)
]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_text_comes_back(tmp_path):
    tokenizer = Tokenizer.load(train_bpe(TEXTS, 300, out_dir=tmp_path / "t"))
    rng = np.random.default_rng(0)
    texts = ["", " ", "\n\nHuman: x", "naïve 😀 漢字 \x00\x7f", "<|eos|><|bos|><|pad|>"]
    texts += ["".join(chr(c) for c in rng.integers(0x20, 0xD7FF, 30)) for _ in range(20)]
    for text in texts:
        assert tokenizer.decode_response(tokenizer.encode_response("x", text)) == text


def test_bos_eos_and_padding_are_distinct_and_first(tmp_path):
    tokenizer = Tokenizer.load(train_bpe(TEXTS, 300, out_dir=tmp_path / "t"))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.end_id == tokenizer.eos_id
    assert tokenizer.vocab_size == 300
    assert tokenizer._hf("the cat").input_ids[0] == tokenizer.bos_id  # other programs put BOS too


def test_the_same_texts_give_the_same_files_in_any_order(tmp_path):
    first = train_bpe(TEXTS, 320, out_dir=tmp_path / "a")
    again = train_bpe(iter(TEXTS), 320, out_dir=tmp_path / "b")
    turned = train_bpe(TEXTS[::-1], 320, out_dir=tmp_path / "c")
    assert contents(first) == contents(again) == contents(turned)


def test_pieces_are_learnt(tmp_path):
    tokenizer = Tokenizer.load(train_bpe(TEXTS, 300, out_dir=tmp_path / "t"), "none")
    assert len(tokenizer.encode_response("x", " the cat", complete=False)) == 2


def test_role_markers_can_be_special_and_used_by_a_template(tmp_path):
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    special = {**SPECIAL_TOKENS, "user": "<|user|>", "assistant": "<|assistant|>"}
    folder = train_bpe(TEXTS, 300, out_dir=tmp_path / "t", special_tokens=special, chat_template=template)
    prompt = Tokenizer.load(folder).encode_prompt("<|user|>").tolist()
    assert prompt[:2] == [1, 3]
    assert prompt[-2:] == [2, 4]
    assert prompt.count(3) == 1


def test_a_folder_of_the_same_tokenizer_is_kept_and_of_another_refused(tmp_path):
    folder = train_bpe(TEXTS, 300, out_dir=tmp_path / "t")
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    train_bpe(TEXTS, 300, out_dir=folder)
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="something else"):
        train_bpe(TEXTS, 301, out_dir=folder)


def test_a_stop_in_the_middle_of_writing_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(bpe.whole, "appear", stop)
    with pytest.raises(KeyboardInterrupt):
        train_bpe(TEXTS, 300, out_dir=tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused_with_the_limit(tmp_path):
    with pytest.raises(ValueError, match="259"):
        train_bpe(TEXTS, 258, out_dir=tmp_path / "t")
    with pytest.raises(ValueError, match="distinct"):
        train_bpe(TEXTS, 300, out_dir=tmp_path / "t", special_tokens={**SPECIAL_TOKENS, "pad_token": "<|eos|>"})
    with pytest.raises(ValueError, match="eos_token"):
        train_bpe(TEXTS, 300, out_dir=tmp_path / "t", special_tokens={"pad_token": "a", "bos_token": "b"})
    with pytest.raises(ValueError, match="no text"):
        train_bpe([], 300, out_dir=tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_the_config_names_the_template_only_if_there_is_one(tmp_path):
    folder = train_bpe(TEXTS, 300, out_dir=tmp_path / "t", chat_template=None)
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    assert Tokenizer.load(folder).template is None
