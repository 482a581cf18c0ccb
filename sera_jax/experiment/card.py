"""The model card of an export, in the hub's form: what trained the policy, on what, how it did, by which versions."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sera_jax.checkpoint.papers import file_digest, read_json
from sera_jax.data.repository import parse
from sera_jax.data.sources import content_hash, parse_mixture
from sera_jax.experiment.brought import SOURCES

_LIBRARIES = ("sera_jax", "numerics", "python", "jax", "flax", "optax", "numpy", "transformers")
_DIGITS = 16  # of a digest


def card(root: pathlib.Path, folder: pathlib.Path) -> str:
    """README.md of the policy in `folder`, of the work directory `root`; what cannot be known is left out or said so.

    Metrics are given where the run is finished and the policy is the one that an arm ended with.
    """
    run, summary = read_json(root / "config.json"), read_json(root / "summary.json")
    history = read_json(root / "versions.json").get("history") or [{}]
    name = folder.relative_to(root / "phases") if folder.is_relative_to(root / "phases") else folder
    hub = summary.get("hub") or read_json(root / "hub.json")
    parts = [
        f"---\n{json.dumps(_head(run, hub), indent=1)}\n---",  # JSON is YAML
        f"# {name.as_posix()} of a run of sera_jax",
        _table("Training", _training(run, hub)),
        _table("Data", _data(run, hub)),
    ]
    if measured := _metrics(summary, folder):
        parts.append(_table("Held-out metrics", measured))
    versions = {name: history[-1][name] for name in _LIBRARIES if name in history[-1]}
    return "\n\n".join([*parts, _table("Versions", versions)]) + "\n"


def _head(run: Mapping[str, Any], hub: Mapping[str, str]) -> dict[str, Any]:
    """What the hub reads of a card."""
    bases, sets = (
        [key.removeprefix(kind).split("@")[0] for key in hub if key.startswith(kind)]
        for kind in ("model ", "data set ")
    )
    tags = ["sera_jax", run.get("method"), (run.get("loss") or {}).get("name")]
    return {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [tag for tag in tags if tag],
        **({"base_model": bases[0]} if bases else {}),
        **({"datasets": sets} if sets else {}),
    }


def _training(run: Mapping[str, Any], hub: Mapping[str, str]) -> dict[str, Any]:
    model, loss, train = (run.get(group) or {} for group in ("model", "loss", "train"))
    settings = ", ".join(f"{key}={value}" for key, value in loss.items() if key != "name" and value is not None)
    base = model.get("model_name_or_path") or "none: trained from scratch"
    commits = [commit for key, commit in hub.items() if key.removeprefix("model ").split("@")[0] == base.split("@")[0]]
    fields = ("learning_rate", "batch_size", "optim", "max_steps", "num_train_epochs")
    facts = {
        "method": run.get("method"),
        "base model": f"{base}{f' at commit {commits[0]}' if commits else ''}",
        "loss": f"{loss.get('name')}{f' ({settings})' if settings else ''}",
        **{f"train.{field}": train[field] for field in fields if field in train},
        "seed": run.get("seed"),
    }
    return {key: value for key, value in facts.items() if value not in (None, "")}


def _data(run: Mapping[str, Any], hub: Mapping[str, str]) -> dict[str, str]:
    """source -> the digest of its content as it lies there now, or its commit."""
    if world := (run.get("world") or {}).get("name"):
        return {f"the embedded world {world!r}": f"made from seed {run.get('seed')}"}
    found: dict[str, str] = {}
    for field in SOURCES:
        spec = (run.get("data") or {}).get(field)
        for path, weight in parse_mixture(spec, field=field) if spec else ():
            share = f" (taken {weight:g} times)" if weight != 1 else ""
            found[f"data.{field}: {path}{share}"] = _digest(path, hub)
    return found


def _digest(path: str, hub: Mapping[str, str]) -> str:
    if path.startswith("hub:"):
        return f"commit {hub.get(f'data set {parse(path)[0]}', 'not recorded')}"
    try:
        return f"sha256 {content_hash(path)[:_DIGITS]}"
    except ValueError:
        return "no longer there when this was exported"


def _metrics(summary: Mapping[str, Any], folder: pathlib.Path) -> dict[str, str]:
    sums, checksums = summary.get("params_sha256"), folder / "params" / "checksums.json"
    if not isinstance(sums, dict) or not checksums.is_file():
        return {}
    digest = file_digest(checksums)
    facts = next((summary["arms"].get(arm, {}) for arm, of_arm in sums.items() if of_arm == digest), {})
    return {key: f"{value:.4g}" for key, value in facts.items() if type(value) in (int, float)}


def _table(title: str, facts: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
