"""From the data and model groups of a config to tokens, items and a base policy. Every step that costs is a phase."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from sera_jax import world
from sera_jax.checkpoint import Workdir
from sera_jax.config import Config, DataGroup, ModelGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.bpe import train_bpe
from sera_jax.data.columns import Reading
from sera_jax.data.items import Item
from sera_jax.data.loading import Limits, load_records
from sera_jax.data.packing import Layout
from sera_jax.data.sources import content_hash, is_there, parse_mixture
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.evaluation.gold import OF_TEXT
from sera_jax.experiment import overlaps
from sera_jax.experiment.brought import SOURCES
from sera_jax.experiment.corpus import Corpus, Reader
from sera_jax.experiment.folders import check_two_models, has_tokenizer
from sera_jax.experiment.method import Method
from sera_jax.experiment.methods import METHODS
from sera_jax.loops.sera_study import Gold
from sera_jax.mesh import row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import asked_attention
from sera_jax.models.families import config_from_hf, mathematics
from sera_jax.models.folder import is_adapter, read_config
from sera_jax.models.peft import read_adapter_config
from sera_jax.ops import backends
from sera_jax.training.parameters import Origin

_ATTENTION_ERROR = 0.05  # of a kernel, as a share: in bfloat16 a right one has 0.006, one without branches 0.14
_WITHOUT_KERNEL = "set --config.model.attn_implementation=xla_loop"


def read_corpus(
    config: Config, workdir: Workdir, say: Callable[[str], None], reader: Callable[..., Reader] = Reader
) -> Corpus:
    """Read, tokenize and report every source of the config, and say what of held-out prompts stands in them.

    Args:
        reader: makes what reads a source.

    Raises:
        ValueError: a missing file, too many bad rows, or a tokenizer that cannot be used; with the way out.
    """
    method = METHODS[config.method]
    if method.needs_base:
        check_two_models(config.model, say)
    gold_of_text = OF_TEXT[config.eval.gold]() if config.eval.gold else None
    data, model, heldout_prompts = config.data, config.model, ""
    if config.world.name:
        data, model, heldout_prompts = make_world_files(config, method, workdir)
    tokenizer, tokenizer_dir = open_tokenizer(data, model, workdir, method)
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
        "reading": Reading(data.columns, data.thoughts, data.pairs),
        "workdir": workdir.root,
        "seed": config.seed,
    }
    read = reader(
        tokenizer=tokenizer,
        tokenizer_dir=tokenizer_dir,
        gold=world_gold(tokenizer) if config.world.name else None,
        gold_of_text=gold_of_text,
        options=options,
        say=say,
        workdir=workdir,
    )
    corpus = method.read(config, data, heldout_prompts, read)
    tasks = world_tasks(tokenizer, corpus.eval_prompts) if config.world.name else []
    looking = overlaps.Looking(data, method.texts[1][0], tuple(corpus.held_out_rows), heldout_prompts, config.seed)
    return dataclasses.replace(corpus, eval_tasks=tasks, contamination=overlaps.said(looking, workdir.root, say))


def make_world_files(config: Config, method: Method, workdir: Workdir) -> tuple[DataGroup, ModelGroup, str]:
    """Write the embedded world's files; data and model groups that point to them, and the held-out prompts' file."""
    spec = world.WorldSpec(seed=config.seed, **dataclasses.asdict(config.world))
    product = workdir.phase("world", dataclasses.asdict(spec), lambda folder: _write_world(spec, folder), alone=True)
    folder = product.path / "files"
    files = {field: str(folder / file) for field, file in method.sources.items()}
    if not spec.prompts:
        files["prompts"] = ""
    data = dataclasses.replace(config.data, **dict.fromkeys(SOURCES, "") | files)
    model = dataclasses.replace(config.model, tokenizer_name_or_path=str(folder / "tokenizer"))
    return data, model, str(folder / "heldout_prompts.jsonl")


def _write_world(spec: world.WorldSpec, folder: pathlib.Path) -> None:
    world.write_world(spec, folder / "files")


def check_sources(data: DataGroup, model: ModelGroup) -> None:
    """Refuse what is not there before anything is read: a missing last source would cost the reading of the others."""
    for name in (*SOURCES, "benchmarks"):
        spec = getattr(data, name)
        for path, _ in parse_mixture(spec, field=f"config.data.{name}") if spec else ():
            if "://" not in path and not is_there(path):
                raise ValueError(f"config.data.{name}={spec!r}: {path!r} does not exist; give the path of a file")
    for name in ("model_name_or_path", "sft_model_path"):
        path = getattr(model, name)
        try:
            if name == "sft_model_path" and model.model_name_or_path and is_adapter(pathlib.Path(path)):
                read_adapter_config(pathlib.Path(path))
            elif path:
                config_from_hf(read_config(pathlib.Path(path)))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"config.model.{name}={path!r}: {error}") from error


def open_tokenizer(data: DataGroup, model: ModelGroup, workdir: Workdir, method: Method) -> tuple[Tokenizer, str]:
    """The tokenizer the config names, or a BPE trained on the data for a model from scratch; and its folder."""
    name = model.tokenizer_name_or_path or model.model_name_or_path or model.sft_model_path
    if method.needs_base and not model.tokenizer_name_or_path and has_tokenizer(model.sft_model_path):
        name = model.sft_model_path  # its chat template is the one that it was trained with
    if name:
        return Tokenizer.load(name, data.chat_template, add_bos=data.add_bos), name
    if not model.vocab_size:
        raise ValueError(
            "config.model.vocab_size=0 and no tokenizer is named; give the number of BPE pieces to train, or "
            "config.model.tokenizer_name_or_path"
        )
    kind, fields = method.texts
    sources = {field: getattr(data, field) for field in fields}

    reading = Reading(data.columns, data.thoughts, data.pairs)

    def texts() -> Iterator[str]:
        for field, spec in sources.items():
            if spec:
                records, _ = load_records(
                    spec, kind, max_bad_fraction=data.max_bad_fraction, name=field, reading=reading
                )
                for record in records:
                    yield _text_of(record.prompt)
                    yield from (record.chosen, record.rejected) if kind == "preference" else (record.response,)

    def produce(folder: pathlib.Path) -> None:
        train_bpe(texts(), model.vocab_size, out_dir=folder / "tokenizer")

    contents = {field: _contents(spec, f"config.data.{field}") for field, spec in sources.items()}
    inputs = sources | {"vocab_size": model.vocab_size, "contents": contents}
    inputs |= {} if reading == Reading() else {"reading": reading.named()}
    folder = workdir.phase("tokenizer", inputs, produce, alone=True).path / "tokenizer"
    return Tokenizer.load(folder, data.chat_template, add_bos=data.add_bos), str(folder)


def _contents(spec: str, field: str) -> list[str]:
    """Digests of the files that a source names."""
    return [content_hash(path, field=field) for path, _ in parse_mixture(spec, field=field)] if spec else []


def model_config(model: ModelGroup, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of a model trained from scratch."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)} & set(dataclasses.asdict(model))
    shape = {name: getattr(model, name) for name in fields} | {"vocab_size": tokenizer.vocab_size}
    return with_vocabulary(ModelConfig(**shape), tokenizer, "from scratch", field="config.model.tokenizer_name_or_path")


def base_model(model: ModelGroup, tokenizer: Tokenizer, seed: int) -> tuple[ModelConfig, Origin]:
    """The base model's shape, and where its parameters come from: its folder, or, fresh, a random key."""
    path = model.model_name_or_path or model.sft_model_path
    return model_shape(model, tokenizer), path or key_for(seed, Stream.INIT)


def model_shape(model: ModelGroup, tokenizer: Tokenizer) -> ModelConfig:
    """The base model's shape, with the tokenizer's ids."""
    path = model.model_name_or_path or model.sft_model_path
    if not path:
        return model_config(model, tokenizer)
    cfg = config_from_hf(read_config(pathlib.Path(path)), **precision_of(model))
    return with_vocabulary(cfg, tokenizer, path, field="config.model.tokenizer_name_or_path")


def with_vocabulary(cfg: ModelConfig, tokenizer: Tokenizer, model: str, *, field: str) -> ModelConfig:
    """The config, with the ids that the tokenizer does not have marked as such (`ModelConfig.absent_ids`).

    Args:
        model: where the model was found; field: where another tokenizer may be named; both for the message.

    Raises:
        ValueError: the tokenizer has ids that the model has no embedding for.
    """
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model {model!r} only "
            f"{cfg.vocab_size} embeddings; name the model's own tokenizer in {field}"
        )
    known = sorted({-1, *tokenizer.vocabulary().values(), cfg.vocab_size})
    gaps = tuple((below + 1, above) for below, above in itertools.pairwise(known) if above > below + 1)
    return dataclasses.replace(cfg, absent_ids=gaps)


def layout_of(data: DataGroup, mesh: Mesh) -> Layout:
    """How a config's items become rows on the mesh."""
    return Layout(
        row_tokens=data.row_tokens,
        share_prompt=data.share_prompt,
        multiple=data.row_multiple,
        shards=row_shards(mesh),
        max_shapes=data.max_row_shapes,
    )


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


def chosen_attention(config: Config, cfg: ModelConfig, devices: str) -> tuple[backends.Asked, str, str]:
    """What is asked of attention, the back end that computes it on such devices, and why it is not their kernel.

    Raises:
        ValueError: the back end that the config names cannot compute it there.
    """
    asked = asked_attention(cfg, devices, config.data.row_tokens)
    try:
        return asked, *backends.choose(cfg.attn_implementation, asked)
    except ValueError as error:
        raise ValueError(f"config.model.{error}") from error


def attention_in_words(config: Config, cfg: ModelConfig, mesh: Mesh) -> list[str]:
    """Which attention is computed, where the devices have a kernel for it. Errors as of `chosen_attention`."""
    return _words(*chosen_attention(config, cfg, backends.devices(mesh)))


def _words(asked: backends.Asked, name: str, why: str) -> list[str]:
    return [] if asked.devices == "cpu" else [f"attention: {name}" + (f", since {why}" if why else "")]


def tried_attention(config: Config, cfg: ModelConfig, mesh: Mesh) -> list[str]:
    """`attention_in_words`, once a kernel that computes it was tried: whatever it was tested on, these devices, their
    driver and their compiler are the user's.

    Raises:
        ValueError: also where the kernel fails, or does not compute what plain XLA does on the same devices.
    """
    asked, name, why = chosen_attention(config, cfg, backends.devices(mesh))
    words = _words(asked, name, why)
    if not backends.ATTENTION[name].devices:
        return words
    try:
        error = backends.error_of(name, asked)
    except (RuntimeError, ValueError, TypeError) as failure:
        raise ValueError(f"attention: {name} fails on these devices ({failure}); {_WITHOUT_KERNEL}") from failure
    if not error < _ATTENTION_ERROR:
        raise ValueError(f"attention: {name} is {error:.0%} off what plain XLA computes here; {_WITHOUT_KERNEL}")
    return words


def check_shape(model: ModelGroup, cfg: ModelConfig) -> None:
    """Raises ValueError, from its config alone, where `model.sft_model_path` is not of the base's shape."""
    if is_adapter(pathlib.Path(model.sft_model_path)):
        return  # whose tensors are compared with the base's where they are read
    found = config_from_hf(read_config(pathlib.Path(model.sft_model_path)), **precision_of(model))
    if mathematics(found) != mathematics(cfg):
        differ = [key for key, value in mathematics(found).items() if mathematics(cfg).get(key) != value]
        raise ValueError(
            f"config.model.sft_model_path={model.sft_model_path!r} is not of the base model's shape "
            f"({', '.join(differ)} differ); set config.model.model_name_or_path to the base it was trained from"
        )


def precision_of(model: ModelGroup) -> dict[str, Any]:
    """The fields that a checkpoint's own config does not speak of."""
    names = ("dtype", "param_dtype", "logits_dtype", "remat", "attn_implementation")
    return {name: getattr(model, name) for name in names}


def _text_of(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def world_gold(tokenizer: Tokenizer) -> Gold:
    """The embedded world's gold reward, of token ids."""
    return lambda item, tokens: world.gold(tokenizer.decode(item.prompt), tokenizer.decode(tokens))


def world_tasks(tokenizer: Tokenizer, prompts: Sequence[Item]) -> list[str]:
    """The embedded world's task that each of its prompts sets."""
    return [world.parse_prompt(tokenizer.decode(item.prompt)).kind for item in prompts]
