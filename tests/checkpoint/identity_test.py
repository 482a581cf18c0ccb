"""A work directory is of one identity: every field of a config belongs to it, but those that change no result."""

import dataclasses
import json
import typing

import pytest

from sera_jax.checkpoint import StaleWorkdir, Workdir
from sera_jax.config import Config, to_dict
from sera_jax.config.identity import ANY_VALUE, FREE, is_identity
from sera_jax.config.parsing import CHOICES

MAY_CHANGE = {
    "workdir",
    "data.benchmarks",
    "model.attn_implementation",
    *(f"mesh.{axis}" for axis in ("data", "fsdp", "tensor", "decode_tensor")),
    *(f"log.{field}" for field in ("logging_steps", "rollout_iterations", "tensorboard", "report", "hf_export")),
    "log.keep_states",
}


def leaves(group, prefix=""):
    """(path, value) of every leaf of a config."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


FIELDS = dict(leaves(Config(workdir="runs/x")))


def another(field):
    """A config that differs from the default one in this field alone, by a value of its type."""
    value = FIELDS[field]
    if value is None:
        group, name = field.split(".")
        kind = typing.get_type_hints(type(getattr(Config(), group)))[name]
        value = {"float": 0.5, "str": "sum"}.get(typing.get_args(kind)[0].__name__, (0.1, 0.9))
    elif field in CHOICES:
        value = next((choice for choice in CHOICES[field] if choice != value), f"{value}2")
    elif isinstance(value, bool):
        value = not value
    elif isinstance(value, int | float):
        value = value + 1
    else:
        value = f"{value}2" if isinstance(value, str) else value[:-1] or (*value, "daa")
    return changed(Config(workdir="runs/x"), field, value)


def changed(group, path, value):
    name, _, rest = path.partition(".")
    return dataclasses.replace(group, **{name: changed(getattr(group, name), rest, value) if rest else value})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A work directory of the default config with a finished phase."""
    root = tmp_path_factory.mktemp("run")
    Workdir(root, to_dict(Config(workdir="runs/x"))).phase("one", {}, lambda folder: None)
    return root


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_changed_is_accepted_and_said_or_refused_by_name(root, field):
    config = to_dict(another(field))
    assert config != to_dict(Config(workdir="runs/x"))
    before = (root / "config.json").read_bytes()
    if field in MAY_CHANGE:
        workdir = Workdir(root, config)
        workdir.begin()
        saved = json.loads((root / "config.json").read_text())
        assert saved == json.loads(json.dumps({k: v for k, v in config.items() if k != "workdir"})), "the newest"
        was, now = (json.loads(json.dumps(value)) for value in (FIELDS[field], dict(leaves(another(field)))[field]))
        said = [f"config: {field} was {was!r}, now {now!r} (no part of the run's identity)"]
        assert workdir.notes == ([] if field == "workdir" else said)
        Workdir(root, to_dict(Config(workdir="runs/x"))).begin()
    else:
        with pytest.raises(StaleWorkdir, match=rf"\(1 fields differ: {field}: .* there, .* now\)"):
            Workdir(root, config)
    assert (root / "config.json").read_bytes() == before


def test_fields_that_may_change_do_not_hide_one_that_may_not(root):
    config = changed(another("mesh.fsdp"), "train.batch_size", 8)
    with pytest.raises(StaleWorkdir, match=r"\(1 fields differ: train.batch_size: 64 there, 8 now\)"):
        Workdir(root, to_dict(config))


def test_the_table_names_what_there_is():
    groups = {field.split(".")[0] for field in FIELDS}
    assert set(FREE) - groups - set(FIELDS) == {"tensor"}, "the flag of the evaluation command"
    assert {field for field in FIELDS if not is_identity(field)} | set(ANY_VALUE) == MAY_CHANGE
