"""sera_jax's own side."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sera_jax.compiling import COMPILATION
from sera_jax.config import TrainGroup
from sera_jax.data.batches import PairLoader, score_batches
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import Layout, gather_scores, window_for
from sera_jax.loops.runtime import CPU_SCORE_TOKENS
from sera_jax.losses.preference import resolve
from sera_jax.mesh import make_mesh
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params
from sera_jax.models.huggingface import load_pretrained
from sera_jax.sampling import Draws, SamplingParams, generate
from sera_jax.training.objectives import align_objective
from sera_jax.training.optimizer import make_optimizer
from sera_jax.training.score import make_score, place_rows
from sera_jax.training.step import abstract_state, init_state, make_step, microbatches_for, place_batch
from tests.benchmarks import ppo_speed
from tests.benchmarks.bench import works
from tests.benchmarks.bench.works import Pair, Work
from tests.benchmarks.training_speed import item_flops

NAME = f"sera_jax (jax {jax.__version__})"
ROW = 1024
DPO_ROW, POLITE_ROW = 2560, 640  # of W1, W1c and W6: the rows that a step of so few pairs fills best


def _loaded(folder: pathlib.Path) -> tuple[ModelConfig, Params]:
    """As a run has it."""
    return load_pretrained(folder, remat="auto")


def _items(pairs: Sequence[Pair], logps: np.ndarray | None = None) -> list[PairItem]:
    return [
        PairItem(Item(str(i), p.prompt, (p.chosen, p.rejected)), ref_logp=None if logps is None else logps[i])
        for i, p in enumerate(pairs)
    ]


class _Scorer:
    """Summed log-probs of responses under a model."""

    def __init__(self, cfg: Any, pairs: Sequence[Pair], row: int) -> None:
        self.items = [pair.item for pair in _items(pairs)]
        self.layout, self.rows = Layout(row), max(1, CPU_SCORE_TOKENS // row)
        self.mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.score = make_score(cfg, self.mesh, window=window_for(self.items, row), chunk_tokens=0)

    def __call__(self, params: Any) -> np.ndarray:
        batches = score_batches(self.items, self.layout, self.rows)
        values = [self.score(params, place_rows(batch.rows, self.mesh)) for batch in batches]
        return np.stack(gather_scores(jax.device_get(values), batches, self.items))


class Dpo:
    """Updates of DPO; with `in_step` each scores its batch under the reference first."""

    def __init__(
        self,
        folder: pathlib.Path,
        pairs: Sequence[Pair],
        *,
        batch: int,
        row: int,
        in_step: bool,
        epoch: bool = False,
        a_token: float = works.RANDOM_A_TOKEN,
    ) -> None:
        self.cfg, self.params = _loaded(folder / works.MODEL if (folder / works.MODEL).is_dir() else folder)
        self.pairs, self.in_step = _items(pairs, works.reference_logps(list(pairs), a_token)), in_step
        self.mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.loader = PairLoader(self.pairs, Layout(row), batch_size=batch, seed=0)
        self.steps, self.at = self.loader.steps_per_epoch if epoch else works.STEPS, 0
        optimizer = make_optimizer(TrainGroup(), 1000)
        abstract = abstract_state(self.cfg, optimizer, self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self.state = jax.jit(lambda p: init_state(p, optimizer.init(p)), out_shardings=shardings)(self.params)
        how = dict(window=window_for([pair.item for pair in self.pairs], row), chunk_tokens=0)
        self.step = make_step(
            align_objective(self.cfg, resolve("dpo"), shards=1, **how), optimizer, abstract, self.mesh
        )
        self.reference = self.params
        self.score = make_score(self.cfg, self.mesh, **how)
        self.row, self.checked, self.flops = row, pairs[: works.CHECKED], 0.0

    def check(self) -> list[float]:
        wanted = {rows for rows, *_ in self.loader.compiled}
        for step in range(self.loader.steps_per_epoch):
            if (rows := self.loader.batch(step).batch.weight.shape[0]) in wanted:
                wanted.remove(rows)
                self._update(step)
        return _Scorer(self.cfg, self.checked, self.row)(self.params).ravel().tolist()

    def round(self) -> dict[str, float]:
        before, self.flops = self.at, 0.0
        self.at += self.steps
        tokens = sum(map(self._update, range(before, self.at)))
        return {"tokens": tokens, "repeats": self.steps, "flops": self.flops}

    def _update(self, at: int) -> int:
        batch = self.loader.batch(at)
        parts = microbatches_for(self.cfg, batch.tokens // self.row, self.row, 1)
        placed = place_batch(batch.arrays, parts, self.mesh)
        if self.in_step:
            logps = [self.score(self.reference, jax.tree.map(lambda x, i=i: x[i], placed.rows)) for i in range(parts)]
            placed = placed.replace(ref_logp=jax.numpy.stack(logps))
        self.state, metrics = self.step(self.state, placed)
        assert np.isfinite(metrics["loss"].value())
        chosen = [self.pairs[i].item for i in batch.index[batch.index >= 0]]
        self.flops += (4 if self.in_step else 3) * sum(item_flops(self.cfg, item) for item in chosen)
        return sum(2 * len(i.prompt) + sum(map(len, i.responses)) for i in chosen)


class Scoring:
    """All pairs under policy and reference."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.pairs = works.random_pairs(seed=1)
        self.models = [_loaded(folder / name) for name in (works.MODEL, works.REFERENCE)]
        self.scorer = _Scorer(self.models[0][0], self.pairs, ROW)

    def check(self) -> list[float]:
        return [x for _, params in self.models for x in self.scorer(params)[: works.CHECKED].ravel().tolist()]

    def round(self) -> dict[str, float]:
        for _, params in self.models:
            assert np.isfinite(self.scorer(params)).all()
        flops = 2 * sum(item_flops(self.models[0][0], pair.item) for pair in _items(self.pairs))
        return {"tokens": 2 * sum(pair.tokens for pair in self.pairs), "flops": flops}


class Sampling:
    def __init__(self, folder: pathlib.Path, top_p: float) -> None:
        self.cfg, self.params = _loaded(folder / works.MODEL)
        self.prompts, self.top_p, self.done = works.random_prompts(works.PROMPTS), top_p, 0

    def check(self) -> list[float]:
        self.round()
        greedy = SamplingParams(temperature=0.0, max_new_tokens=16, min_new_tokens=16, stop_ids=(works.STOP_ID,))
        first = generate(self.cfg, self.params, Draws(self.prompts[:4], range(4)), greedy, slots=works.PROMPTS)
        return [float(token) for sample in first for token in sample.tokens]

    def round(self) -> dict[str, float]:
        new = works.NEW_TOKENS
        how = SamplingParams(
            temperature=works.TEMPERATURE,
            top_p=self.top_p,
            max_new_tokens=new,
            min_new_tokens=new,
            stop_ids=(works.STOP_ID,),
        )
        self.done += 1
        ids = range(self.done * works.PROMPTS, (self.done + 1) * works.PROMPTS)
        samples = generate(self.cfg, self.params, Draws(self.prompts, ids), how, slots=works.PROMPTS)
        drawn = [Item("", self.prompts[sample.prompt], (sample.tokens,)) for sample in samples]
        flops = sum(item_flops(self.cfg, item) for item in drawn)
        return {"tokens": sum(len(sample.tokens) for sample in samples), "flops": flops}


class Ppo:
    """The shipped iteration, which also scores the base, in one minibatch and one epoch."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = tempfile.TemporaryDirectory()
        (run,) = ppo_speed.runtimes(pathlib.Path(self.folder.name), [works.PPO_ROW]).values()
        base, sft = run.store("base", {}, ppo_speed.base_params), run.store("sft", {}, ppo_speed.sft_params)
        self.iterating = ppo_speed.Iterating(run, base, sft, 1)

    def check(self) -> list[float]:
        for _ in range(ppo_speed.WARM_UP):
            self.iterating.next()
        return []

    def round(self) -> dict[str, float]:
        self.iterating.next()
        return {"tokens": self.iterating.tokens(), "flops": ppo_speed.needed_flops()}


def _smollm2() -> Dpo:
    folder, pairs = pathlib.Path(os.environ[works.SMOLLM2]), works.polite_pairs()
    a_token = works.SMOLLM2_A_TOKEN
    return Dpo(folder, pairs, batch=works.REAL_BATCH, row=POLITE_ROW, in_step=False, a_token=a_token)


WORKS: dict[str, Any] = {
    "W1": lambda folder: Dpo(folder, works.random_pairs(), batch=works.BATCH, row=DPO_ROW, in_step=True),
    "W1c": lambda folder: Dpo(folder, works.random_pairs(), batch=works.BATCH, row=DPO_ROW, in_step=False),
    "W2": Scoring,
    "W3": lambda folder: Sampling(folder, 1.0),
    "W3p": lambda folder: Sampling(folder, 0.9),
    "W4": Ppo,
    "W5": lambda folder: Dpo(
        folder, works.hh_pairs(), batch=works.REAL_BATCH, row=works.REAL_ROW, in_step=False, epoch=True
    ),
    "W6": lambda folder: _smollm2(),
}


def make_inputs(folder: pathlib.Path) -> None:
    """Write the models of random weights that all workers load."""
    from sera_jax.models.decoder import init_params
    from sera_jax.models.huggingface import save_pretrained

    cfg = ModelConfig(**works.SHAPE, tie_word_embeddings=False, max_position_embeddings=2048)
    for seed, name in enumerate((works.MODEL, works.REFERENCE)):
        save_pretrained(
            folder / name, dataclasses.replace(cfg), jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(seed))
        )


def work(name: str, folder: pathlib.Path) -> Work:
    jax.monitoring.register_event_duration_secs_listener(_note)
    return WORKS[name](folder)


_COMPILED: list[float] = []  # seconds, of each program


def _note(event: str, seconds: float, **details: Any) -> None:
    if event == COMPILATION:
        _COMPILED.append(seconds)


def compiled() -> dict[str, float]:
    """So far: how many programs, and the seconds that took."""
    return {"programs": len(_COMPILED), "compile_s": sum(_COMPILED)}
