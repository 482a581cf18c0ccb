"""Devices by name, none of which need be there: `v5e:4x4` for the TPU compiler (`v5e:4x4:2`: two such slices), `cpu:8`
simulated here, `gpu:h100:8` for an estimate."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from sera_jax import memory
from sera_jax.aot.chips import GIB, GPU_SHARE, GPUS, TPUS, Chip

_TOO_LARGE = 2**42  # bytes that no chip has
_HAVE = re.compile(r"(?:exceeds available HBM \(| of )([\d.]+)G")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: as asked for. devices: of JAX; simulated ones of the CPU where they stand for GPUs.
        limit: bytes that a program may take of each.
        chip: what each can do; None for CPUs.
        compiles: there is a compiler for it; else all is estimated.
    """

    name: str
    devices: Sequence[Any]
    limit: int
    chip: Chip | None
    compiles: bool = True

    @property
    def chips(self) -> float:
        return len(self.devices) / (self.chip.devices if self.chip else 1)


def find(name: str, limit: int | None = None) -> Topology:
    """The topology of that name; to be called before JAX has started a back end, unless it has enough CPU devices.

    Args:
        limit: bytes of each device, in place of what the compiler, or the host, has.

    Raises:
        ValueError: there is no such topology, or what is needed for it is not installed.
    """
    jax.config.update("jax_platforms", "cpu")
    kind, _, rest = name.partition(":")
    if kind == "cpu" and rest.isdigit() and int(rest):
        devices = _simulated(int(rest))
        whole = memory.host_bytes() or 0
        return Topology(name, devices, limit or whole // len(devices), None)
    if kind == "gpu":
        model, _, count = rest.partition(":")
        if model in GPUS and count.isdigit() and int(count):
            have = limit or int(GPU_SHARE * GPUS[model].memory)
            return Topology(name, _simulated(int(count)), have, GPUS[model], compiles=False)
    if kind in TPUS and re.fullmatch(r"\d+x\d+(x\d+)?(:[1-9]\d*)?", rest):
        devices = _tpu(name)
        return Topology(name, devices, limit or _limit_of(devices[0]), TPUS[kind])
    raise ValueError(
        f"--topology={name!r} is unknown; give a TPU slice as v5e:4x4 or v5p:2x2x4 ({', '.join(TPUS)}), "
        "two of them as v5e:4x4:2, "
        f"cpu:8, or gpu:h100:8 ({', '.join(GPUS)}; an estimate)"
    )


def _simulated(count: int) -> list[Any]:
    asked = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if asked is None or int(asked[1]) < count:
        with contextlib.suppress(RuntimeError):  # a back end has been started, perhaps with enough
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"{count} simulated devices are asked for, but JAX has started with {len(devices)} already")
    return devices[:count]


@functools.cache  # two descriptions of one topology have different devices
def _tpu(name: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={name}: the TPU compiler, the package libtpu, is not installed; it needs no TPU: "
            "pip install libtpu (requirements-preflight.txt has the release that belongs to this JAX)"
        )
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_enable_compilation_cache", False)  # knows no topologies
    kind, shape, *slices = name.split(":")
    how: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    sizes = [int(size) for size in shape.split("x")]
    if math.prod(sizes) < 4:
        how["chips_per_host_bounds"] = tuple([*sizes, 1, 1][:3])
    if slices:
        how["num_slices"] = int(slices[0])
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **how).devices)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"--topology={name!r} is no slice that the TPU compiler knows ({said})") from error


# what libtpu would else ask a metadata server for, or tell about; and two processes may compile at a time
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def _limit_of(device: Any) -> int:
    """What the compiler lets a program take, by its own words where it refuses one."""
    shape = jax.ShapeDtypeStruct((_TOO_LARGE // 4,), np.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(shape).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := _HAVE.search(str(error)):
            return int(float(found[1]) * GIB)
        raise
    raise AssertionError("no chip holds 4 TiB")
