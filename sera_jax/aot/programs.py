"""The programs of a run as data: which jitted function, on which shapes, beside what, how often.

The functions are the run's own (`update_programs`, `Runtime.scorer`, `make_programs`, `sampling.decode.programs`), so
what is looked at ahead of time cannot drift from what a run compiles.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax.aot import flops
from sera_jax.core import Rows
from sera_jax.data.items import Item
from sera_jax.data.packing import laid_tokens
from sera_jax.loops.optimise import Training, update_programs
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.mesh import ROW_AXES, placed_shapes, rows_sharding
from sera_jax.models.activations import activation_bytes
from sera_jax.models.critic import without_output
from sera_jax.models.decoder import Params, abstract_params
from sera_jax.models.parts import nested, paths
from sera_jax.models.trained import Trained, adapted_shapes, laid_over
from sera_jax.ops.logprob import default_tokens
from sera_jax.training.parameters import drawing

Made = Mapping[str, Any]  # what the programs so far return, as shapes on the mesh, by their names
Beside = Mapping[str, Any]  # arrays, as shapes on the mesh, that are alive meanwhile, by what they are
NOTHING: Beside = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a run.

    Attributes:
        name: the phase, and what of it.
        jitted: the function. arguments: what it is lowered with; dynamic ones are shapes on the mesh.
        calls: how often the run calls it; of a decoder, its steps.
        flops: useful ones of a call, on all devices.
        beside: what else is in memory meanwhile.
        loops: it reads its arguments in each of its steps, and writes little of them.
        working: bytes of a device for what is alive within, roughly; for an estimate alone.
        levers: fields of the config that make it smaller, the first to be tried first.
        mesh: its own, of the same devices; None: that of the run.
    """

    name: str
    jitted: Any
    arguments: Callable[[Made], tuple]
    calls: float
    flops: float = 0.0
    beside: Callable[[Made], Beside] = lambda made: {}
    loops: bool = False
    working: float = 0.0
    levers: tuple[str, ...] = ()
    mesh: Any = None


def on_mesh(tree: Any, sharding: Any, microbatches: int = 0) -> Any:
    """Host arrays as shapes on the mesh; as microbatches [A, R / A, ...] where asked for."""

    def of(x: Any) -> jax.ShapeDtypeStruct:
        split = (microbatches, x.shape[0] // microbatches, *x.shape[1:]) if microbatches else x.shape
        return jax.ShapeDtypeStruct(split, x.dtype, sharding=sharding)

    return jax.tree.map(of, tree)


def params_on(run: Runtime) -> Params:
    """Shapes of a policy's parameters as they lie on the run's mesh, with adapters where the run trains them."""
    return placed_shapes(run.mesh, adapted_shapes(run.cfg, Trained(lora=run.lora)))


def shapes_of(run: Runtime, policy: Policy, under: Params) -> Params:
    """Shapes of a policy's parameters as they lie on the run's mesh. What it lies over are leaves of `under`: one copy
    in memory is one leaf here."""
    part = placed_shapes(run.mesh, jax.eval_shape(policy.trained.part, abstract_params(run.cfg)))
    return part if policy.over is None else laid_over(part, under)


def frozen_of(trained: Trained, model: Params) -> Params:
    """What a training leaves as it is, of a model of these shapes: leaves of it; {} where everything moves."""
    still = paths(jax.eval_shape(lambda params: trained.divide(params)[1], model))
    return nested({path: leaf for path, leaf in paths(model).items() if path in still})


def without(tree: Any, *others: Any) -> list[Any]:
    """The leaves of a tree of shapes that are not those of others, too."""
    known = set(map(id, jax.tree.leaves(others)))
    return [leaf for leaf in jax.tree.leaves(tree) if id(leaf) not in known]


def held(tree: Any, devices: int) -> int:
    """Bytes on each device; of what has no sharding, its share."""

    def of(leaf: Any) -> float:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return math.prod(leaf.shape) * leaf.dtype.itemsize / devices
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return round(sum(of(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")))


def first_parameters(run: Runtime, name: str) -> list[Program]:
    """Drawing parameters, one program for each: the largest of them, beside the others."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = placed_shapes(run.mesh, abstract_params(run.cfg))
    draws = list(zip(jax.tree.leaves(drawing(run.cfg, run.mesh, key)), jax.tree.leaves(shapes), strict=True))
    draw, largest = max(draws, key=lambda one: one[1].size)
    others = [leaf for _, leaf in draws if leaf is not largest]
    return [Program(name, draw, lambda made: (key,), len(draws), beside=lambda made: {"parameters": others})]


def training(
    run: Runtime,
    given: Training,
    group: Any,
    field: str,
    *,
    updates: float,
    times: int = 1,
    of: Params | None = None,
    beside: Beside = NOTHING,
) -> list[Program]:
    """The first state of a training and its update.

    Args:
        group: its optimiser settings, the group of the config that `field` names.
        updates: how many in the whole run, in `times` trainings.
        of: shapes of the model that a part is trained of, where others in memory share them.
        beside: what else is in memory.
    """
    made_of, batch = update_programs(run, given), given.batches(None, 1)  # type: ignore[arg-type]
    parts = run.microbatches(group, batch.tokens)
    arrays = on_mesh(batch.arrays, NamedSharding(run.mesh, P(None, ROW_AXES)), parts)
    scalar = given.target.scalar
    params = made_of.abstract.params
    frozen: tuple[Params, ...] = ()
    if not given.trained.whole:
        whole = placed_shapes(run.mesh, adapted_shapes(run.cfg, given.trained)) if of is None else of
        frozen = (frozen_of(given.trained, without_output(whole) if scalar else whole),)
    rows: Rows = getattr(batch, "rows", None) or batch.arrays.rows  # type: ignore[union-attr]
    working = gradients(run, params, parts) + activations(run, rows, parts)
    levers = (f"{field}.gradient_accumulation_steps", "train.logits_chunk_tokens", "data.row_tokens")
    return [
        Program(f"{given.name}: first state", made_of.init, lambda made: (params,), times),
        Program(
            f"{given.name}: update",
            made_of.update,
            lambda made: (made_of.abstract, arrays, *frozen),
            updates,
            flops.update(run.cfg, flops.of_rows(rows), vocabulary=not scalar, adapters=given.trained.lora is not None),
            beside=lambda made: beside,
            working=working,
            levers=levers,
        ),
    ]


def gradients(run: Runtime, params: Params, parts: int) -> float:
    """Bytes of float32 gradients on a device: of a microbatch, and their sum."""
    as_float32 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), params)
    return held(as_float32, run.mesh.size) * (2 if parts > 1 else 1)


def activations(run: Runtime, rows: Rows, parts: int) -> float:
    """Bytes that the layers keep of a microbatch on an accelerator, a layer's gathered weights, those of the
    head, and logits."""
    count, length = rows.tokens.shape
    each = count / parts / run.layout.shards
    size = jnp.dtype(run.cfg.dtype).itemsize
    tokens = run.chunk_tokens or default_tokens(run.cfg.vocab_size, "cuda")
    vocabulary = run.cfg.vocab_size / run.mesh.shape["tensor"]
    head = 2 * size * run.cfg.hidden_size * vocabulary if run.layout.shards > 1 else 0  # a copy, and its gradient
    logits = 3 * 4 * tokens * vocabulary
    return each * activation_bytes(run.cfg, length) + 2 * size * run.cfg.layer_parameters + head + logits


def scoring(
    run: Runtime,
    name: str,
    item: Item,
    *,
    count: float,
    params: Params | None = None,
    scalar: bool = False,
    beside: Beside = NOTHING,
) -> Program:
    """Scoring `count` items like this one, in phases of their own."""
    in_a_row = run.layout.row_tokens // laid_tokens(item, run.layout.share_prompt)
    rows = run.batches_to_score([item] * in_a_row)[0].rows  # one of them is full, as all are meant to be
    size = rows.tokens.shape[0]
    given = params_on(run) if params is None else params
    return Program(
        name,
        run.scorer(run.layout.window([item]), scalar),
        lambda made: (given, on_mesh(rows, rows_sharding(run.mesh))),
        math.ceil(count / in_a_row / size),
        flops.forward(run.cfg, flops.of_rows(rows).times(size), vocabulary=not scalar),
        beside=lambda made: beside,
        working=activations(run, rows, 1) / run.cfg.num_hidden_layers,
        levers=("train.logits_chunk_tokens", "data.row_tokens"),
    )


def full_items(count: int, prompt: int, *responses: int) -> list[Item]:
    """Items of these lengths, each with a prompt of its own."""
    return [
        Item(str(i), np.full(prompt, i, np.int32), tuple(np.ones(length, np.int32) for length in responses))
        for i in range(count)
    ]
