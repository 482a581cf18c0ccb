"""Align language models in JAX without a reward model: SeRA and Self-Rewarding PPO."""

__version__ = "0.17.0"

# Which numbers the code makes. Every entry under Numerics in CHANGELOG.md that changes results of a run by more than
# the order of sums raises it: a work directory that another one was at work in is not gone on with.
NUMERICS = 6
