"""The CPU that this process runs on, which JAX calls just that."""

from __future__ import annotations

import os
import pathlib
import platform


def cores() -> int:
    """How many of its cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def model() -> str:
    """Its name."""
    return _said("model name")


def instructions() -> str:
    """The names of what it can do beyond its architecture."""
    return _said("flags", "Features")


def _said(*names: str) -> str:
    """Of the first core, by the first of these names that Linux uses."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith(names)), platform.processor())
