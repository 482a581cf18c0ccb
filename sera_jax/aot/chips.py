"""What a chip can do: its peak rate of matmuls, and how fast it reads its memory.

TPUs: the vendor's pages, cloud.google.com/tpu/docs/NAME (v2 and v3: /system-architecture-tpu-vm). What a program may
take there the compiler says itself, so memory stands here for GPUs alone. GPUs: the vendor's data sheets, dense
bfloat16 of the SXM boards; of their memory JAX takes three quarters unless told otherwise.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one JAX device, which on v2, v3 and tpu7x is half a chip.

    Attributes:
        flops: bfloat16, per second. bandwidth: bytes of its memory per second.
        memory: bytes; 0 where the compiler says it.
        devices: in a chip.
    """

    flops: float
    bandwidth: float
    memory: int = 0
    devices: int = 1


TPUS = {
    "v2": Chip(46e12 / 2, 700e9 / 2, devices=2),
    "v3": Chip(123e12 / 2, 900e9 / 2, devices=2),
    "v4": Chip(275e12, 1228e9),  # a megacore is one device
    "v5e": Chip(197e12, 819e9),
    "v5p": Chip(459e12, 2765e9),
    "v6e": Chip(918e12, 1640e9),
    "tpu7x": Chip(2307e12 / 2, 7380e9 / 2, devices=2),
}
GPUS = {
    "a100": Chip(312e12, 2039e9, 80 * 10**9),
    "h100": Chip(989e12, 3350e9, 80 * 10**9),
    "h200": Chip(989e12, 4800e9, 141 * 10**9),
    "b200": Chip(2250e12, 8000e9, 180 * 10**9),
}
GPU_SHARE = 0.75  # XLA_PYTHON_CLIENT_MEM_FRACTION's default
