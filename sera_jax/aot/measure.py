"""One program ahead of time: compiled (or estimated), its peak and what lies beside it against what a device has."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sera_jax.aot.chips import GIB
from sera_jax.aot.collectives import Collective, collectives
from sera_jax.aot.executed import matmul_flops
from sera_jax.aot.programs import Program, held
from sera_jax.aot.topology import Topology

_NEEDS = re.compile(r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of a program; bytes are of a device.

    Attributes:
        name, mesh, calls: of the program; `mesh` as data x fsdp x tensor.
        peak: of the program, its arguments included. beside: what else is alive.
        limit: what a device has.
        compile_seconds: lowering included; None where nothing was compiled.
        flops: useful ones of a call, on all devices. done: those of its matmuls;
            None where a loop does not say how many trips it makes. read: bytes that a call must read or write at least.
        floor_seconds: of a call at the chip's peak and bandwidth; None where nothing is known of the chip.
        collectives: of a call.
        note: what is to be said of it.
    """

    name: str
    mesh: str
    calls: float
    peak: int
    beside: dict[str, int]
    limit: int
    compile_seconds: float | None
    flops: float
    done: float | None
    read: int
    floor_seconds: float | None
    collectives: tuple[Collective, ...] = ()
    note: str = ""

    @property
    def total(self) -> int:
        return self.peak + sum(self.beside.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    def expected_seconds(self, topology: Topology, share_of_peak: float, share_of_bandwidth: float) -> float | None:
        """Of all calls, where the chip reaches these shares of its peak and its bandwidth."""
        if topology.chip is None:
            return None
        compute = self.flops / (len(topology.devices) * topology.chip.flops * share_of_peak)
        return self.calls * max(compute, self.read / (topology.chip.bandwidth * share_of_bandwidth))


def measure(program: Program, made: dict[str, Any], topology: Topology, mesh: Mesh, *, cheap: bool = False) -> Row:
    """Compile a program for the topology, and add what it returns to `made`.

    Args:
        cheap: compile nothing where the arguments and what lies beside them alone are too much.
    """
    devices, mesh = len(topology.devices), program.mesh or mesh
    arguments = program.arguments(made)
    start = time.monotonic()
    beside = {name: held(tree, devices) for name, tree in program.beside(made).items() if tree is not None}
    given = held(arguments, devices)
    with jax.set_mesh(mesh):
        traced = program.jitted.trace(*arguments)
        lowered = traced.lower()
    out = _result(lowered.out_info)
    peak, seconds, found, note = given, None, (), ""
    if cheap and given + sum(beside.values()) > topology.limit:
        note = "its arguments alone"
    elif not topology.compiles:
        peak, note = round(given + _new(lowered, arguments, out, devices) + program.working), "estimated"
    else:
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needs = _NEEDS.search(str(error))
            if needs is None or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            peak, note = int(float(needs[1]) * _UNITS[needs[2]]), "refused by the compiler"
        else:
            peak, found = _peak(compiled, topology.devices[0].platform), tuple(collectives(compiled.as_text()))
            out = _result(lowered.out_info, compiled.output_shardings)
        seconds = time.monotonic() - start
    made[program.name] = out
    read = given if program.loops else given + held(out, devices)
    floor = None
    if topology.chip is not None:
        floor = max(program.flops / (devices * topology.chip.flops), read / topology.chip.bandwidth)
    return Row(
        name=program.name,
        mesh=" x ".join(str(size) for size in mesh.shape.values()),
        calls=program.calls,
        peak=peak,
        beside=beside,
        limit=topology.limit,
        compile_seconds=seconds,
        flops=program.flops,
        done=matmul_flops(traced.jaxpr, a_step=program.loops),
        read=read,
        floor_seconds=floor,
        collectives=found,
        note=note,
    )


def measure_all(
    programs: Sequence[Program],
    topology: Topology,
    mesh: Mesh,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    cheap: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Of programs in the order in which they need each other's results.

    Args:
        wanted: of a program's name, whether it is to be looked at. cheap: as in `measure`.
    """
    made: dict[str, Any] = {}
    rows = []
    groups = {_group(program.name) for program in programs if wanted(program.name)}
    for program in programs:
        if not wanted(program.name):
            if _group(program.name) in groups:
                made[program.name] = _only_shapes(program, made, mesh)
            continue
        rows.append(row := measure(program, made, topology, mesh, cheap=cheap))
        took = "" if row.compile_seconds is None else f", compiled in {row.compile_seconds:.0f} s"
        say(f"{row.name}: {row.total / GIB:.2f} GiB of {row.limit / GIB:.2f}{took}")
    return rows


def _group(name: str) -> str:
    """Programs of one group take each other's results."""
    return name.rpartition(": ")[0]


def _only_shapes(program: Program, made: dict[str, Any], mesh: Mesh) -> Any:
    """What a program returns, compiled only where its results lie as the compiler chooses."""
    with jax.set_mesh(program.mesh or mesh):
        lowered = program.jitted.lower(*program.arguments(made))
    out = _result(lowered.out_info)
    if all(leaf.sharding is not None for leaf in jax.tree.leaves(out)):
        return out
    return _result(lowered.out_info, lowered.compile().output_shardings)


def _result(shapes: Any, shardings: Any = None) -> Any:
    """What a program returns, as shapes on the mesh to lower the next one with."""
    if shardings is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _new(lowered: Any, arguments: tuple, out: Any, devices: int) -> int:
    """Bytes of results that lie in no donated argument's place."""
    flags = [info.donated for info in jax.tree.leaves(lowered.args_info)]
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "dtype")]
    donated = [leaf for leaf, given in zip(leaves, flags, strict=False) if given]
    return max(0, held(out, devices) - held(donated, devices))


def _peak(compiled: Any, platform: str) -> int:
    """The compiler's own peak; that of CPUs leaves temporaries out."""
    stats = compiled.memory_analysis()
    if platform != "cpu":
        return stats.peak_memory_in_bytes
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + fresh + stats.temp_size_in_bytes
