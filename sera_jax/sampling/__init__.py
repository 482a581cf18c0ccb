"""Sampling: a jitted prefill and decoder over fixed slots, and the host-side engine that keeps the slots full."""

from sera_jax.sampling.candidates import Candidates, grouped
from sera_jax.sampling.engine import Stats, generate, mesh_for
from sera_jax.sampling.params import Draws, Sample, SamplingParams

__all__ = ["Candidates", "Draws", "Sample", "SamplingParams", "Stats", "generate", "grouped", "mesh_for"]
