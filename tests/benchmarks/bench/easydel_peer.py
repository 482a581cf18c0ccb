"""EasyDeL's DPO step and its scoring of pairs, by its own functions, compiled as its trainer compiles them.

The loop around the step is the barest one, without the trainer's logging and saving. It compiles for one shape: prompts
on the left, responses padded to the longest that the work holds.
"""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import easydel as ed
import jax
import jax.numpy as jnp
import numpy as np
import optax
from easydel.trainers.direct_preference_optimization_trainer import _fn
from flax import nnx

from tests.benchmarks.bench import works
from tests.benchmarks.bench.works import Pair, Work

NAME = f"EasyDeL {importlib.metadata.version('easydel')}, jax {jax.__version__}"
FORWARD = functools.partial(
    _fn.concatenated_forward, is_encoder_decoder=False, label_pad_token_id=-100, padding_value=0, max_length=None
)


def _load(path: pathlib.Path) -> Any:
    return ed.AutoEasyDeLModelForCausalLM.from_pretrained(
        str(path), dtype=jnp.float32, param_dtype=jnp.float32, auto_shard_model=False
    )


def _batch(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    prompts = np.stack([pair.prompt for pair in pairs])
    batch = {"prompt_input_ids": prompts, "prompt_attention_mask": np.ones_like(prompts)}
    for side in ("chosen", "rejected"):
        ids, mask = works.padded([getattr(pair, side) for pair in pairs])
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask}
    return batch


class Dpo:
    def __init__(self, folder: pathlib.Path, *, in_step: bool) -> None:
        model, tx = _load(folder / works.MODEL), optax.adamw(1e-6, weight_decay=0.0)
        self.pairs, self.at = works.random_pairs(), 0
        self.logps = None if in_step else works.reference_logps(self.pairs)
        self.mesh, self.forward = model.mesh, _scorer(model)
        with self.mesh:
            self.reference = _load(folder / works.MODEL).to_state()
            self.state = model.to_state().init_tx(optax.chain(optax.clip_by_global_norm(1.0), tx))
        step = functools.partial(_fn.training_step, learning_rate_fn=lambda step: 1e-6, concatenated_forward=FORWARD)
        self.step = jax.jit(step, donate_argnums=0)

    def check(self) -> list[float]:
        found = self.forward(self.pairs[: works.CHECKED])
        self.round()
        return found.ravel().tolist()

    def round(self) -> dict[str, float]:
        self.at += works.STEPS
        return works.dpo_round(self.at - works.STEPS, self.pairs, self.logps, self._update)

    def _update(self, pairs: list[Pair], logps: np.ndarray | None) -> Any:
        batch = _batch(pairs)
        if logps is not None:
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = logps.T
        with self.mesh:
            self.state, metrics = self.step(self.state, batch, self.reference)
        return metrics.loss


def _scorer(model: Any) -> Callable[[Sequence[Pair]], np.ndarray]:
    """f32[n, 2] of pairs: log-probs of what was chosen and rejected."""
    graph, values = nnx.split(model)
    forward = jax.jit(lambda values, batch: FORWARD(nnx.merge(graph, values), batch))

    def score(pairs: Sequence[Pair]) -> np.ndarray:
        with model.mesh:
            found = jax.device_get(forward(values, _batch(pairs)))
        return np.stack([found["chosen_logps"], found["rejected_logps"]], 1)

    return score


class Scoring:
    """In batches of 16 pairs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.pairs = works.random_pairs(seed=1)
        self.scorers = [_scorer(_load(folder / name)) for name in (works.MODEL, works.REFERENCE)]

    def _scored(self, scorer: Callable[[Sequence[Pair]], np.ndarray]) -> np.ndarray:
        return np.concatenate([scorer(self.pairs[i : i + 16]) for i in range(0, len(self.pairs), 16)])

    def check(self) -> list[float]:
        return [x for scorer in self.scorers for x in self._scored(scorer)[: works.CHECKED].ravel().tolist()]

    def round(self) -> dict[str, float]:
        for scorer in self.scorers:
            assert np.isfinite(self._scored(scorer)).all()
        return {"tokens": 2 * sum(pair.tokens for pair in self.pairs)}


WORKS: dict[str, Callable[[pathlib.Path], Work]] = {
    "W1": lambda folder: Dpo(folder, in_step=True),
    "W1c": lambda folder: Dpo(folder, in_step=False),
    "W2": Scoring,
}


def work(name: str, folder: pathlib.Path) -> Work:
    return WORKS[name](folder)
