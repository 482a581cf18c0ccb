"""Align language models in JAX without a reward model: SeRA and Self-Rewarding PPO."""

__version__ = "0.3.0"
