"""Tunix's DPO trainer, sampler and PPO learner, as they are best on this machine.

The losses, steps, samplers and the loop of PPO are Tunix's own; of DPO the loop around its compiled step is the barest
one, without the trainer's logging and saving. It compiles for one shape: prompts on the left, responses padded to the
longest that the work holds; shorter shapes would have to be compiled one by one.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.rl import rl_cluster
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.utils import create_critic_model
from tunix.sft.dpo import dpo_trainer

from tests.benchmarks.bench import works
from tests.benchmarks.bench.works import Pair, Work

NAME = f"Tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}"


def _load(path: pathlib.Path) -> Llama3:
    shape: dict[str, Any] = works.SHAPE
    config = ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=shape["rope_theta"],
        norm_eps=1e-5,
    )
    return create_model_from_safe_tensors(str(path), config, dtype=jnp.float32)


class _Scalar(Llama3):
    """Takes what Tunix's critic is given (in 0.1.7 its Llama does not), which says again what is padding."""

    def __call__(self, *args: Any, segment_ids: Any = None, **how: Any) -> Any:
        return super().__call__(*args, **how)


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))


def _batch(pairs: Sequence[Pair]) -> dpo_trainer.TrainingInput:
    prompts = np.stack([pair.prompt for pair in pairs])
    chosen, rejected = works.padded([p.chosen for p in pairs]), works.padded([p.rejected for p in pairs])
    return dpo_trainer.TrainingInput(prompts, np.ones_like(prompts), *chosen, *rejected)


class Dpo:
    def __init__(self, folder: pathlib.Path, *, in_step: bool) -> None:
        reference = _load(folder / works.MODEL) if in_step else None
        config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=10**9)
        self.model = _load(folder / works.MODEL)
        self.trainer = dpo_trainer.DPOTrainer(self.model, reference, _optimizer(), config)
        self.step = self.trainer.jit_train_and_eval_step(cache_nnx_graph=True)[0]
        self.pairs, self.at = works.random_pairs(), 0
        self.logps = None if in_step else works.reference_logps(self.pairs)

    def check(self) -> list[float]:
        found = _logps(self.trainer, self.model, self.pairs[: works.CHECKED])
        self.round()
        return found.ravel().tolist()

    def round(self) -> dict[str, float]:
        self.at += works.STEPS
        return works.dpo_round(self.at - works.STEPS, self.pairs, self.logps, self._update)

    def _update(self, pairs: list[Pair], logps: np.ndarray | None) -> Any:
        inputs = self.trainer._prepare_inputs(_batch(pairs))
        if logps is not None:
            chosen, rejected = logps.T
            inputs = inputs.replace(ref_chosen_logps=jnp.array(chosen), ref_rejected_logps=jnp.array(rejected))
        return self.step(inputs)[0]


def _logps(trainer: dpo_trainer.DPOTrainer, model: Llama3, pairs: Sequence[Pair]) -> np.ndarray:
    """f32[n, 2], of what was chosen and rejected."""
    x = trainer._prepare_inputs(_batch(pairs))
    found = dpo_trainer.compute_logps(
        model, x.input_ids, x.positions, x.attention_mask, x.logits_to_keep, x.completion_mask
    )
    return np.stack(jax.device_get(found), 1)


class Scoring:
    """In batches of 16 pairs."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.pairs = works.random_pairs(seed=1)
        self.models = [_load(folder / name) for name in (works.MODEL, works.REFERENCE)]
        config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9)
        self.trainer = dpo_trainer.DPOTrainer(self.models[0], None, optax.sgd(0.0), config)

    def _score(self, model: Llama3) -> np.ndarray:
        parts = [self.pairs[i : i + 16] for i in range(0, len(self.pairs), 16)]
        return np.concatenate([_logps(self.trainer, model, part) for part in parts])

    def check(self) -> list[float]:
        return [x for model in self.models for x in self._score(model)[: works.CHECKED].ravel().tolist()]

    def round(self) -> dict[str, float]:
        for model in self.models:
            assert np.isfinite(self._score(model)).all()
        return {"tokens": 2 * sum(pair.tokens for pair in self.pairs)}


class _Numbers:
    """A tokenizer whose texts are ids with blanks between."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # none is put before a prompt

    def eos_id(self) -> int:
        return works.STOP_ID

    def pad_id(self) -> int:
        return 0


class Sampling:
    def __init__(self, folder: pathlib.Path, top_p: float) -> None:
        columns = works.PROMPT_TOKENS + works.NEW_TOKENS
        shape: dict[str, Any] = works.SHAPE
        cache = CacheConfig(columns, shape["num_hidden_layers"], shape["num_key_value_heads"], shape["head_dim"])
        self.sampler = Sampler(_load(folder / works.MODEL), _Numbers(), cache)
        self.prompts = [_Numbers().decode(ids.tolist()) for ids in works.random_prompts(works.PROMPTS)]
        self.top_p, self.done = top_p, 0

    def _generate(self, prompts: list[str], new: int, **how: Any) -> list[np.ndarray]:
        found = self.sampler(
            prompts,
            new,
            max_prompt_length=works.PROMPT_TOKENS,
            eos_tokens=[works.STOP_ID],
            forbidden_tokens=[works.STOP_ID],
            **how,
        )
        return found.tokens

    def check(self) -> list[float]:
        self.round()
        return [float(token) for ids in self._generate(self.prompts[:4], 16) for token in ids]

    def round(self) -> dict[str, float]:
        self.done += 1
        how = dict(temperature=works.TEMPERATURE, top_p=self.top_p, seed=self.done)
        return {"tokens": sum(map(len, self._generate(self.prompts, works.NEW_TOKENS, **how)))}


class Ppo:
    """The learner's own loop, in a thread that asks for the next prompts when an iteration is done."""

    def __init__(self, folder: pathlib.Path) -> None:
        prompts = works.random_prompts(works.PPO_PROMPTS)
        self.prompts = np.array([_Numbers().decode(ids.tolist()) for ids in prompts])
        actor, reference = (_load(folder / works.MODEL) for _ in range(2))
        critic = create_critic_model(actor)
        critic.__class__ = _Scalar
        mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        config = rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=_optimizer(), critic_optimizer=_optimizer(), eval_every_n_steps=10**9, max_steps=10**9
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=works.PPO_NEW_TOKENS,
                max_prompt_length=works.PROMPT_TOKENS,
                kv_cache_size=works.PROMPT_TOKENS + works.PPO_NEW_TOKENS,
                temperature=1.0,
                top_p=1.0,
            ),
        )
        cluster = rl_cluster.RLCluster(
            actor=actor,
            critic=critic,
            reference=reference,
            tokenizer=_Numbers(),
            cluster_config=config,
        )
        self.learner = ppo_learner.PPOLearner(
            cluster, ppo_learner.PPOConfig(num_iterations=1), lambda prompts, completions, **_: [0.0] * len(prompts)
        )
        self.given: queue.Queue[bool] = queue.Queue()
        self.asked: queue.Queue[BaseException | None] = queue.Queue()
        threading.Thread(target=self._train, daemon=True).start()
        self._wait()

    def _train(self) -> None:
        try:
            self.learner.train(self._batches())
        except BaseException as error:
            self.asked.put(error)
            raise

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        while True:
            self.asked.put(None)
            self.given.get()
            yield {"prompts": self.prompts}

    def _wait(self) -> None:
        if (error := self.asked.get()) is not None:
            raise error

    def check(self) -> list[float]:
        for _ in range(2):
            self.round()
        return []

    def round(self) -> dict[str, float]:
        self.given.put(True)
        self._wait()
        return {"tokens": len(self.prompts) * (works.PROMPT_TOKENS + works.PPO_NEW_TOKENS)}


WORKS: dict[str, Any] = {
    "W1": lambda folder: Dpo(folder, in_step=True),
    "W1c": lambda folder: Dpo(folder, in_step=False),
    "W2": Scoring,
    "W3": lambda folder: Sampling(folder, 1.0),
    "W3p": lambda folder: Sampling(folder, 0.9),
    "W4": Ppo,
}


def work(name: str, folder: pathlib.Path) -> Work:
    return WORKS[name](folder)
