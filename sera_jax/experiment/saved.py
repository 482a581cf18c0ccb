"""Policies on disk, for the entries that do not train: a phase of a work directory, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from sera_jax.checkpoint import load_tree
from sera_jax.checkpoint.phases import write_json
from sera_jax.mesh import host_to_global, param_shardings
from sera_jax.models.config import ModelConfig, RopeScaling
from sera_jax.models.decoder import Params, abstract_params
from sera_jax.models.huggingface import load_pretrained


def describe(root: pathlib.Path, cfg: ModelConfig, tokenizer_dir: str) -> None:
    """Write `model.json`, with which every policy of a work directory can be opened."""
    write_json(root / "model.json", {"model": dataclasses.asdict(cfg), "tokenizer_dir": tokenizer_dir})


def open_policy(path: str, mesh: Mesh, **precision: Any) -> tuple[ModelConfig, Params, str]:
    """Parameters on the mesh, with their shape and their tokenizer's folder.

    Args:
        path: `WORKDIR/phases/NAME` (for instance runs/quickstart/phases/sera/round3), or a Hugging Face folder.
        precision: ModelConfig fields such as dtype, for a Hugging Face folder.

    Raises:
        ValueError: neither is there; the message lists the policies of a work directory.
    """
    folder = pathlib.Path(path)
    if (folder / "params" / "checksums.json").exists():
        root = next((p for p in folder.absolute().parents if (p / "model.json").exists()), None)
        if root is None:
            raise ValueError(f"no model.json above {folder}; open a policy where its run wrote it")
        saved = json.loads((root / "model.json").read_text())
        cfg = _model_config(saved["model"])
        shapes = abstract_params(cfg)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            param_shardings(mesh, shapes),
        )
        return cfg, load_tree(folder / "params", target), saved["tokenizer_dir"]
    if (folder / "config.json").exists() and list(folder.glob("*.safetensors")):
        cfg, params = load_pretrained(folder, **precision)
        return cfg, host_to_global(params, param_shardings(mesh, params)), str(folder)
    found = sorted(str(p.parent.parent) for p in folder.rglob("params/checksums.json"))
    hint = f"; policies below it: {', '.join(found[:8])}" if found else ""
    raise ValueError(
        f"{path!r} is neither a policy of a work directory (WORKDIR/phases/NAME) nor a Hugging Face folder "
        f"(config.json and *.safetensors){hint}"
    )


def _model_config(fields: dict[str, Any]) -> ModelConfig:
    scaling = fields["rope_scaling"]
    return ModelConfig(**fields | {"rope_scaling": RopeScaling(**scaling) if scaling else None})
