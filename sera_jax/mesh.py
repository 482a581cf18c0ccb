"""Device meshes, the one table of sharding rules, and the way of host values onto a mesh and back.

Axes: `data` (copies of the parameters), `fsdp` (parameters and
optimiser state split, gathered where used), `tensor` (heads, hidden units of the feed-forward and vocabulary split).
Rows are split over `data` and `fsdp` together.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sera_jax import hosts

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")

_RULES: tuple[tuple[str, P], ...] = (
    (r"embed", P("tensor", "fsdp")),  # [V, D]
    (r"head", P("fsdp", "tensor")),  # [D, V]
    (r"final_norm/(scale|bias)", P(None)),  # [D]
    (r"layers/(?:block|last)/\w+_norm/(scale|bias)", P(None, None)),  # [L, D], or a head's [L, d]
    (r"layers/(?:block|last)/(q|k|v|gate|up)/bias", P(None, "tensor")),  # [L, out]
    (r"layers/(?:block|last)/(o|down)/bias", P(None, None)),  # [L, D]
    (r"layers/(?:block|last)/(q|k|v|gate|up)/kernel", P(None, "fsdp", "tensor")),  # [L, D, out]
    (r"layers/(?:block|last)/(o|down)/kernel", P(None, "tensor", "fsdp")),  # [L, in, D]
    (r"value_head", P(None)),  # [D], of a critic
)


def _of_adapters(pattern: str, spec: P) -> list[tuple[str, P]]:
    """The rules of the adapters beside a kernel [L, in, out]: its axes, and a whole rank."""
    if not pattern.endswith("/kernel"):
        return []
    beside = pattern.removesuffix("kernel")
    return [
        (f"{beside}lora_a", P(spec[0], spec[1], None)),
        (f"{beside}lora_b", P(spec[0], None, spec[2])),
        (f"{beside}lora_key", P(None, None)),  # [L, 2], within an update that drops
    ]


# (pattern of the whole parameter path, how its axes lie on the mesh). Every parameter matches exactly one rule.
RULES = (*_RULES, *(rule for of_kernel in _RULES for rule in _of_adapters(*of_kernel)))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes (data, fsdp, tensor), all of them left to the compiler (`AxisType.Auto`).

    Args:
        data, fsdp, tensor: sizes; at most one of them may be -1 for "what the others leave".
        devices: the jax devices to use; default all.

    Raises:
        ValueError: the sizes do not multiply to the number of devices, or part a copy over several slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    grid = device_grid(mesh_shape(data, fsdp, tensor, len(devices)), devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices [data, fsdp, tensor], near ones side by side; of several slices of TPUs each holds whole copies, so
    that nothing but sums of gradients crosses the network between them.

    Raises:
        ValueError: `data` is no multiple of the number of slices.
    """
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(_slice_of(device), []).append(device)
    data, *within = shape
    if data % len(slices):
        raise ValueError(
            f"mesh.data={data} with {len(slices)} slices of {len(slices[min(slices)])} chips: fsdp and tensor exchange "
            "too much to go from slice to slice, so each slice holds whole copies; set --config.mesh.data to "
            f"{len(slices)} or a multiple of it"
        )
    of_slice = (data // len(slices), *within)
    grids = [mesh_utils.create_device_mesh(of_slice, slices[i], allow_split_physical_axes=True) for i in sorted(slices)]
    return np.concatenate(grids)


def devices_of_a_slice(mesh: Mesh) -> int:
    """How many devices are near one another: all, but of several slices of TPUs."""
    return mesh.size // len({_slice_of(device) for device in mesh.devices.flat})


def _slice_of(device: Any) -> int:
    """The slice of TPUs; GPUs, whose slices are hosts, count as one."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def decoding_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices in the same order, `tensor` of them for each part of a weight and the rest for `data`.

    Nothing lies over `fsdp`: what does is gathered where it is used, which in decoding is once for every token.
    """
    return Mesh(mesh.devices.reshape(-1, 1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(data: int, fsdp: int, tensor: int, device_count: int) -> tuple[int, int, int]:
    """The sizes with -1 filled in. Raises ValueError where they do not multiply to `device_count`."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"mesh.{name}={size}: give a size of at least 1, or -1 for what the other axes leave")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {shown}: only one axis may be -1; give a size for {' or '.join(free)}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free and device_count % known == 0:
        sizes[free[0]] = device_count // known
    elif free or known != device_count:
        raise ValueError(
            f"mesh {shown}: sizes multiply to {known}, which does not "
            f"{'divide' if free else 'equal'} the {device_count} devices; change a size or set one to -1"
        )
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole value on every device."""
    return NamedSharding(mesh, P())


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis R (or B) split over data and fsdp together; every later axis whole."""
    return NamedSharding(mesh, P(ROW_AXES))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many parts `rows_sharding` makes; R must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def param_shardings(mesh: Mesh, abstract_params: Any) -> Any:
    """A NamedSharding for every parameter, from `RULES`.

    Args:
        abstract_params: the parameters or their shapes (`models.decoder.abstract_params`).

    Returns:
        The same tree with NamedSharding leaves.

    Raises:
        ValueError: a parameter matches no rule or several, or an axis is not divisible by its mesh axis.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _sharding(mesh, path_name(path), leaf), abstract_params)


def placed_shapes(mesh: Mesh, abstract_params: Any) -> Any:
    """The shapes of the parameters, each with its sharding from `RULES`: where they lie before they are there.

    Raises:
        ValueError: as `param_shardings`.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params,
        param_shardings(mesh, abstract_params),
    )


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """A NamedSharding for every leaf of a training state or of an optimiser state alone.

    What lies under `params` follows `param_shardings`. Elsewhere a leaf whose path ends in a parameter's path, and
    which has as many axes, lies as that parameter does (moments of AdamW and Lion, accumulated gradients). All else
    is replicated: counters, and Adafactor's factored statistics, which are vectors beside the matrices they stand for.

    Raises:
        ValueError: as `param_shardings`.
    """
    whole = replicated(mesh)

    def find(path: tuple, leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        if parts[0] == "params":
            return _sharding(mesh, "/".join(parts[1:]), leaf)
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            if rules := _matching_rules(name):
                return _sharding(mesh, name, leaf) if len(rules[0][1]) == len(leaf.shape) else whole
        return whole

    return jax.tree_util.tree_map_with_path(find, abstract_state)


def host_to_global(tree: Any, shardings: Any) -> Any:
    """Put host values (numpy) onto the mesh, explicitly, so that it passes a transfer guard.

    Every process must hold the whole value of every leaf; each keeps the parts its own devices need.

    Args:
        tree: a pytree of arrays.
        shardings: one sharding for all leaves, or a tree of them that is a prefix of `tree`.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(sharding: NamedSharding, part: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index]), part
        )

    return jax.tree.map(place, shardings, tree, is_leaf=lambda x: isinstance(x, NamedSharding))


def meet(mesh: Mesh) -> None:
    """Of several processes: let their devices find each other, in every group that programs add over.

    On CPUs each waits 30 seconds for that, and the first program may take one process that much longer to compile than
    another.
    """
    if hosts.count() == 1:
        return
    axes = [axis for axis in AXES if mesh.shape[axis] > 1]
    for names in (group for size in range(1, len(axes) + 1) for group in itertools.combinations(axes, size)):
        add = jax.shard_map(lambda x, names=names: jax.lax.psum(x, names), mesh=mesh, in_specs=P(names), out_specs=P())
        ones = host_to_global(np.ones(math.prod(mesh.shape[name] for name in names)), NamedSharding(mesh, P(names)))
        compiled = jax.jit(add).lower(ones).compile()
        hosts.barrier()
        jax.block_until_ready(compiled(ones))
    hosts.barrier()
    multihost_utils.sync_global_devices("sera_jax")  # a group of its own, which orbax uses


def fetch(tree: Any) -> Any:
    """The tree on the host, as `jax.device_get`, also of arrays whose parts lie with other processes: every process
    gets the whole of each, and all must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(x: Any) -> Any:
        apart = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if apart else x

    return jax.device_get(jax.tree.map(whole, tree))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Inside a jitted step under `jax.set_mesh`, keep activations [R, ...] split by rows; elsewhere do nothing.

    Without it the compiler may follow the parameters instead: it splits the hidden axis, copies the rows to all
    devices and moves activations to and fro. A leading axis that the row shards do not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % row_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, P(ROW_AXES))


def constrain_layers(stacked: Any) -> Any:
    """Stacked parameters of the layers, as they were made of what `RULES` lay: they lie alike, and are gathered in the
    dtype that they are in now. Where no mesh is set, or sizes do not fit it, nothing is done."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return stacked

    def constrain(path: tuple, x: jax.Array) -> jax.Array:
        spec = _matching_rules(f"layers/block/{path_name(path)}")[0][1]
        fits = all(axis is None or size % mesh.shape[axis] == 0 for size, axis in zip(x.shape, spec, strict=True))
        return jax.lax.with_sharding_constraint(x, spec) if fits else x

    return jax.tree_util.tree_map_with_path(constrain, stacked)


def constrain_table(table: jax.Array) -> jax.Array:
    """Gather an embedding table [V, D] over `fsdp` before rows look things up in it, as `constrain_rows` does.

    Looked up while its D is split, it would give activations split along D, which cost more to move than the table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or table.shape[0] % mesh.shape["tensor"]:
        return table
    return jax.lax.with_sharding_constraint(table, P("tensor", None))


def rows_of_a_device(rows: int) -> int | None:
    """How many of the rows lie on each device where they are split over several; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty else row_shards(mesh)
    return None if count == 1 or rows % count else rows // count


def row_copies(matrix: jax.Array, rows: int) -> jax.Array:
    """A matrix [D, V] that rows are multiplied by in a loop: [n, D, V], one for each of the `n` devices over which so
    many rows lie split; as it is where they do not.

    So it is gathered once, and its gradient added up over devices once; else both are done in each step of the loop.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if rows_of_a_device(rows) is None:
        return matrix
    copies = jnp.broadcast_to(matrix, (row_shards(mesh), *matrix.shape))
    vocabulary = None if matrix.shape[1] % mesh.shape["tensor"] else "tensor"
    return jax.lax.with_sharding_constraint(copies, P(ROW_AXES, None, vocabulary))


def constrain_choice(logits: jax.Array) -> jax.Array:
    """Logits [S, V] of a step of decoding, made where the parts of the head lie, and then each slot's on one device.

    Otherwise the compiler gathers the head, or adds over the vocabulary in every step of choosing a token.
    """
    mesh = jax.sharding.get_abstract_mesh()
    slots, vocabulary = logits.shape
    if mesh.empty or mesh.shape["tensor"] == 1 or vocabulary % mesh.shape["tensor"]:
        return logits
    rows = ROW_AXES if slots % row_shards(mesh) == 0 else None
    logits = jax.lax.with_sharding_constraint(logits, P(rows, "tensor"))
    return logits if slots % mesh.size else jax.lax.with_sharding_constraint(logits, P(AXES))


def path_name(path: tuple) -> str:
    """A key path of jax.tree_util as `layers/block/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _matching_rules(name: str) -> list[tuple[str, P]]:
    return [(pattern, spec) for pattern, spec in RULES if re.fullmatch(pattern, name)]


def _sharding(mesh: Mesh, name: str, leaf: Any) -> NamedSharding:
    matches = _matching_rules(name)
    if len(matches) != 1:
        found = "no rule" if not matches else "the rules " + ", ".join(repr(pattern) for pattern, _ in matches)
        raise ValueError(
            f"parameter {name} of shape {tuple(leaf.shape)} matches {found} of mesh.RULES; it must match exactly one: "
            "add or narrow a rule"
        )
    spec = matches[0][1]
    if len(spec) != len(leaf.shape):
        raise ValueError(f"parameter {name} has shape {tuple(leaf.shape)} but its rule {spec} has {len(spec)} axes")
    for size, axis in zip(leaf.shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"parameter {name} of shape {tuple(leaf.shape)}: its axis of size {size} is not divisible by "
                f"mesh.{axis}={mesh.shape[axis]}; choose one that divides it, or change that size of the model"
            )
    return NamedSharding(mesh, spec)
