"""Every option of a run, written once: frozen dataclasses whose defaults are the defaults.

`configs/*.py` build an ml_collections ConfigDict from them (`to_config_dict`), the command line overrides it, and
`parse` turns it back, checking every field and every rule that joins fields. Nothing else reads a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict


@dataclasses.dataclass(frozen=True)
class ModelGroup:
    """The base model: a Hugging Face folder, or a shape to train from scratch.

    `sft_model_path` names an SFT checkpoint to start from instead of running SFT. The shape fields are read only when
    `model_name_or_path` is empty. `vocab_size` is then the number of BPE pieces trained from the data, unless
    `tokenizer_name_or_path` brings a tokenizer (0: the tokenizer's own size).
    """

    model_name_or_path: str = ""
    sft_model_path: str = ""
    tokenizer_name_or_path: str = ""
    family: str = "llama"
    vocab_size: int = 0
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    logits_dtype: str = "float32"
    remat: str = "none"
    attn_implementation: str = "xla"


@dataclasses.dataclass(frozen=True)
class DataGroup:
    """Where rows come from and how they become packed rows. Sources are comma-separated, `path=weight` mixes.

    train: preference pairs. eval: held-out pairs (empty: `eval_fraction` of the train prompts, by a stable hash).
    demonstrations: for SFT (empty: the chosen responses). pretrain: texts for a base model from scratch (empty: the
    demonstrations). prompts: what bootstrapping samples on (empty: the prompts of `train`).
    """

    train: str = ""
    eval: str = ""
    demonstrations: str = ""
    pretrain: str = ""
    prompts: str = ""
    eval_fraction: float = 0.1
    max_prompt_length: int = 512
    max_completion_length: int = 512
    truncation_mode: str = "keep_end"
    row_tokens: int = 1024
    share_prompt: bool = True
    max_row_shapes: int = 3
    max_bad_fraction: float = 0.05
    label_noise: float = 0.0
    chat_template: str = ""


@dataclasses.dataclass(frozen=True)
class LossGroup:
    """The direct alignment loss. A hyper-parameter left unset takes the loss's own default; one it does not read is refused."""

    name: str = "dpo"
    beta: float | None = None
    tau: float | None = None
    delta: float | None = None
    gamma_beta_ratio: float | None = None
    label_smoothing: float | None = None
    nll_coef: float | None = None
    logp_reduction: str | None = None


@dataclasses.dataclass(frozen=True)
class SeraGroup:
    """The rounds of SeRA. One round, or `selection="none"` with `bootstrap_fraction=0`, is the plain DAA.

    arms: what to run from the same SFT model: `sera`, and the controls `daa` (all pairs, as many updates), `random`
    (the same pipeline with random choices of the same size), `selection_only`, `bootstrap_only`.
    keep_fraction: share of the offline pairs kept from round 2 on; `threshold` is read by selection="threshold",
    `band` (quantiles) by selection="middle". bootstrap_fraction: at most this many sampled pairs, as a share of the
    offline pairs; bootstrap_prompts: prompts sampled for them each round (0: all). min_margin: sampled pairs below this margin are refused (nats; unset: no limit). length_alpha: reward
    per token taken off when candidates are ranked (DICE). ensemble_gamma: weight of the previous round's policy in the reward
    (SeRA eq. 7). reference: `fixed` (the SFT model) or `previous` (the last round's policy; scoring stays with the SFT model).
    """

    rounds: int = 3
    arms: tuple[str, ...] = ("sera",)
    selection: str = "top"
    keep_fraction: float = 0.7
    threshold: float | None = None
    band: tuple[float, float] = (0.2, 0.8)
    curriculum: str = "none"
    bootstrap_fraction: float = 0.3
    bootstrap_prompts: int = 0
    num_samples: int = 4
    pairing: str = "best_worst"
    min_margin: float | None = None
    length_alpha: float = 0.0
    require_eos: bool = True
    ensemble_gamma: float = 0.3
    reset_optimizer: bool = False
    reference: str = "fixed"


@dataclasses.dataclass(frozen=True)
class SamplingGroup:
    """How the policy answers prompts, and in how many decode slots."""

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    min_new_tokens: int = 1
    slots: int = 64


@dataclasses.dataclass(frozen=True)
class TrainGroup:
    """One optimisation. Used for `pretrain`, `sft` (batches in demonstrations) and `train` (batches in pairs).

    batch_size is global and exact, whatever the accumulation. max_steps > 0 overrides the epochs; for `train` it is the
    number of updates of each round. save_steps=0 saves at the end of each phase only.
    """

    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    num_train_epochs: int = 1
    max_steps: int = 0
    learning_rate: float = 1e-6
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    optim: str = "adamw"
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    logits_chunk_tokens: int = 2048
    save_steps: int = 200
    save_total_limit: int = 1


@dataclasses.dataclass(frozen=True)
class MeshGroup:
    """Device mesh; -1 takes the devices that remain."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class EvalGroup:
    """Held-out evaluation after every round. 0 pairs or prompts: all there are."""

    max_pairs: int = 0
    num_prompts: int = 64
    temperature: float = 0.0
    max_new_tokens: int = 0
    num_generations: int = 8


@dataclasses.dataclass(frozen=True)
class LogGroup:
    logging_steps: int = 10
    tensorboard: bool = True
    report: bool = True
    hf_export: bool = False


@dataclasses.dataclass(frozen=True)
class WorldGroup:
    """The embedded world (sera_jax/world.py); an empty name means real data. Sizes are counts of rows."""

    name: str = ""
    pretrain: int = 8000
    demonstrations: int = 200
    preferences: int = 800
    heldout_preferences: int = 400
    heldout_prompts: int = 200
    prompts: int = 0
    demonstrator: str = "better"
    cue: float = 0.6


@dataclasses.dataclass(frozen=True)
class Config:
    workdir: str = ""
    seed: int = 0
    model: ModelGroup = ModelGroup()
    data: DataGroup = DataGroup()
    loss: LossGroup = LossGroup()
    sera: SeraGroup = SeraGroup()
    sampling: SamplingGroup = SamplingGroup()
    pretrain: TrainGroup = TrainGroup(learning_rate=1e-3, batch_size=64)
    sft: TrainGroup = TrainGroup(learning_rate=2e-5, batch_size=64)
    train: TrainGroup = TrainGroup()
    mesh: MeshGroup = MeshGroup()
    eval: EvalGroup = EvalGroup()
    log: LogGroup = LogGroup()
    world: WorldGroup = WorldGroup()


ARMS = ("sera", "daa", "random", "selection_only", "bootstrap_only")
CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.logits_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "full", "dots"),
    "model.attn_implementation": ("xla",),
    "data.truncation_mode": ("keep_end", "keep_start", "drop"),
    "sera.selection": ("top", "bottom", "middle", "threshold", "random", "none"),
    "sera.curriculum": ("none", "easy_to_hard", "hard_to_easy"),
    "sera.pairing": ("best_worst", "all"),
    "sera.reference": ("fixed", "previous"),
    "world.name": ("", "habits"),
    **{f"{g}.optim": ("adamw", "adafactor", "lion") for g in ("pretrain", "sft", "train")},
    **{f"{g}.lr_scheduler_type": ("linear", "cosine", "constant") for g in ("pretrain", "sft", "train")},
}
# field -> (lowest, highest, lowest itself allowed)
RANGES: dict[str, tuple[float, float, bool]] = {
    "seed": (0, 2**31 - 1, True),
    "data.eval_fraction": (0, 0.9, True),
    "data.max_prompt_length": (1, math.inf, True),
    "data.max_completion_length": (1, math.inf, True),
    "data.row_tokens": (2, math.inf, True),
    "data.max_row_shapes": (1, math.inf, True),
    "data.max_bad_fraction": (0, 1, True),
    "data.label_noise": (0, 1, True),
    "loss.beta": (0, math.inf, False),
    "loss.tau": (0, math.inf, False),
    "loss.label_smoothing": (0, 0.5, True),
    "loss.nll_coef": (0, math.inf, True),
    "sera.rounds": (1, math.inf, True),
    "sera.keep_fraction": (0, 1, True),
    "sera.bootstrap_fraction": (0, math.inf, True),
    "sera.bootstrap_prompts": (0, math.inf, True),
    "sera.num_samples": (2, math.inf, True),
    "sera.ensemble_gamma": (0, 1, True),
    "sampling.temperature": (0, math.inf, True),
    "sampling.top_p": (0, 1, False),
    "sampling.top_k": (0, math.inf, True),
    "sampling.max_new_tokens": (1, math.inf, True),
    "sampling.min_new_tokens": (0, math.inf, True),
    "sampling.slots": (1, math.inf, True),
    "eval.max_pairs": (0, math.inf, True),
    "eval.num_prompts": (0, math.inf, True),
    "eval.temperature": (0, math.inf, True),
    "eval.max_new_tokens": (0, math.inf, True),
    "eval.num_generations": (0, math.inf, True),
    "log.logging_steps": (1, math.inf, True),
    **{
        f"{group}.{field}": bounds
        for group in ("pretrain", "sft", "train")
        for field, bounds in {
            "batch_size": (1, math.inf, True),
            "gradient_accumulation_steps": (1, math.inf, True),
            "num_train_epochs": (1, math.inf, True),
            "max_steps": (0, math.inf, True),
            "learning_rate": (0, math.inf, False),
            "warmup_ratio": (0, 1, True),
            "weight_decay": (0, math.inf, True),
            "adam_beta1": (0, 1, True),
            "adam_beta2": (0, 1, True),
            "adam_epsilon": (0, 1, False),
            "max_grad_norm": (0, math.inf, False),
            "logits_chunk_tokens": (1, math.inf, True),
            "save_steps": (0, math.inf, True),
            "save_total_limit": (1, math.inf, True),
        }.items()
    },
}


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields of `config`; unset optional fields are typed placeholders."""

    def convert(group: Any) -> ml_collections.ConfigDict:
        out = ml_collections.ConfigDict()
        hints = typing.get_type_hints(type(group))
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if dataclasses.is_dataclass(value):
                value = convert(value)
            elif value is None:
                value = config_dict.placeholder(_plain_type(hints[field.name]))
            out[field.name] = value
        return out

    return convert(config).lock()


def parse(raw: ml_collections.ConfigDict) -> Config:
    """The frozen Config of a ConfigDict.

    Raises:
        ValueError: for an unknown or missing field, a wrong type, a value out of range, or fields that contradict each
            other; the message names the field, the value and the choices.
    """
    config = _parse_group(Config, raw, "")
    for name, choices in CHOICES.items():
        value = _get(config, name)
        if value not in choices:
            raise ValueError(f"config.{name}={value!r} is not a choice; choose one of {', '.join(map(repr, choices))}")
    for name, (low, high, closed) in RANGES.items():
        value = _get(config, name)
        if value is None:
            continue
        if not (low <= value <= high) or (value == low and not closed):
            sign = "<=" if closed else "<"
            raise ValueError(f"config.{name}={value!r} is out of range; it must be {low} {sign} {name} <= {high}")
    _check_together(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, for JSON."""
    return dataclasses.asdict(config)


def _check_together(config: Config) -> None:
    """The rules that join fields."""
    if not config.workdir:
        raise ValueError("config.workdir is empty; give a folder for checkpoints and results: --config.workdir=runs/NAME")
    unknown = [arm for arm in config.sera.arms if arm not in ARMS]
    if unknown or not config.sera.arms or len(set(config.sera.arms)) != len(config.sera.arms):
        raise ValueError(f"config.sera.arms={config.sera.arms!r}; give each of {', '.join(ARMS)} at most once, and one at least")
    if not config.world.name and not config.data.train:
        raise ValueError("config.data.train is empty; name preference rows: --config.data.train=pairs.jsonl")
    if config.world.name and config.data.train:
        raise ValueError(
            f"config.data.train={config.data.train!r} and config.world.name={config.world.name!r} are both set; the embedded "
            "world writes its own rows: empty one of them"
        )
    low, high = config.sera.band
    if not 0 <= low < high <= 1:
        raise ValueError(f"config.sera.band={config.sera.band!r}; it must be two quantiles 0 <= low < high <= 1")
    if config.sera.selection == "threshold" and config.sera.threshold is None:
        raise ValueError("config.sera.selection='threshold' needs config.sera.threshold (nats)")
    if config.sera.selection != "threshold" and config.sera.threshold is not None:
        raise ValueError(
            f"config.sera.threshold={config.sera.threshold} is read by selection='threshold' only, "
            f"but selection={config.sera.selection!r}; change one of them"
        )
    sampling = config.sampling
    if sampling.min_new_tokens > sampling.max_new_tokens:
        raise ValueError(
            f"config.sampling.min_new_tokens={sampling.min_new_tokens} exceeds max_new_tokens={sampling.max_new_tokens}"
        )
    if config.data.max_prompt_length >= config.data.row_tokens:
        raise ValueError(
            f"config.data.max_prompt_length={config.data.max_prompt_length} leaves no room for a response in rows of "
            f"config.data.row_tokens={config.data.row_tokens}; raise row_tokens or lower max_prompt_length"
        )


def _parse_group(cls: type, raw: ml_collections.ConfigDict, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in raw:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"fields here: {', '.join(names)}"
            raise ValueError(f"config.{prefix}{key} is not a field; {hint}")
    values = {}
    for name in names:
        if name not in raw:
            raise ValueError(f"config.{prefix}{name} is missing; start from configs/base.py, which has every field")
        kind = hints[name]
        value = raw[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, ml_collections.ConfigDict):
                raise ValueError(f"config.{prefix}{name}={value!r} must be a group of fields")
            values[name] = _parse_group(kind, value, f"{prefix}{name}.")
        else:
            values[name] = _parse_value(kind, value, prefix + name)
    return cls(**values)


def _parse_value(kind: Any, value: Any, name: str) -> Any:
    plain = _plain_type(kind)
    if value is None and isinstance(kind, types.UnionType):
        return None
    if typing.get_origin(plain) is tuple:
        parts = typing.get_args(plain)
        if isinstance(value, str):  # --config.sera.arms=daa,sera arrives as one string
            value = tuple(part for part in value.split(",") if part)
        if not isinstance(value, tuple | list):
            raise ValueError(f"config.{name}={value!r} must be a tuple")
        if parts[-1] is not Ellipsis and len(value) != len(parts):
            raise ValueError(f"config.{name}={value!r} must hold {len(parts)} values")
        return tuple(_parse_value(parts[0], part, name) for part in value)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not plain:
        raise ValueError(f"config.{name}={value!r} is a {type(value).__name__}; it must be a {plain.__name__}")
    if plain is float and not math.isfinite(value):
        raise ValueError(f"config.{name}={value!r} is not a finite number")
    return value


def _plain_type(kind: Any) -> Any:
    """float of `float | None`; the type itself otherwise."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _get(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value
