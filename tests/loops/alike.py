"""What a run on several devices has in common with one on a single device: all but the order of sums."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from sera_jax import experiment
from sera_jax.config import Config
from sera_jax.experiment.saved import find_policy
from sera_jax.mesh import make_mesh
from tests.loops.kills import metrics, summary, texts
from tests.tolerances import DIFFER_ON_DEVICES, TOLERANCES

RTOL, ATOL = TOLERANCES["devices"]["rtol"], TOLERANCES["devices"]["atol"]


def run_on(devices: int, config: Config, **options: Any) -> dict[str, Any]:
    """`experiment.run` on so many of this process's devices."""
    mesh = make_mesh(1, devices, 1, devices=jax.devices()[:devices])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "make_mesh", lambda *_: mesh)
        return experiment.run(config, **options)


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Where two values as JSON has them differ: floats by more than the tolerance, all else at all."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = [k for k in ours.keys() | theirs.keys() if k not in DIFFER_ON_DEVICES]
        return [d for k in names for d in differences(ours.get(k), theirs.get(k), f"{place}.{k}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [d for i, pair in enumerate(zip(ours, theirs)) for d in differences(*pair, f"{place}[{i}]")]
    if isinstance(ours, float) and isinstance(theirs, float):
        same = np.isclose(ours, theirs, rtol=RTOL, atol=ATOL)
    else:
        same = ours == theirs
    return [] if same else [f"{place}: {ours!r} and {theirs!r}"]


def rows(workdir):
    """The objects of every file of texts."""
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in texts(workdir).items()}


def assert_policies_alike(workdir, whole, names):
    """What training made of each array of the policies is the same in norm."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def leaves(root, name):
        return jax.tree.leaves(jax.device_get(find_policy(root / "phases" / name).params(mesh)))

    for name in names:
        for a, b, c in zip(leaves(whole, "init"), leaves(workdir, name), leaves(whole, name), strict=True):
            assert np.linalg.norm(b - c) <= TOLERANCES["devices_moved"]["rtol"] * np.linalg.norm(c - a), name


def assert_arm_alike(workdir, whole, arm):
    """The facts, lines and texts of the arm, and of the phases before it, agree with those of a run of more arms."""
    ours, theirs = summary(workdir), summary(whole)
    for name in ("sft", arm):
        assert differences(ours["arms"][name], theirs["arms"][name], name) == []
    for key in {"rounds", "iterations"} & ours.keys():
        assert differences(*([facts for facts in s[key] if facts["arm"] == arm] for s in (ours, theirs)), key) == []
    phases = {phase for phase, *_ in metrics(workdir)}
    assert_lines_alike(workdir, whole, lambda phase, of: phase in phases and of in ("", arm))
    assert differences(*({k: v for k, v in rows(p).items() if arm in k} for p in (workdir, whole))) == []


def assert_lines_alike(workdir, whole, which=lambda phase, arm: True):
    """The lines of the log agree, of those phases and arms."""
    lines = [{str(at): line for at, line in metrics(p).items() if which(*at[:2])} for p in (workdir, whole)]
    assert differences(*lines) == []


def assert_alike(workdir, whole):
    """Summary, log, texts and policies agree within the tolerance: the same pairs and tokens, the same updates."""
    assert differences(summary(workdir), summary(whole)) == []
    assert_lines_alike(workdir, whole)
    assert differences(rows(workdir), rows(whole)) == []
    found = [path.parent.parent for path in (whole / "phases").rglob("params/checksums.json")]
    assert_policies_alike(workdir, whole, [path.relative_to(whole / "phases") for path in found])
