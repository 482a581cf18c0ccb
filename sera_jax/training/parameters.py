"""Parameters of a model, from wherever they come, each laid on its shards before any program sees it."""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding

from sera_jax.checkpoint import load_tree
from sera_jax.mesh import host_to_global, param_shardings, placed_shapes
from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import critic_params
from sera_jax.models.decoder import Params, abstract_params, init_params
from sera_jax.models.families import mathematics
from sera_jax.models.huggingface import load_pretrained
from sera_jax.models.lora import Lora, init_adapters
from sera_jax.models.parts import merge
from sera_jax.models.peft import load_adapter
from sera_jax.models.trained import ALL, Trained

Origin = jax.Array | str | os.PathLike


def load_params(cfg: ModelConfig, mesh: Mesh, origin: Origin) -> Params:
    """The parameters of `origin`, on the mesh by its rules: a device is given its own part of each and no more.

    Args:
        cfg: the model; its `param_dtype` is that of the parameters.
        origin: a random key, for fresh ones; a folder that `checkpoint.load_tree` reads; or a Hugging Face folder of
            that model.

    Raises:
        ValueError, FileNotFoundError: as `load_tree` and `load_pretrained`; a sharding rule that does not fit.
    """
    if isinstance(origin, jax.Array):
        return jax.tree.map(lambda draw: draw(origin), drawing(cfg, mesh, origin))
    folder = pathlib.Path(origin)
    if not (folder / "config.json").is_file():
        return load_tree(folder, placed_shapes(mesh, abstract_params(cfg)))
    found, params = load_pretrained(folder, mesh=mesh, param_dtype=cfg.param_dtype)
    assert mathematics(found) == mathematics(cfg), "whoever names a folder has read its config.json"
    return params


def with_fresh_adapters(mesh: Mesh, lora: Lora, params: Params, key: jax.Array) -> Params:
    """The parameters and new adapters beside them, drawn where they will lie on the mesh; leaves are shared."""
    shapes = jax.eval_shape(lambda: params)
    draw = functools.partial(init_adapters, lora, shapes)
    made = jax.jit(draw, out_shardings=param_shardings(mesh, jax.eval_shape(draw, key)))(key)
    return merge(params, made)


def load_adapters(cfg: ModelConfig, mesh: Mesh, folder: str | os.PathLike) -> tuple[Lora, Params]:
    """The adapters of a PEFT folder, on the mesh by its rules; and what they are. Raises ValueError as
    `models.peft.load_adapter`."""
    lora, adapters = load_adapter(folder, cfg)
    return lora, host_to_global(adapters, param_shardings(mesh, adapters))


def load_part(
    cfg: ModelConfig, mesh: Mesh, folder: pathlib.Path, trained: Trained = ALL, scalar: bool = False
) -> Params:
    """What was `trained` of a model of `cfg`, from a folder that `checkpoint.load_tree` reads; with `scalar`, of a
    reward model (or critic) beside it. Placed and refused as those of `load_params`."""

    def part(params: Params) -> Params:
        return trained.part(critic_params(params) if scalar else params)

    return load_tree(folder, placed_shapes(mesh, jax.eval_shape(part, abstract_params(cfg))))


def drawing(cfg: ModelConfig, mesh: Mesh, key: jax.Array) -> Params:
    """For each fresh parameter the jitted (key) -> that parameter: drawing all in one would hold the random bits of all
    at once. Of `key` only the kind is asked."""
    leaves, tree = jax.tree.flatten(placed_shapes(mesh, abstract_params(cfg)))
    # traced once; each program drops what it does not return
    draw = jaxpr_as_fun(jax.make_jaxpr(functools.partial(init_params, cfg))(key))

    def one(place: int, sharding: NamedSharding) -> Any:
        return jax.jit(lambda key: draw(key)[place], out_shardings=sharding)

    return tree.unflatten([one(place, leaf.sharding) for place, leaf in enumerate(leaves)])
