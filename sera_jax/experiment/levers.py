"""The fields that make a phase smaller, and the search for the least change of one that makes it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sera_jax.aot.measure import Row, measure_all
from sera_jax.aot.programs import Program
from sera_jax.aot.topology import Topology
from sera_jax.config import Config, to_config_dict
from sera_jax.experiment.ahead import programs_of
from sera_jax.experiment.methods import parse
from sera_jax.ops.logprob import MOST_TOKENS

LEAST_CHUNK = 128


@dataclasses.dataclass(frozen=True)
class Change:
    """A field and the value that makes the phases fit. `rows`: these phases with it."""

    field: str
    value: Any
    rows: Sequence[Row]


def search(
    config: Config, topology: Topology, failing: Sequence[Program], say: Callable[[str], None]
) -> tuple[list[Change], list[str]]:
    """The changes that make the failing phases fit, and those phases that none does.

    Each phase names its levers; phases with the same are dealt with together, and a later group is looked at with the
    changes of the earlier. A try is a compilation of the phases at hand, unless their arguments are too much already.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for program in failing:
        groups.setdefault(program.levers, []).append(program.name)
    changes, stuck = [], []
    for levers, names in groups.items():
        found = next(filter(None, (_least(config, topology, lever, names, say) for lever in levers)), None)
        if found is None:
            stuck += names
            continue
        changes.append(found)
        config = _with(config, found.field, found.value)
    return changes, stuck


def _least(
    config: Config, topology: Topology, field: str, names: Sequence[str], say: Callable[[str], None]
) -> Change | None:
    """The least change of a field by which these phases fit; None where none does."""
    values = [value for value in smaller(config, field, len(topology.devices)) if _is_config(config, field, value)]
    tried: dict[int, list[Row]] = {}

    def fits(place: int) -> bool:
        if place not in tried:
            say(f"trying --config.{field}={values[place]}")
            programs, mesh, _ = programs_of(_with(config, field, values[place]), topology)
            tried[place] = measure_all(programs, topology, mesh, wanted=lambda name: name in names, cheap=True)
        return all(row.fits for row in tried[place])

    if not values or not fits(len(values) - 1):
        return None
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return Change(field, values[low], tried[low])


def smaller(config: Config, field: str, devices: int) -> list[int]:
    """Values of a field that take less and less memory. Powers of two, and for slots and rows also three quarters."""
    group, name = field.split(".")
    now, data = getattr(getattr(config, group), name), config.data
    if name == "gradient_accumulation_steps":
        most = max(1, getattr(config, group).batch_size // min(devices, getattr(config, group).batch_size))
        return [parts for parts in _doublings(max(now, 1), most) if parts > now]
    if name == "logits_chunk_tokens":
        return [value for value in _halvings(now or MOST_TOKENS) if value >= LEAST_CHUNK]
    if name == "row_tokens":
        answer = max(data.max_completion_length, config.sampling.max_new_tokens)
        least = data.max_prompt_length * (1 if data.share_prompt else 2) + 2 * answer
        return [value for value in _with_quarters(now) if value >= least]
    return [value for value in _with_quarters(now) if now % devices or value % devices == 0]


def _doublings(now: int, most: int) -> list[int]:
    return [now * 2**power for power in range(1, 32) if now * 2**power <= most]


def _halvings(now: int) -> list[int]:
    return [now >> power for power in range(1, now.bit_length())]


def _with_quarters(now: int) -> list[int]:
    """3/4, 1/2, 3/8, 1/4 and so on of it."""
    values = {now * share >> power for power in range(2, now.bit_length() + 2) for share in (2, 3)}
    return sorted((value for value in values if 0 < value < now), reverse=True)


def _with(config: Config, field: str, value: Any) -> Config:
    group, name = field.split(".")
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})


def _is_config(config: Config, field: str, value: Any) -> bool:
    """Whether the rules of fields allow it."""
    try:
        parse(to_config_dict(_with(config, field, value)))
    except ValueError:
        return False
    return True
