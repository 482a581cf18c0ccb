"""Train a small byte-level BPE, for models that are trained from scratch."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sera_jax import whole
from sera_jax.data import chat

# Order gives the ids; padding is 0, as in the packed rows' filling.
SPECIAL_TOKENS: Mapping[str, str] = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
_ROLES = tuple(SPECIAL_TOKENS)
_BYTES = 256


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    out_dir: str | os.PathLike[str],
    special_tokens: Mapping[str, str] = SPECIAL_TOKENS,
    chat_template: str | None = "hh",
) -> pathlib.Path:
    """Train on texts and write a folder that transformers' AutoTokenizer loads.

    Every UTF-8 text is encoded without loss, since all 256 bytes are in the vocabulary. The same texts in any order of
    reading give the same files. The folder appears complete or not at all; one that already holds the same tokenizer is
    left as it is.

    Args:
        texts: training texts.
        vocab_size: tokens including the special ones and the 256 bytes; fewer come out if the texts hold fewer pieces.
        out_dir: folder to write (tokenizer.json, tokenizer_config.json).
        special_tokens: name in tokenizer_config.json -> token; pad_token, bos_token and eos_token, and any others (such
            as a template's role markers). They take the first ids, in this order.
        chat_template: as `Tokenizer.load` takes it; '' or None or 'none' writes none. One that does not speak of
            `bos_token` gets it first.

    Returns:
        out_dir.

    Raises:
        ValueError: missing or equal special tokens, too small a vocabulary, no text, another content in out_dir.
    """
    out = pathlib.Path(out_dir)
    names = list(special_tokens.values())
    missing = [role for role in _ROLES if role not in special_tokens]
    if missing or len(set(names)) != len(names) or not all(names):
        raise ValueError(
            f"special_tokens {dict(special_tokens)} must give {', '.join(_ROLES)}, distinct and not empty: a model "
            "cannot learn to stop when padding and EOS are one token"
        )
    smallest = _BYTES + len(names)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is under {smallest} (256 bytes and {len(names)} special tokens); raise it"
        )
    tokenizer = _train(texts, vocab_size, names)
    bos = special_tokens["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(  # so that other programs put BOS before plain text too
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, names.index(bos))]
    )
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(_config(special_tokens, _template(chat_template)), indent=2) + "\n",
    }
    _publish(out, files)
    return out


def _template(value: str | None) -> str | None:
    """The template's text, with BOS first, as it is put before plain text, unless it speaks of BOS itself."""
    template = chat.resolve(value, None)
    return template if template is None or "bos_token" in template else chat.with_bos(template)


def _train(texts: Iterable[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = False

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer=trainer)
    if not seen:
        raise ValueError("no text to train a tokenizer on; check the data paths")
    return tokenizer


def _config(special_tokens: Mapping[str, str], template: str | None) -> dict[str, object]:
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: special_tokens[role] for role in _ROLES},
        "additional_special_tokens": [token for role, token in special_tokens.items() if role not in _ROLES],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,  # the rows' length is the limit, not the tokenizer
    }
    if template is not None:
        config["chat_template"] = template
    return config


def _publish(out: pathlib.Path, files: Mapping[str, str]) -> None:
    """Write the files as folder `out` in one step."""
    if out.exists():
        same = out.is_dir() and all(
            (out / name).is_file() and (out / name).read_text(encoding="utf-8") == text for name, text in files.items()
        )
        if same:
            return
        if not out.is_dir() or any(out.iterdir()):
            raise ValueError(
                f"{str(out)!r} holds something else than this tokenizer; remove it or choose another folder"
            )
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for name, text in files.items():
            (fresh / name).write_text(text, encoding="utf-8")
        fresh.chmod(0o755)  # mkdtemp's folders are private
        whole.appear(fresh, out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
