"""Programs at full size without arrays: shapes on a mesh to lower them with, and what a lowered program says."""

import re

import jax
import numpy as np

from sera_jax.aot import topology
from sera_jax.experiment.ahead import programs_of
from sera_jax.mesh import path_name


def programs_for_eight(config):
    """All programs of the run of a config on 8 devices, by name; their mesh; and the run, as the preflight plans it."""
    programs, mesh, planned = programs_of(config, topology.find("cpu:8"))
    return {program.name: program for program in programs}, mesh, planned


def lowered_by_name(programs, mesh, names):
    """These programs lowered, each given what those before it return; and their arguments."""
    made, lowered = {}, {}
    for name in names:
        with jax.set_mesh(programs[name].mesh or mesh):
            arguments = programs[name].arguments(made)
            found = programs[name].jitted.lower(*arguments)
            made[name], lowered[name] = result_of(found), (found, arguments)
    return lowered


def result_of(lowered):
    """What a lowered program returns, as shapes to lower the next program with."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), lowered.out_info)


def bytes_on_a_device(leaf):
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def argument_shardings(lowered):
    """The sharding of every array argument of a lowered program, as written in it: [{"fsdp"}, {}] and so on."""
    main = re.search(r"@main\((.*?)\) -> ", lowered.as_text(), re.DOTALL).group(1)
    return [match.group(1) if match else None for match in map(_SHARDING.search, main.split("%arg")[1:])]


_SHARDING = re.compile(r"sdy\.sharding = #sdy\.sharding<@mesh, (\[.*?\])>")


def written(sharding, ndim):
    """A NamedSharding as the lowered program writes it."""
    axes = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    names = [() if axis is None else (axis,) if isinstance(axis, str) else axis for axis in axes]
    return "[" + ", ".join("{" + ", ".join(f'"{name}"' for name in part) + "}" for part in names) + "]"


def assert_arguments_lie_as_asked(lowered, *arguments, unread=()):
    """Every argument lies on the mesh as its shape says. `unread`: last names of those that the program has no use for,
    which are dropped from it."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(arguments)}
    dropped = {name for name in leaves if name.split("/")[-1] in unread}
    assert {name.split("/")[-1] for name in dropped} == set(unread)
    read = [leaf for name, leaf in leaves.items() if name not in dropped]
    found = argument_shardings(lowered)
    assert len(found) == len(read), "an argument was dropped: nothing reads it"
    assert found == [written(leaf.sharding, len(leaf.shape)) for leaf in read]


def assert_state_returns_in_place(lowered, state, after):
    """The state that comes back (`after`) is laid out as the one that went in, in whose buffers it lies."""
    for (path, old), new in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(after), strict=True):
        assert (new.shape, new.dtype, new.sharding) == (old.shape, old.dtype, old.sharding), path
    text = lowered.as_text()
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == len(jax.tree.leaves(state))


def largest_logits(lowered, model, devices):
    """Most positions whose logits a lowered program holds at a time; 0 where it holds none."""
    found = re.findall(rf"tensor<(\d+)x(\d+)x{model.vocab_size}x", lowered.as_text())
    heads = (str(devices), str(model.hidden_size))  # a copy of the head for each device
    return max((int(rows) * int(columns) for rows, columns in found if (rows, columns) != heads), default=0)
