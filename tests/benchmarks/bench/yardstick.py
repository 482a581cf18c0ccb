"""What the machine does at best, in a process of its own: its long vectors would count as a worker's memory."""

from __future__ import annotations

import pathlib
import time

import jax

from tests.benchmarks.training_speed import matmul_peak

NAME = "yardstick"


class Yardstick:
    def __init__(self) -> None:
        self.matmul = matmul_peak()
        self.add = jax.jit(lambda a, b: a + b)
        self.vector = jax.numpy.ones(2**26, jax.numpy.float32)

    def check(self) -> list[float]:
        self.add(self.vector, self.vector).block_until_ready()
        return []

    def round(self) -> dict[str, float]:
        """GFLOP/s of a square float32 matmul, and GB/s of adding two long vectors."""
        start = time.perf_counter()
        for _ in range(4):
            self.add(self.vector, self.vector).block_until_ready()
        seconds = time.perf_counter() - start
        return {"matmul_gflops": self.matmul(), "bandwidth_gbs": 4 * 3 * self.vector.nbytes / seconds / 1e9}


def work(name: str, folder: pathlib.Path) -> Yardstick:
    return Yardstick()
