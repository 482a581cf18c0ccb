"""A run ahead of time, from its config alone: rows as long as they may be, how many there are, and its programs."""

from __future__ import annotations

import dataclasses
import gzip
import pathlib
import re
from collections.abc import Sequence

from jax.sharding import Mesh

from sera_jax.aot.programs import Program, full_items
from sera_jax.aot.report import ASSUMED_ROWS
from sera_jax.aot.topology import Topology
from sera_jax.config import Config
from sera_jax.data.items import PairItem
from sera_jax.data.sources import parse_mixture
from sera_jax.data.tokenizing import Tokenizer
from sera_jax.experiment.assembly import base_model, check_positions, chosen_attention, layout_of
from sera_jax.experiment.corpus import Corpus, as_text
from sera_jax.experiment.folders import has_tokenizer
from sera_jax.experiment.method import Experiment
from sera_jax.experiment.methods import METHODS
from sera_jax.experiment.parts import with_adapters
from sera_jax.experiment.planned import Planned, Sizes
from sera_jax.experiment.start import phases as start_phases
from sera_jax.loops.runtime import SCORE_TOKENS, Policy, Runtime
from sera_jax.mesh import make_mesh
from sera_jax.models.families import config_from_hf
from sera_jax.models.folder import is_adapter, read_config
from sera_jax.ops import backends
from sera_jax.world import VOCABULARY


def programs_of(config: Config, topology: Topology) -> tuple[list[Program], Mesh, Planned]:
    """All programs of the run of `config` on those devices, in its order. Raises ValueError as `plan`."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=topology.devices)
    if not topology.compiles:  # nor are its devices those that it stands for
        model = dataclasses.replace(config.model, attn_implementation=_traced_attention(config))
        config = dataclasses.replace(config, model=model)
    planned = plan(config, mesh, score_tokens=0 if topology.compiles else SCORE_TOKENS)
    return METHODS[config.method].programs(planned), mesh, planned


def _traced_attention(config: Config) -> str:
    """What an estimate for GPUs is traced with: what they would take where that runs anywhere; for cuDNN, which leaves
    nothing out that is masked, the one loop, which leaves out as little.

    Raises:
        ValueError: GPUs have no such attention as the config names; with the way out.
    """
    _, name, _ = chosen_attention(config, base_model(config.model, _tokenizer(config), config.seed)[0], "cuda")
    return "xla_loop" if backends.anywhere(name) == backends.AUTO else name


def plan(config: Config, mesh: Mesh, *, score_tokens: int = 0) -> Planned:
    """The run of `config` on `mesh`; nothing is read but configs, a tokenizer where there is one, and row counts.

    Args:
        score_tokens: as `Runtime` has it.

    Raises:
        ValueError: the mesh, the model or the lengths do not fit each other.
    """
    method = METHODS[config.method]
    data, longest = config.data, config.data.max_completion_length
    tokenizer = _tokenizer(config)
    cfg, _ = base_model(config.model, tokenizer, config.seed)
    check_positions(config, cfg)
    cfg, lora = with_adapters(config, cfg)
    layout = layout_of(data, mesh)
    stop = (cfg.vocab_size - 1,)
    # no workdir and no writer: nothing is run
    chunk, parts = config.train.logits_chunk_tokens, config.mesh.decode_tensor
    how = dict(decode_tensor=parts, score_tokens=score_tokens, lora=lora)
    run = Runtime(cfg, mesh, None, None, config.seed, layout, chunk, stop, **how)  # type: ignore[arg-type]
    if method.samples_pairs(config):
        longest = max(longest, config.sampling.max_new_tokens)
    base = Policy("base", pathlib.Path(), "base")
    tuned = run.trained(config.sft)
    named = config.model.sft_model_path
    whole = not (lora and is_adapter(pathlib.Path(named))) if named else tuned.whole
    start = Policy("sft", pathlib.Path(), "sft") if whole else Policy("sft", pathlib.Path(), "sft", False, tuned, base)
    given = Experiment(config, run, _corpus(config, tokenizer, longest), start, base)
    names = frozenset([*start_phases(config), *method.phases(config, given.corpus)])
    return Planned(given, sizes_of(config), names)


def _tokenizer(config: Config) -> Tokenizer:
    """The tokenizer where it is there; else one that has every id of the vocabulary."""
    model = config.model
    folders = (model.tokenizer_name_or_path, model.model_name_or_path, model.sft_model_path)
    if name := next((folder for folder in folders if folder and has_tokenizer(folder)), ""):
        return Tokenizer.load(name, config.data.chat_template, add_bos=config.data.add_bos)
    size = model.vocab_size
    if config.world.name:
        size = len(VOCABULARY)
    elif folder := model.model_name_or_path or model.sft_model_path:
        size = config_from_hf(read_config(pathlib.Path(folder))).vocab_size
    return _EveryId(size)  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class _EveryId:
    """What a model's shape asks of a tokenizer."""

    vocab_size: int

    def vocabulary(self) -> dict[str, int]:
        return {str(i): i for i in range(self.vocab_size)}

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    decode_response = decode


def _corpus(config: Config, tokenizer: Tokenizer, longest: int) -> Corpus:
    """As many rows of each kind as an update takes, all as long as they may be."""
    data = config.data
    prompt = min(data.max_prompt_length, data.row_tokens - 2)
    room = data.row_tokens - prompt * (1 if data.share_prompt else 2)
    response = max(1, min(longest, room // 2))
    pairs = [
        PairItem(item)
        for item in full_items(max(config.train.batch_size, config.reward_model.batch_size), prompt, response, response)
    ]
    alone = min(data.max_completion_length, data.row_tokens - prompt)
    demonstrations = full_items(max(config.sft.batch_size, config.pretrain.batch_size), prompt, alone)
    prompts = [dataclasses.replace(item, responses=()) for item in demonstrations]
    by_pairs = METHODS[config.method].texts[0] == "preference"
    answered = config.world.name or data.eval or data.eval_fraction
    return Corpus(
        tokenizer=tokenizer,
        tokenizer_dir="",
        train=pairs,
        heldout=pairs[:1] if by_pairs else [],
        demonstrations=demonstrations,
        demonstrations_are="",
        heldout_demonstrations=[] if by_pairs else demonstrations[:1],
        pretrain=[as_text(item) for item in demonstrations],
        prompts=prompts,
        prompts_left_out={},
        eval_prompts=prompts[:1] if answered and config.eval.num_prompts >= 0 else [],
        gold=(lambda item, tokens: 0.0) if config.world.name or config.eval.gold else None,
        reward_pairs=pairs,
        heldout_reward_pairs=pairs[:1],
    )


def sizes_of(config: Config) -> Sizes:
    """By the embedded world, or by the files that are there; `ASSUMED_ROWS` of those that are not."""
    data, world, settings = config.data, config.world, config.eval
    assumed: list[str] = []

    def rows(field: str) -> float:
        spec = getattr(data, field)
        counts = [_rows_in(path) for path, _ in parse_mixture(spec, field=f"config.data.{field}")] if spec else [0]
        if None in counts:
            assumed.append(f"data.{field}")
        return sum(ASSUMED_ROWS if count is None else count for count in counts)

    def shown(count: float, most: int) -> float:
        return count if most == 0 else min(count, max(most, 0))

    if world.name:
        pairs, demonstrations, pretrain = world.preferences, world.demonstrations, world.pretrain
        prompts, heldout = world.prompts or pairs, max(world.heldout_preferences, world.heldout_demonstrations)
        asked = world.heldout_prompts
    else:
        pairs, demonstrations, pretrain, prompts = map(rows, ("train", "demonstrations", "pretrain", "prompts"))
        heldout = asked = rows("eval") or data.eval_fraction * (pairs or demonstrations)
        if not data.eval:
            pairs, demonstrations = ((1 - data.eval_fraction) * count for count in (pairs, demonstrations))
        pretrain = pretrain or demonstrations or 2 * pairs
        demonstrations, prompts = demonstrations or pairs, prompts or pairs
    return Sizes(
        pairs=pairs,
        demonstrations=demonstrations,
        pretrain=pretrain,
        prompts=prompts,
        heldout=shown(heldout, settings.max_pairs),
        eval_prompts=shown(asked, settings.num_prompts),
        assumed=tuple(assumed),
    )


def _rows_in(path: str) -> int | None:
    """Rows of a JSONL or Parquet file; None where it is not there, or another kind."""
    file = pathlib.Path(path)
    if not file.is_file():
        return None
    if file.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_metadata(file).num_rows
    if not re.search(r"\.jsonl(\.gz)?$", file.name):
        return None
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())
