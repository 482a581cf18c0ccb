"""Command lines that are wrong, each in one way: from what the fields say they may be, and a list by hand."""

import dataclasses
import math
import pathlib
import typing
from typing import Any

from sera_jax.config import Config
from sera_jax.config import fields as fields_lib

WRONG_TYPES = {int: ("x", "1.5", "", "1e3"), float: ("x", "nan", "inf", ""), bool: ("maybe", "2", "")}


def fields(kind: Any = Config, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(path, type, metadata) of every field of a config."""
    hints, found = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            found += fields(hints[field.name], f"{prefix}{field.name}.")
        else:
            found.append((prefix + field.name, hints[field.name], field.metadata))
    return found


def of_metadata() -> list[str]:
    """For each field: a value beyond each end of its range, a word that is no choice, a value of another type."""
    wrong = []
    for number, (path, kind, allowed) in enumerate(fields()):
        if fields_lib.CHOICES in allowed:
            wrong.append(f"--config.{path}=nonsense")
        if fields_lib.RANGE in allowed:
            low, high, closed = allowed[fields_lib.RANGE]
            wrong.append(f"--config.{path}={low - 1 if closed else low}")
            if not math.isinf(high):
                wrong.append(f"--config.{path}={high + 1}")
        if kind in WRONG_TYPES:
            words = WRONG_TYPES[kind]
            wrong.append(f"--config.{path}={words[number % len(words)]}")
    return wrong


def by_hand(folder: pathlib.Path) -> list[list[str]]:
    """Names, values, files and fields that contradict each other. The folder gets files to name."""
    files = {
        "syntax.py": "def get_config(:\n",
        "raises.py": "def get_config():\n    raise KeyError('a')\n",
        "none.py": "def get_config():\n    return None\n",
        "dict.py": "def get_config():\n    return {'workdir': 'x'}\n",
        "takes.py": "def get_config(variant):\n    return variant\n",
        "without.py": "seed = 1\n",
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "bad.jsonl": "{\n" * 9,
        "array.jsonl": '[{"prompt": "a", "chosen": "b", "rejected": "c"}]\n',
        "rows.txt": "a\n",
        "cut.jsonl.gz": "\x1f\u008b\x08",
        "cut.parquet": "PAR1",
        "loop.jinja": "{{ messages",
    }
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    (folder / "binary.py").write_bytes(bytes(range(256)))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text('{"model_type": ')
    flags = NAMES + VALUES + CONTRADICTIONS + [f"--config.{field}=1000000000" for field in ABSURD.split()]
    flags += [f"--config.{line}".replace("DIR", str(folder)) for line in FILES.split()]
    flags += [f"--config={folder / name}" for name in files if name.endswith(".py")]
    flags += [f"--config={folder}", f"--config={folder / 'binary.py'}", "--config=", "--config=configs/absent.py"]
    flags += ["--config=configs/quickstart.py:nonsense", "--config=configs/base.py:nonsense"]
    return [flag.split(" ") for flag in flags]


NAMES = [
    "--config.sera.keep_fractoin=1",
    "--config.beta=1",
    "--config.seed.x=1",
    "--config.=1",
    "--config..seed=1",
    "--config.train=3",
    "--config.train.=3",
    "--config.Train.batch_size=3",
    "--config.train.batch_size",
    "--config.train.batch_size 3 4",
    "--config.train.__class__=3",
    "config.seed=1",
    "seed=1",
    "--confg.seed=1",
    "--seed=1",
    "--config.seed==1",
    "--config.método=sera",
]
VALUES = [
    "--config.seed=None",
    "--config.seed=" + "9" * 400,
    "--config.seed=" + "9" * 5000,
    "--config.train.learning_rate=1e999",
    "--config.train.learning_rate=-1e-6",
    "--config.train.learning_rate=1e-400",
    "--config.train.batch_size=" + "9" * 30,
    "--config.method=nonsense",
    "--config.method=",
    "--config.method=SERA",
    "--config.loss.name=nonsense",
    "--config.loss.name=",
    "--config.loss.beta=x",
    "--config.loss.beta=-1",
    "--config.loss.beta=nan",
    "--config.loss.label_smoothing=0.5",
    "--config.loss.logp_reduction=nonsense",
    "--config.sera.arms=",
    "--config.sera.arms=nonsense",
    "--config.sera.arms=sera,sera",
    "--config.ppo.arms=sera",
    "--config.online.arms=sera",
    "--config.sera.band=0.5,0.2",
    "--config.sera.band=x",
    "--config.sera.band=(0.1,)",
    "--config.sera.threshold=x",
    "--config.ppo.target_kl=0",
    "--config.reward.clip=0",
    "--config.mesh.data=0",
    "--config.mesh.data=-2",
    "--config.mesh.data=1000",
    "--config.mesh.data=-1",
    "--config.workdir=",
    "--config.workdir=" + "x" * 300,
    "--config.eval.answer_pattern=(",
    "--config.eval.answer_pattern=a",
    "--config.eval.answer_pattern=(a)(b)",
]
CONTRADICTIONS = [
    "--config.sampling.min_new_tokens=300",
    "--config.data.max_prompt_length=1536",
    "--config.sampling.max_new_tokens=1000",
    "--config.sera.selection=threshold",
    "--config.sera.threshold=1",
    "--config.sera.selection=middle --config.sera.band=0.9,0.1",
    "--config.loss.tau=0.1",
    "--config.loss.name=simpo --config.loss.tau=1",
    "--config.sft.logits_chunk_tokens=7",
    "--config.world.name=habits",
    "--config.data.train=",
    "--config.method=srppo",
    "--config.method=srppo --config.data.train=",
    "--config.model.num_attention_heads=3",
    "--config.model.head_dim=33",
    "--config.model.max_position_embeddings=64",
    "--config.model.vocab_size=0",
    "--config.model.vocab_size=5",
]
ABSURD = """
    sampling.slots sampling.max_new_tokens eval.max_new_tokens sera.num_samples data.row_tokens data.row_multiple
    data.max_prompt_length data.max_completion_length model.hidden_size model.intermediate_size model.num_hidden_layers
    model.num_attention_heads model.head_dim model.vocab_size train.gradient_accumulation_steps mesh.tensor
"""
FILES = """
    data.train=absent.jsonl data.train=DIR data.train=DIR/model data.train=DIR/empty.jsonl data.train=DIR/blank.jsonl
    data.train=DIR/bad.jsonl data.train=DIR/array.jsonl data.train=DIR/rows.txt data.train=DIR/cut.jsonl.gz
    data.train=DIR/cut.parquet data.train=tfds:nonsense data.train=s3://bucket/rows.jsonl data.train=, data.train=/
    data.train=DIR/bad.jsonl=0 data.train=DIR/bad.jsonl=x data.train=DIR/bad.jsonl=-1 data.train=DIR/bad.jsonl=nan
    data.train=DIR/bad.jsonl,DIR/bad.jsonl data.eval=absent.jsonl data.demonstrations=absent.jsonl
    data.prompts=DIR/rows.txt data.pretrain=DIR/bad.jsonl data.chat_template=absent.jinja data.chat_template=DIR
    data.chat_template=DIR/loop.jinja model.model_name_or_path=absent model.model_name_or_path=DIR
    model.model_name_or_path=DIR/rows.txt model.model_name_or_path=DIR/model model.model_name_or_path=DIR/half
    model.sft_model_path=absent model.tokenizer_name_or_path=absent model.tokenizer_name_or_path=DIR
    model.tokenizer_name_or_path=DIR/rows.txt workdir=DIR/rows.txt workdir=DIR/rows.txt/below workdir=/proc/nonsense
"""
