"""The verbs that the loops are written in: score, sample, optimise. Each is a phase: done once, found again on restart,
and stopped within it goes on from what is done.

A policy is a handle to parameters on disk. The runtime holds one set of parameters in memory at a time, so the
reference and earlier policies cost memory only in the phases that score with them. Where a training moves a part of the
parameters (`models.trained`), its policies are that part alone, over a model that is held once for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sera_jax import hosts
from sera_jax.checkpoint import Product, Workdir
from sera_jax.checkpoint.papers import write_jsonl
from sera_jax.checkpoint.phases import Produce
from sera_jax.checkpoint.pieces import Pieces, forget
from sera_jax.config import SamplingGroup, TrainGroup
from sera_jax.core import Stream, key_for
from sera_jax.data.batches import ScoreBatches, score_batches
from sera_jax.data.items import Item, items_digest
from sera_jax.data.packing import Gathering, Layout, Scores, by_item, pack, split_items
from sera_jax.data.rollouts import rounded_rows
from sera_jax.loops.cost import Ledger, laid
from sera_jax.loops.endings import NonFinite, Preempted
from sera_jax.loops.policy import Policy, part_of, write_part
from sera_jax.loops.scoring import refuse_nonfinite, scored
from sera_jax.loops.shapes import PairShapes
from sera_jax.mesh import row_shards
from sera_jax.models.config import ModelConfig
from sera_jax.models.critic import critic_config, without_output
from sera_jax.models.decoder import Params
from sera_jax.models.lora import Lora, has_adapters
from sera_jax.models.trained import ALL, Trained, laid_over
from sera_jax.sampling import Candidates, Draws, Sample, SamplingParams, generate, grouped, kept, mesh_for
from sera_jax.training.parameters import load_part, with_fresh_adapters
from sera_jax.training.ppo_steps import PpoPrograms
from sera_jax.training.score import make_rewards, make_score
from sera_jax.training.step import microbatches_for
from sera_jax.writer import MetricWriter

SCORE_TOKENS, CPU_SCORE_TOKENS = 16384, 2048  # the last batch is filled up; small ones are as fast on a CPU
# Ways out of memory; other sizes make another run.
LOWER_ROWS = "take more devices, or lower config.data.row_tokens under a new --config.workdir"
LOWER_SLOTS = (
    "take more devices, or lower config.sampling.slots or the answers' max_new_tokens under a new --config.workdir"
)

__all__ = ["NonFinite", "Policy", "Preempted", "Runtime"]

Made = TypeVar("Made")


@dataclasses.dataclass
class Runtime:
    """Everything the verbs share.

    Attributes:
        cfg, mesh, workdir, writer, seed: as made by `experiment`.
        layout: how items become rows on this mesh.
        chunk_tokens: logits of about this many tokens are alive at a time on each device.
        stop_ids: tokens that end a response.
        lora: the adapters that trainings move; None: none.
        decode_tensor: as in `sampling.engine.mesh_for`.
        score_tokens: of packed rows, that each device scores at a time; 0: as suits the devices of the mesh.
        logging_steps: metrics are written every so many updates.
        stop_requested: asked between steps; True makes the phase save what it can and raise Preempted.
    """

    cfg: ModelConfig
    mesh: Mesh
    workdir: Workdir
    writer: MetricWriter
    seed: int
    layout: Layout
    chunk_tokens: int
    stop_ids: tuple[int, ...]
    decode_tensor: int = 0
    score_tokens: int = 0
    logging_steps: int = 10
    stop_requested: Callable[[], bool] = lambda: False
    lora: Lora | None = None

    def __post_init__(self) -> None:
        suits = CPU_SCORE_TOKENS if self.mesh.devices.flat[0].platform == "cpu" else SCORE_TOKENS
        self.score_tokens = self.score_tokens or suits
        self._held: tuple[str, Params] | None = None
        self._under: tuple[str, Params] | None = None  # the model that parts lie over
        self._compiled: dict[tuple, Any] = {}  # by what they are and what they compute
        self.pair_shapes = PairShapes()
        self.ledger = Ledger()

    # ---- compiled functions

    def compiled(self, key: tuple, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for `key`: phases that compute the same share a jitted function."""
        if key not in self._compiled:
            self._compiled[key] = make()
        return self._compiled[key]

    def made(self, kind: type[Made]) -> list[Made]:
        """What was made so far of a kind."""
        return [found for found in self._compiled.values() if isinstance(found, kind)]

    def compilations(self) -> dict[str, int]:
        """How many programs this process compiled for updates and for scoring."""
        functions: dict[str, set[Any]] = {"update": set(), "score": set()}
        for (kind, *_), made in self._compiled.items():
            if isinstance(made, PpoPrograms):
                functions["update"] |= {made.policy_step, made.critic_step} - {None}
                functions["score"] |= {made.score, made.values} - {None}
            else:
                functions[kind].add(made)
        return {kind: sum(f._cache_size() for f in these) for kind, these in functions.items()}

    # ---- parameters

    def microbatches(self, group: TrainGroup, tokens: int) -> int:
        """How many parts of a batch of so many tokens, padding included, are computed one after the other."""
        rows = tokens // self.layout.row_tokens
        asked = group.gradient_accumulation_steps
        return microbatches_for(self.cfg, rows, self.layout.row_tokens, self.layout.shards, asked=asked)

    def hold(self, policy: Policy, params: Params) -> None:
        """Hold the parameters of a whole model, which are in memory already; those held before are let go."""
        self._held, self._under = (policy.digest, params), None

    def release(self) -> None:
        """Let go of the parameters in memory."""
        self._held = None

    def load(self, policy: Policy) -> Params:
        """The parameters of `policy`, on the mesh, for the caller to hold. Those of a model that lies under others are
        one copy for all, never to be donated."""
        if self._under is not None and self._under[0] == policy.digest:
            return self._under[1]
        self.workdir.settle()
        part = load_part(self.cfg, self.mesh, policy.path / part_of(policy.scalar), policy.trained, policy.scalar)
        if policy.over is None:
            return part
        under = self.under(policy.over)
        return laid_over(part, without_output(under) if policy.scalar else under)

    def under(self, policy: Policy) -> Params:
        """The parameters of a policy that others lie over; they stay until those of another are asked for."""
        if policy.over is not None:
            return self.load(policy)
        if self._under is None or self._under[0] != policy.digest:
            self._held = self._under = None
            self._under = (policy.digest, self.load(policy))
        return self._under[1]

    def params(self, policy: Policy) -> Params:
        """The parameters of `policy`, on the mesh; the ones held before are let go."""
        if self._held is None or self._held[0] != policy.digest:
            self._held = None
            if policy.over is None and self._under is not None and self._under[0] != policy.digest:
                self._under = None  # there is room for one whole model
            self._held = (policy.digest, self.load(policy))
        return self._held[1]

    def take(self, policy: Policy) -> Params:
        """`params`, no longer held here, nor any that they lie over: the caller may donate them."""
        params = self.params(policy)
        self._held = self._under = None
        return params

    def trained(self, group: TrainGroup) -> Trained:
        """What a training by `group` moves."""
        return Trained(group.trainable, self.lora)

    def over(self, start: Policy, trained: Trained) -> Policy | None:
        """What a policy lies over whose `trained` part was moved from `start`."""
        if trained.whole:
            return None
        return start.over if start.over is not None and start.trained == trained else start

    def adapted(self, params: Params, trained: Trained) -> Params:
        """The parameters, with fresh adapters where `trained` has some and they have none yet."""
        if trained.lora is None or has_adapters(params):
            return params
        return with_fresh_adapters(self.mesh, trained.lora, params, key_for(self.seed, Stream.ADAPTERS))

    def divided(self, start: Policy, trained: Trained, of_params: Callable[[Params], Params]) -> tuple[Params, Params]:
        """What a training that moves a part begins with: that part, in buffers of its own, and the frozen rest.

        Args:
            of_params: from the decoder's parameters to those of what is trained, a critic say.
        """
        over = self.over(start, trained)
        if over is not None:
            self.under(over)  # first, so that `start`, where it is that, is not a second copy
        part, frozen = trained.divide(of_params(self.adapted(self.load(start), trained)))
        return jax.tree.map(jnp.copy, part), frozen

    def store(
        self,
        name: str,
        inputs: dict[str, Any],
        make: Callable[[], Params],
        trained: Trained = ALL,
        over: Policy | None = None,
    ) -> Policy:
        """A policy from parameters made elsewhere (`training.parameters`); `make` returns them on the mesh: all, or
        the `trained` part of those that lie `over` another."""

        def produce(folder: pathlib.Path) -> dict[str, Params]:
            write_part(folder, trained, over)
            return {"params": make()}

        product = self.workdir.phase(name, inputs, produce)
        return Policy(name, product.path, product.digest, trained=trained, over=over)

    # ---- score

    def score(self, name: str, policy: Policy, items: Sequence[Item]) -> Scores:
        """Summed log-prob of every response of every item under `policy`, or a reward model's score of it:
        f32[len(responses)] each."""
        rows = [self.layout.row_tokens, self.layout.share_prompt]
        inputs = {"policy": policy.digest, "items": items_digest(items), "rows": rows}

        def produce(folder: pathlib.Path) -> None:
            self._score(folder, name, policy, items, inputs)

        product = self._in_pieces(name, inputs, produce, LOWER_ROWS)
        self.ledger.note(name, {"scoring": laid(items, self.layout)})
        return by_item(np.load(product.path / "logps.npy"), items)

    def score_candidates(self, name: str, policy: Policy, candidates: Sequence[Candidates]) -> list[np.ndarray]:
        """Summed log-prob of every answer under `policy`: f32[N] for each prompt; answers may overflow a row."""
        if not candidates:
            return []
        pieces = split_items([c.item for c in candidates], self.layout)
        flat = np.concatenate(self.score(name, policy, pieces))
        return np.split(flat, np.cumsum([len(c.samples) for c in candidates])[:-1])

    def scorer(self, window: int, scalar: bool = False) -> Callable[..., jax.Array]:
        """The jitted (params, rows) -> f32[R, K] for items of at most `window` tokens; `scalar`: of a reward model."""

        def make() -> Callable[..., jax.Array]:
            if scalar:
                return make_rewards(critic_config(self.cfg), self.mesh, window=window)
            return make_score(self.cfg, self.mesh, window=window, chunk_tokens=self.chunk_tokens)

        return self.compiled(("score", window, scalar), make)

    def score_now(self, params: Params, candidates: Sequence[Candidates], window: int) -> list[np.ndarray]:
        """`score_candidates` by parameters in memory, in one batch of few sizes; no phase.

        Args:
            window: no prompt with all its answers is longer than this, unless it overflows a row.
        """
        pieces = split_items([c.item for c in candidates], self.layout)
        packed = pack(pieces, self.layout.row_tokens, self.layout.share_prompt)
        batches = score_batches(pieces, self.layout, rounded_rows(len(packed), self.layout.shards))
        scores = Gathering(pieces)
        for batch in scored(self.scorer(window), params, batches, range(len(batches)), self.mesh, self.check_stop):
            scores.take(batch.packed.slots, batch.values)
        flat = np.concatenate(scores.by_item())
        return np.split(flat, np.cumsum([len(c.samples) for c in candidates])[:-1])

    def batches_to_score(self, items: Sequence[Item]) -> ScoreBatches:
        """The rows of items that are scored in a phase of their own."""
        rows = max(1, self.score_tokens // self.layout.row_tokens) * row_shards(self.mesh)
        return score_batches(items, self.layout, rows)

    def _score(
        self, folder: pathlib.Path, name: str, policy: Policy, items: Sequence[Item], inputs: dict[str, Any]
    ) -> None:
        batches, scores = self.batches_to_score(items), Gathering(items)
        pieces = Pieces(self.workdir.root, name, inputs | {"batches": [len(batches), sorted(batches.compiled)]})
        if found := pieces.read():
            scores.put(found["place"], found["value"])
        left = np.setdiff1d(np.arange(len(batches)), found.get("batch", [])).tolist()
        done = len(batches) - len(left)
        with self.writer.span(name, total_steps=len(batches), start_step=done), pieces.kept():
            # window and shapes come from the items alone, so that a restart computes the same numbers to the bit
            score = self.scorer(self.layout.window(items), policy.scalar)
            coming = scored(score, self.params(policy), batches, left, self.mesh, self.check_stop)
            for step, batch in enumerate(coming, done + 1):
                place, value = scores.take(batch.packed.slots, batch.values)
                if np.isfinite(value).all():  # else a restart does the batch again, as a machine may have been at fault
                    pieces.add(batch=np.array([batch.number]), place=place, value=value)
                self.writer.advance(step, tokens=int(np.count_nonzero(batch.packed.rows.segment)))
        flat = np.concatenate(scores.by_item()) if len(items) else np.zeros(0, np.float32)
        what = f"{name}: the {'score' if policy.scalar else 'log-prob'}"
        refuse_nonfinite(flat, items, what, f"the parameters of {policy.path}")
        if hosts.is_first():
            np.save(folder / "logps.npy", flat)

    def _in_pieces(self, name: str, inputs: dict[str, Any], produce: Produce, way_out: str) -> Product:
        """`Workdir.phase` of what keeps `Pieces` while it is under way."""
        product = self.workdir.phase(name, inputs, produce, way_out)
        forget(self.workdir.root, name)
        return product

    # ---- sample

    def sampling_params(self, settings: SamplingGroup) -> SamplingParams:
        """How the sampler draws by these settings."""
        fields = {name: getattr(settings, name) for name in _SAMPLING_FIELDS}
        return SamplingParams(**fields, stop_ids=self.stop_ids)

    def sample(
        self,
        name: str,
        policy: Policy,
        prompts: Sequence[Item],
        num_samples: int,
        settings: SamplingGroup,
        *,
        round_: int,
    ) -> list[Candidates]:
        """`num_samples` answers of `policy` to each prompt, in the order of the prompts."""
        inputs = {
            "policy": policy.digest,
            "prompts": items_digest(prompts),
            "settings": dataclasses.asdict(settings),
            "draw": [self.seed, round_, num_samples],
            "stop_ids": self.stop_ids,
        }

        def produce(folder: pathlib.Path) -> None:
            pieces = Pieces(self.workdir.root, name, inputs)
            drawn = kept.of_arrays(pieces.read())
            known, total = len(drawn), len(prompts) * num_samples

            def progress(samples: Sequence[Sample], tokens: int) -> None:
                nonlocal known
                if len(samples) > known:
                    pieces.add(**kept.as_arrays(samples[known:]))
                known = len(samples)
                self.writer.advance(known, tokens=tokens)

            with self.writer.span(name, total_steps=total, start_step=known), pieces.kept():
                how = {"round_": round_, "drawn": drawn, "on_progress": progress}
                samples = self.generate(self.params(policy), prompts, num_samples, settings, **how)
            write_jsonl(folder / "samples.jsonl", map(kept.as_row, samples))

        product = self._in_pieces(name, inputs, produce, LOWER_SLOTS)
        rows = map(json.loads, (product.path / "samples.jsonl").read_text().splitlines())
        candidates = grouped(prompts, [kept.of_row(row) for row in rows])
        self.ledger.note(name, {"sampling": laid([c.item for c in candidates], self.layout)})
        return candidates

    def generate(
        self,
        params: Params,
        prompts: Sequence[Item],
        num_samples: int,
        settings: SamplingGroup,
        *,
        round_: int,
        max_prompt_tokens: int | None = None,
        drawn: Sequence[Sample] = (),
        on_progress: Callable[[Sequence[Sample], int], None] = lambda samples, tokens: None,
    ) -> list[Sample]:
        """Answers by parameters in memory, by prompt and sample index; may be stopped between two calls of the decoder.

        Args:
            max_prompt_tokens: as in `sampling.generate`.
            drawn: as in `Draws`.
            on_progress: called with (samples so far, new tokens since the last call), before a stop.
        """
        tokens_before = 0

        def progress(samples: Sequence[Sample], total: int, tokens: int) -> None:
            nonlocal tokens_before
            on_progress(samples, tokens - tokens_before)
            tokens_before = tokens
            self.check_stop()

        return generate(
            self.cfg,
            params,
            Draws.of_items(prompts, num_samples, seed=self.seed, round=round_, drawn=drawn),
            self.sampling_params(settings),
            slots=settings.slots,
            mesh=mesh_for(self.cfg, self.mesh, self.decode_tensor),
            max_prompt_tokens=max_prompt_tokens,
            on_progress=progress,
            way_out=LOWER_SLOTS,
        )

    def check_stop(self) -> None:
        if self.stop_requested():
            raise Preempted("stopped within a phase; the same command goes on with it from what is done")


_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "max_new_tokens", "min_new_tokens")
