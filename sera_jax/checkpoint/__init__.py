"""Checkpoints with checksums, and phases that are done once."""

from sera_jax.checkpoint.arrays import Checkpoints, CorruptCheckpoint, load_tree, save_tree, tree_digest
from sera_jax.checkpoint.phases import Product, StaleWorkdir, Workdir

__all__ = [
    "Checkpoints",
    "CorruptCheckpoint",
    "Product",
    "StaleWorkdir",
    "Workdir",
    "load_tree",
    "save_tree",
    "tree_digest",
]
