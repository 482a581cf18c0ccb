"""The verbs that the loops are written in: score, sample, optimise. Each is a phase: done once, found again on restart.

A policy is a handle to parameters on disk. The runtime holds one set of parameters in memory at a time, so the
reference and earlier policies cost memory only in the phases that score with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sera_jax.checkpoint import Workdir, load_tree, save_tree
from sera_jax.config import SamplingGroup, TrainGroup
from sera_jax.data.batches import PairLoader, score_batches
from sera_jax.data.items import Item
from sera_jax.data.packing import RowSpec, gather_scores, window_for
from sera_jax.mesh import param_shardings, row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.decoder import Params, abstract_params
from sera_jax.sampling import Sample, SamplingParams, generate
from sera_jax.training.ppo_steps import Programs
from sera_jax.training.score import make_score, place_rows
from sera_jax.training.step import microbatches_for
from sera_jax.writer import MetricWriter

SCORE_TOKENS = 16384  # tokens of packed rows scored at a time, per device


class Preempted(Exception):
    """The process was asked to stop; everything needed to go on is on disk."""


class NonFinite(ValueError):
    """A loss or gradient was not finite; the last good state is on disk."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """Parameters on disk: `path/params`, and where training may go on `path/optimizer`, or `path/state` after PPO.
    `name` is the phase's."""

    name: str
    path: pathlib.Path
    digest: str


@dataclasses.dataclass
class RowShapes:
    """Shapes of pair batches that earlier rounds made, so that later ones use them again and compile nothing.

    It grows where a loader is made, not where it trains, so a restart that skips a round still arrives at the same
    shapes.
    """

    sizes: tuple[int, ...] = ()
    spec: RowSpec | None = None
    window: int = 0

    def note(self, loader: PairLoader, window: int) -> None:
        self.sizes, self.spec, self.window = loader.sizes, loader.spec, max(self.window, window)


@dataclasses.dataclass
class Runtime:
    """Everything the verbs share.

    Attributes:
        cfg, mesh, workdir, writer, seed: as made by `experiment`.
        row_tokens, share_prompt, chunk_tokens: the row layout (DESIGN: T, prompt sharing) and the logits chunk.
        stop_ids: tokens that end a response.
        stop_requested: asked between steps; True makes the phase save what it can and raise Preempted.
    """

    cfg: ModelConfig
    mesh: Mesh
    workdir: Workdir
    writer: MetricWriter
    seed: int
    row_tokens: int
    share_prompt: bool
    chunk_tokens: int
    stop_ids: tuple[int, ...]
    stop_requested: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        self._held: tuple[str, Params] | None = None
        self.steps: dict[Any, Any] = {}  # jitted update steps by what they compute
        self.programs: dict[tuple, Programs] = {}  # those of PPO, by window and what an arm changes
        self.row_shapes = RowShapes()
        self._scores: dict[int, Any] = {}  # jitted scorers by attention window

    # ---- parameters

    def abstract_params(self) -> Params:
        shapes = abstract_params(self.cfg)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            param_shardings(self.mesh, shapes),
        )

    def compilations(self) -> dict[str, int]:
        """How many programs this process compiled for updates and for scoring."""
        ppo = self.programs.values()
        updates = {*self.steps.values(), *(f for p in ppo for f in (p.policy_step, p.critic_step) if f is not None)}
        scores = {*self._scores.values(), *(f for p in ppo for f in (p.score, p.values) if f is not None)}
        return {
            "update": sum(step._cache_size() for step in updates),
            "score": sum(score._cache_size() for score in scores),
        }

    def microbatches(self, group: TrainGroup, tokens: int) -> int:
        """How many parts of a batch of so many tokens, padding included, are computed one after the other."""
        rows = tokens // self.row_tokens
        asked = group.gradient_accumulation_steps
        return microbatches_for(self.cfg, rows, self.row_tokens, row_shards(self.mesh), asked=asked)

    def release(self) -> None:
        """Let go of the parameters in memory."""
        self._held = None

    def params(self, policy: Policy) -> Params:
        """The parameters of `policy`, on the mesh; the ones held before are let go."""
        if self._held is None or self._held[0] != policy.digest:
            self._held = None
            self._held = (policy.digest, load_tree(policy.path / "params", self.abstract_params()))
        return self._held[1]

    def take(self, policy: Policy) -> Params:
        """`params`, no longer held here: the caller may donate them."""
        params = self.params(policy)
        self.release()
        return params

    def store(self, name: str, inputs: dict[str, Any], make: Callable[[], Params]) -> Policy:
        """A policy from parameters made elsewhere (fresh, or read from a Hugging Face folder)."""

        def produce(folder: pathlib.Path) -> None:
            save_tree(folder / "params", make())

        product = self.workdir.phase(name, inputs, produce)
        return Policy(name, product.path, product.digest)

    # ---- score

    def score(self, name: str, policy: Policy, items: Sequence[Item]) -> list[np.ndarray]:
        """Summed log-prob of every response of every item under `policy`: f32[len(responses)] each."""
        inputs = {"policy": policy.digest, "items": items_digest(items), "rows": [self.row_tokens, self.share_prompt]}
        product = self.workdir.phase(name, inputs, lambda folder: self._score(folder, name, policy, items))
        flat = np.load(product.path / "logps.npy")
        ends = np.cumsum([len(item.responses) for item in items])
        return np.split(flat, ends[:-1]) if len(items) else []

    def _score(self, folder: pathlib.Path, name: str, policy: Policy, items: Sequence[Item]) -> None:
        shards = row_shards(self.mesh)
        rows = max(1, SCORE_TOKENS // self.row_tokens) * shards
        # window and shapes come from the items alone, so that a restart computes the same numbers to the bit
        window = window_for(items, self.row_tokens, self.share_prompt)
        if window not in self._scores:
            self._scores[window] = make_score(self.cfg, self.mesh, window=window, chunk_tokens=self.chunk_tokens)
        score = self._scores[window]
        batches = score_batches(items, self.row_tokens, rows, share_prompt=self.share_prompt)
        params = self.params(policy)
        values = []
        with self.writer.phase(name, total_steps=len(batches)):
            for step, packed in enumerate(batches, 1):
                self.check_stop()
                values.append(jax.device_get(score(params, place_rows(packed.rows, self.mesh))))
                self.writer.advance(step, tokens=int((packed.rows.segment > 0).sum()))
        flat = np.concatenate(gather_scores(values, batches, items)) if items else np.zeros(0, np.float32)
        if not np.isfinite(flat).all():
            bad = next(i.id for i, s in zip(items, gather_scores(values, batches, items)) if not np.isfinite(s).all())
            raise NonFinite(
                f"{name}: the log-prob of record {bad!r} is not finite; look at the parameters of {policy.path}"
            )
        np.save(folder / "logps.npy", flat.astype(np.float32))

    # ---- sample

    def sample(
        self,
        name: str,
        policy: Policy,
        prompts: Sequence[Item],
        num_samples: int,
        settings: SamplingGroup,
        *,
        round_: int,
    ) -> list[list[Sample]]:
        """`num_samples` responses of `policy` to each prompt, in the order of the prompts."""
        inputs = {
            "policy": policy.digest,
            "prompts": items_digest(prompts),
            "settings": dataclasses.asdict(settings),
            "draw": [self.seed, round_, num_samples],
        }

        def produce(folder: pathlib.Path) -> None:
            samples = self._sample(name, policy, prompts, num_samples, settings, round_)
            with (folder / "samples.jsonl").open("w") as file:
                for s in samples:
                    row = {"prompt": s.prompt, "sample": s.sample, "finished": s.finished, "tokens": s.tokens.tolist()}
                    file.write(json.dumps(row) + "\n")

        product = self.workdir.phase(name, inputs, produce)
        out: list[list[Sample]] = [[] for _ in prompts]
        for line in (product.path / "samples.jsonl").read_text().splitlines():
            row = json.loads(line)
            tokens = np.asarray(row["tokens"], np.int32)
            out[row["prompt"]].append(
                Sample(row["prompt"], row["sample"], tokens, np.zeros(0, np.float32), row["finished"])
            )
        return [sorted(group, key=lambda s: s.sample) for group in out]

    def _sample(
        self, name: str, policy: Policy, prompts: Sequence[Item], num_samples: int, settings: SamplingGroup, round_: int
    ) -> list[Sample]:
        with self.writer.phase(name, total_steps=len(prompts) * num_samples):
            tokens_before = 0

            def progress(done: int, total: int, tokens: int) -> None:
                nonlocal tokens_before
                self.check_stop()
                self.writer.advance(done, tokens=tokens - tokens_before)
                tokens_before = tokens

            return generate(
                self.cfg,
                self.params(policy),
                [item.prompt for item in prompts],
                prompt_ids=[stable_id(item.id) for item in prompts],
                num_samples=num_samples,
                sampling=SamplingParams(
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                    max_new_tokens=settings.max_new_tokens,
                    min_new_tokens=settings.min_new_tokens,
                    stop_ids=self.stop_ids,
                ),
                seed=self.seed,
                round=round_,
                slots=settings.slots,
                mesh=self.mesh,
                on_progress=progress,
            )

    def check_stop(self) -> None:
        if self.stop_requested():
            raise Preempted("stopped between phases' saves; the same command does the unfinished phase again")


def row_multiple(group: TrainGroup, mesh: Mesh) -> int:
    """Rows of a batch are a multiple of this, so that the microbatches asked for and the devices get equal parts."""
    return max(1, group.gradient_accumulation_steps) * row_shards(mesh)


def stable_id(text: str) -> int:
    """A 31-bit number for a record id, the same in every process."""
    return zlib.crc32(text.encode()) & 0x7FFFFFFF


def items_digest(items: Sequence[Item]) -> str:
    """Digest of ids and tokens; of what a score depends on."""
    total = hashlib.sha256()
    for item in items:
        total.update(item.id.encode() + b"\0")
        for part in (item.prompt, *item.responses):
            total.update(len(part).to_bytes(4, "little") + np.ascontiguousarray(part, np.int32).tobytes())
    return total.hexdigest()
