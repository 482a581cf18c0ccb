"""From the data and model groups of a config to tokens, items and a base policy. Every step that costs is a phase."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sera_jax import world
from sera_jax.checkpoint import Workdir
from sera_jax.config import Config, DataGroup, ModelGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.bpe import train_bpe
from sera_jax.data.items import Item, PairItem
from sera_jax.data.loading import (
    Limits,
    flip_labels,
    load_demonstrations,
    load_preferences,
    load_prompts,
    load_records,
    split_heldout,
)
from sera_jax.data.sources import parse_mixture
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params, init_params
from sera_jax.models.families import config_from_hf, mathematics
from sera_jax.models.folder import read_config
from sera_jax.models.huggingface import load_pretrained

Judge = Callable[[Item, np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Everything a run reads, as tokens.

    Attributes:
        tokenizer, tokenizer_dir: the tokenizer and the folder it was loaded from.
        train: preference pairs, after label noise. heldout: pairs of other prompts, clean.
        demonstrations: what SFT imitates; `demonstrations_are` says where they come from.
        pretrain: texts for a base model from scratch.
        prompts: what bootstrapping samples on. eval_prompts: what held-out generations answer.
        judge: gold reward, in the embedded world.
    """

    tokenizer: Tokenizer
    tokenizer_dir: str
    train: list[PairItem]
    heldout: list[PairItem]
    demonstrations: list[Item]
    demonstrations_are: str
    pretrain: list[Item]
    prompts: list[Item]
    eval_prompts: list[Item]
    judge: Judge | None


def make_world_files(config: Config, workdir: Workdir) -> tuple[DataGroup, ModelGroup, str]:
    """Write the embedded world's files; data and model groups that point to them, and the held-out prompts' file."""
    group = dataclasses.asdict(config.world)
    group.pop("name")
    spec = world.WorldSpec(seed=config.seed, **group)
    product = workdir.phase("world", dataclasses.asdict(spec), lambda folder: _write_world(spec, folder))
    folder = product.path / "files"
    data = dataclasses.replace(
        config.data,
        train=str(folder / "preferences.jsonl"),
        eval=str(folder / "heldout_preferences.jsonl"),
        demonstrations=str(folder / "demonstrations.jsonl"),
        pretrain=str(folder / "pretrain.jsonl"),
        prompts=str(folder / "prompts.jsonl") if spec.prompts else "",
    )
    model = dataclasses.replace(config.model, tokenizer_name_or_path=str(folder / "tokenizer"))
    return data, model, str(folder / "heldout_prompts.jsonl")


def _write_world(spec: world.WorldSpec, folder: pathlib.Path) -> None:
    world.write_world(spec, folder / "files")


def read_corpus(config: Config, workdir: Workdir, say: Callable[[str], None]) -> Corpus:
    """Read, tokenize and report every source of the config.

    Raises:
        ValueError: a missing file, too many bad rows, or a tokenizer that cannot be used; with the way out.
    """
    check_sources(config.data, config.model)
    data, model, heldout_prompts = config.data, config.model, ""
    if config.world.name:
        data, model, heldout_prompts = make_world_files(config, workdir)
    tokenizer, tokenizer_dir = open_tokenizer(data, model, workdir)
    limits = Limits(
        max_prompt_length=data.max_prompt_length,
        max_completion_length=data.max_completion_length,
        row_tokens=data.row_tokens,
        truncation_mode=data.truncation_mode,
        share_prompt=data.share_prompt,
    )
    options: dict[str, Any] = {
        "limits": limits,
        "max_bad_fraction": data.max_bad_fraction,
        "workdir": workdir.root,
        "seed": config.seed,
    }

    def read(load: Callable[..., Any], spec: str, name: str) -> list[Any]:
        rows, report = load(spec, tokenizer, name=name, **options)
        say(report.table())
        return rows

    train = read(load_preferences, data.train, "train")
    if data.eval:
        heldout = read(load_preferences, data.eval, "eval")
    else:
        train, heldout = split_heldout(train, data.eval_fraction, config.seed)
        say(
            f"held out {len(heldout)} of {len(train) + len(heldout)} pairs by a hash of the prompt (data.eval is empty)"
        )
    if data.demonstrations:
        demonstrations, origin = read(load_demonstrations, data.demonstrations, "demonstrations"), "data.demonstrations"
    else:
        demonstrations, origin = [_side(pair, 0) for pair in train], "the chosen responses of data.train"
    if data.pretrain:
        pretrain = read(load_demonstrations, data.pretrain, "pretrain")
    elif data.demonstrations:
        pretrain = [as_text(item) for item in demonstrations]
    else:
        pretrain = [as_text(_side(pair, k)) for pair in train for k in (0, 1)]
    prompts = read(load_prompts, data.prompts, "prompts") if data.prompts else unique_prompts(p.item for p in train)
    eval_prompts = (
        read(load_prompts, heldout_prompts, "heldout_prompts")
        if heldout_prompts
        else unique_prompts(pair.item for pair in heldout)
    )
    count = config.eval.num_prompts
    return Corpus(
        tokenizer=tokenizer,
        tokenizer_dir=tokenizer_dir,
        train=flip_labels(train, data.label_noise, config.seed),
        heldout=heldout[: config.eval.max_pairs] if config.eval.max_pairs else heldout,
        demonstrations=demonstrations,
        demonstrations_are=origin,
        pretrain=pretrain,
        prompts=prompts,
        eval_prompts=eval_prompts[:count] if count else eval_prompts,
        judge=world_judge(tokenizer) if config.world.name else None,
    )


def check_sources(data: DataGroup, model: ModelGroup) -> None:
    """Refuse what is not there before anything is read: a missing last source would cost the reading of the others."""
    for name in ("train", "eval", "demonstrations", "pretrain", "prompts"):
        spec = getattr(data, name)
        for path, _ in parse_mixture(spec, field=f"config.data.{name}") if spec else ():
            if not path.startswith("tfds:") and "://" not in path and not pathlib.Path(path).exists():
                raise ValueError(f"config.data.{name}={spec!r}: {path!r} does not exist; give the path of a file")
    for name in ("model_name_or_path", "sft_model_path"):
        path = getattr(model, name)
        try:
            if path:
                read_config(pathlib.Path(path))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"config.model.{name}={path!r}: {error}") from error


def open_tokenizer(data: DataGroup, model: ModelGroup, workdir: Workdir) -> tuple[Tokenizer, str]:
    """The tokenizer the config names, or a BPE trained on the data for a model from scratch; and its folder."""
    name = model.tokenizer_name_or_path or model.model_name_or_path or model.sft_model_path
    if name:
        return Tokenizer.load(name, data.chat_template), name
    if not model.vocab_size:
        raise ValueError(
            "config.model.vocab_size=0 and no tokenizer is named; give the number of BPE pieces to train, or "
            "config.model.tokenizer_name_or_path"
        )

    def produce(folder: pathlib.Path) -> None:
        records, _ = load_records(data.train, "preference", max_bad_fraction=data.max_bad_fraction, name="train")
        texts = (text for r in records for text in (_text_of(r.prompt), r.chosen, r.rejected))
        train_bpe(texts, model.vocab_size, out_dir=folder / "tokenizer")

    inputs = {"train": data.train, "vocab_size": model.vocab_size}
    folder = workdir.phase("tokenizer", inputs, produce).path / "tokenizer"
    return Tokenizer.load(folder, data.chat_template), str(folder)


def model_config(model: ModelGroup, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of a model trained from scratch."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)} & set(dataclasses.asdict(model))
    shape = {name: getattr(model, name) for name in fields} | {"vocab_size": tokenizer.vocab_size}
    return ModelConfig(**shape)


def base_model(model: ModelGroup, tokenizer: Tokenizer, seed: int) -> tuple[ModelConfig, Callable[[], Params]]:
    """The base model's shape and a function that makes its parameters: read from its folder, or fresh."""
    path = model.model_name_or_path or model.sft_model_path
    if not path:
        cfg = model_config(model, tokenizer)
        return cfg, lambda: jax.jit(lambda key: init_params(cfg, key))(key_for(seed, Stream.INIT))
    precision = precision_of(model)
    cfg = config_from_hf(read_config(pathlib.Path(path)), **precision)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {path!r} only "
            f"{cfg.vocab_size} embeddings; name the model's own tokenizer in config.model.tokenizer_name_or_path"
        )
    return cfg, lambda: load_pretrained(path, **precision)[1]


def check_positions(config: Config, cfg: ModelConfig) -> None:
    """Raises ValueError, before any work, for lengths that the model has no positions for."""
    room, prompt = cfg.max_position_embeddings, config.data.max_prompt_length
    for field, length in (
        ("data.max_completion_length", config.data.max_completion_length),
        ("sampling.max_new_tokens", config.sampling.max_new_tokens),
        ("eval.max_new_tokens", config.eval.max_new_tokens),
    ):
        if prompt + length > room:
            raise ValueError(
                f"config.data.max_prompt_length={prompt} and config.{field}={length} exceed the model's "
                f"max_position_embeddings={room} together; lower one of them"
            )


def sft_model(model: ModelGroup, cfg: ModelConfig) -> Params:
    """The parameters of `model.sft_model_path`.

    Raises:
        ValueError: it is another model than the base.
    """
    found, params = load_pretrained(model.sft_model_path, **precision_of(model))
    if mathematics(found) != mathematics(cfg):
        differ = [key for key, value in mathematics(found).items() if mathematics(cfg).get(key) != value]
        raise ValueError(
            f"config.model.sft_model_path={model.sft_model_path!r} is not of the base model's shape "
            f"({', '.join(differ)} differ); set config.model.model_name_or_path to the base it was trained from"
        )
    return params


def folder_identity(path: str) -> dict[str, Any]:
    """What tells one Hugging Face folder from another without reading its weights: names, sizes and config."""
    folder = pathlib.Path(path)
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))} | {
        "path": path,
        "config": read_config(folder),
    }


def precision_of(model: ModelGroup) -> dict[str, Any]:
    """The fields that a checkpoint's own config does not speak of."""
    names = ("dtype", "param_dtype", "logits_dtype", "remat", "attn_implementation")
    return {name: getattr(model, name) for name in names}


def unique_prompts(items: Any) -> list[Item]:
    """The prompts of the items, each once, without responses, in order."""
    seen: dict[bytes, Item] = {}
    for item in items:
        seen.setdefault(item.prompt.tobytes(), Item(item.id, item.prompt, ()))
    return list(seen.values())


def as_text(item: Item) -> Item:
    """Prompt and response as one text to be modelled whole: its first token is the prompt, the rest the response."""
    rest = np.concatenate([item.prompt[1:], *item.responses]).astype(np.int32)
    return Item(item.id, item.prompt[:1], (rest,))


def _side(pair: PairItem, side: int) -> Item:
    return Item(
        f"{pair.item.id}/{'chosen' if side == 0 else 'rejected'}", pair.item.prompt, (pair.item.responses[side],)
    )


def _text_of(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def world_judge(tokenizer: Tokenizer) -> Judge:
    """The embedded world's gold reward, of token ids."""
    return lambda item, tokens: world.gold(tokenizer.decode(item.prompt), tokenizer.decode(tokens))
