"""A policy: a handle to parameters on disk, all of a model's or the part that was trained."""

from __future__ import annotations

import dataclasses
import pathlib

from sera_jax.checkpoint.papers import write_json
from sera_jax.models.trained import ALL, Trained

PART = "part.json"


@dataclasses.dataclass(frozen=True)
class Policy:
    """Parameters on disk: `path/params`, and where training may go on `path/optimizer`, or `path/state` after PPO.
    `name` is the phase's. With `scalar` it is no policy but a reward model, a decoder with a scalar head, whose score
    of a response stands for a log-prob; its parameters are in `path/reward_model`. Only the parameters that were
    `trained` lie there; the rest are those of the policy that it lies `over` (None: all are there)."""

    name: str
    path: pathlib.Path
    digest: str
    scalar: bool = False
    trained: Trained = ALL
    over: Policy | None = None


def part_of(scalar: bool) -> str:
    """The folder of a phase that holds the parameters."""
    return "reward_model" if scalar else "params"


def write_part(folder: pathlib.Path, trained: Trained, over: Policy | None) -> None:
    """Beside a policy that is a part of a model: what it is, and the phase that it lies over."""
    if over is not None:
        write_json(folder / PART, {"over": over.name, **dataclasses.asdict(trained)})
