"""Speed of alignment steps and of scoring at bench size, beside the matmul peak of the machine in the same run.

    python -m tests.benchmarks.training_speed [--repeats 5] [--row-tokens 1024 2560] [--work cached in_step score]
        [--remat auto none]

Llama shape: hidden 256, intermediate 688, 8 layers, 8 heads, 4 key/value heads, vocabulary 8192, untied, float32,
random weights; prompts of 64 tokens, responses uniform in 48..192. `cached` is one DPO step of 8 pairs with AdamW and
stored reference log-probs, `in_step` the same after scoring the reference on the batch, `score` the scoring of 256
pairs under policy and reference. All go through the shipped loader, step and scorer; the time includes packing and
transfers, and compilation is reported apart. Rounds go over all variants in turn, so that a busy machine slows all
alike; a round of training takes `--steps` steps that follow each other in the loader's order.

`tokens/s` counts real tokens, a prompt once per RESPONSE, as tools do that lay a prompt out for each. `laid` are the
tokens computed, padding included; `of peak` are the FLOPs of the matmuls that the real tokens need (shared prompts
once, no padding, no recomputation, attention over visible keys only) over those a square float32 matmul reaches.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sera_jax.config import TrainGroup
from sera_jax.data.batches import PairLoader, score_batches
from sera_jax.data.items import Item, PairItem
from sera_jax.data.packing import Layout, window_for
from sera_jax.loops.runtime import CPU_SCORE_TOKENS
from sera_jax.losses.preference import resolve
from sera_jax.mesh import make_mesh
from sera_jax.models.config import REMAT, ModelConfig
from sera_jax.models.decoder import init_params
from sera_jax.training.objectives import align_objective
from sera_jax.training.optimizer import make_optimizer
from sera_jax.training.score import make_score, place_rows
from sera_jax.training.step import abstract_state, init_state, make_step, place_batch
from tests.benchmarks.bench.works import SHAPE

BENCH = ModelConfig(**SHAPE, tie_word_embeddings=False, remat="auto")
MATMUL = 2048


@dataclasses.dataclass
class Count:
    """What a round did: tokens with the prompt once per response, tokens computed, FLOPs that were needed."""

    cfg: ModelConfig
    real: int = 0
    laid: int = 0
    used: int = 0
    flops: float = 0.0

    def add(self, items: Sequence[Item], laid: int, passes: float) -> None:
        """`passes` forward passes: 1 to score, 3 to train."""
        self.real += sum(len(i.prompt) + len(r) for i in items for r in i.responses)
        self.laid += laid
        self.used += sum(i.tokens for i in items)
        self.flops += passes * sum(item_flops(self.cfg, i) for i in items)


def item_flops(cfg: ModelConfig, item: Item) -> float:
    """Matmul FLOPs of one forward pass over an item laid once."""
    heads, groups = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    layer = cfg.hidden_size * (2 * heads + 2 * groups + 3 * cfg.intermediate_size)
    prompt, lengths = len(item.prompt), [len(r) for r in item.responses]
    keys = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in lengths)
    head = sum(lengths) * cfg.hidden_size * cfg.vocab_size
    return 2.0 * (cfg.num_hidden_layers * (item.tokens * layer + 2 * keys * heads) + head)


def make_pairs(count: int, seed: int) -> list[PairItem]:
    rng = np.random.default_rng(seed)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(3, BENCH.vocab_size, length).astype(np.int32)

    return [
        PairItem(
            Item(f"p{i}", tokens(64), (tokens(rng.integers(48, 193)), tokens(rng.integers(48, 193)))),
            ref_logp=rng.normal(-900, 5, 2).astype(np.float32),
        )
        for i in range(count)
    ]


class Training:
    """Rounds of DPO steps."""

    def __init__(self, row_tokens: int, args: argparse.Namespace, *, in_step: bool, cfg: ModelConfig = BENCH) -> None:
        self.cfg = cfg
        self.pairs = make_pairs(256, seed=0)
        window = window_for([p.item for p in self.pairs], row_tokens)
        self.mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.loader = PairLoader(self.pairs, Layout(row_tokens), batch_size=8, seed=0)
        self.steps, self.at, self.in_step = args.steps, 0, in_step
        optimizer = make_optimizer(TrainGroup(), 1000)
        self.reference = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
        abstract = abstract_state(cfg, optimizer, self.mesh)
        # laid out as the step's result is: another layout would compile the step a second time
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        start = jax.jit(lambda p: init_state(p, optimizer.init(p)), out_shardings=shardings)
        self.state = start(self.reference)
        options = dict(window=window, chunk_tokens=args.chunk_tokens)
        objective = align_objective(cfg, resolve("dpo"), shards=1, **options)
        self.step = make_step(objective, optimizer, abstract, self.mesh)
        self.score = make_score(cfg, self.mesh, **options)
        self.shape = f"{','.join(map(str, self.loader.shapes.sizes))} x {row_tokens}, M {self.loader.spec.scored}"

    def warm(self) -> None:
        """One step of every shape."""
        wanted = {rows for rows, *_ in self.loader.compiled}
        for step in range(self.loader.steps_per_epoch):
            if self.loader.batch(step).batch.weight.shape[0] in wanted:
                wanted.remove(self.loader.batch(step).batch.weight.shape[0])
                self._one(step, Count(self.cfg))

    def round(self) -> Count:
        count = Count(self.cfg)
        for _ in range(self.steps):
            self._one(self.at, count)
            self.at += 1
        return count

    def _one(self, at: int, count: Count) -> None:
        batch = self.loader.batch(at)
        items = [self.pairs[i].item for i in batch.index[batch.index >= 0]]
        placed = place_batch(batch.arrays, 1, self.mesh)
        if self.in_step:
            rows = jax.tree.map(lambda x: x[0], placed.rows)
            placed = placed.replace(ref_logp=self.score(self.reference, rows)[None])
        self.state, metrics = self.step(self.state, placed)
        assert np.isfinite(metrics["loss"].value())
        count.add(items, batch.tokens, 4 if self.in_step else 3)


class Scoring:
    """A round scores 256 pairs under two policies."""

    def __init__(self, row_tokens: int, args: argparse.Namespace) -> None:
        self.items = [p.item for p in make_pairs(256, seed=1)]
        self.mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.rows = max(1, CPU_SCORE_TOKENS // row_tokens)
        self.row_tokens = row_tokens
        self.policies = [jax.jit(lambda key: init_params(BENCH, key))(jax.random.key(i)) for i in range(2)]
        window = window_for(self.items, row_tokens)
        self.score = make_score(BENCH, self.mesh, window=window, chunk_tokens=args.chunk_tokens)
        spec = score_batches(self.items, Layout(row_tokens), self.rows).spec
        self.shape = f"{self.rows} x {row_tokens}, M {spec.scored}"

    def warm(self) -> None:
        batches = score_batches(self.items, Layout(self.row_tokens), self.rows)
        self.score(self.policies[0], place_rows(batches[0].rows, self.mesh)).block_until_ready()

    def round(self) -> Count:
        count = Count(BENCH)
        batches = score_batches(self.items, Layout(self.row_tokens), self.rows)
        for policy in self.policies:
            values = [jax.device_get(self.score(policy, place_rows(b.rows, self.mesh))) for b in batches]
            assert all(np.isfinite(v).all() for v in values)
            count.add(self.items, len(batches) * self.rows * self.row_tokens, 1)
        return count


def matmul_peak() -> Callable[[], float]:
    """A function that measures GFLOP/s of a square float32 matmul."""
    square = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL))
    multiply = jax.jit(lambda a, b: a @ b)
    multiply(square, square).block_until_ready()

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(4):
            multiply(square, square).block_until_ready()
        return 4 * 2 * MATMUL**3 / (time.perf_counter() - start) / 1e9

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="training steps of a round")
    parser.add_argument("--row-tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--chunk-tokens", type=int, default=TrainGroup().logits_chunk_tokens)
    parser.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--remat", nargs="+", choices=REMAT, default=[BENCH.remat], help="of training, as model.remat")
    args = parser.parse_args()
    works = {
        (name, T, remat): WORK[name](T, args, dataclasses.replace(BENCH, remat=remat))
        for name in args.work
        for T in args.row_tokens
        for remat in (args.remat if name != "score" else args.remat[:1])
    }
    compile_seconds = {}
    for key, work in works.items():
        start = time.perf_counter()
        work.warm()
        compile_seconds[key] = time.perf_counter() - start
    peak = matmul_peak()
    peaks: list[float] = []
    seconds: dict[tuple[str, int, str], list[float]] = {key: [] for key in works}
    counts: dict[tuple[str, int, str], list[Count]] = {key: [] for key in works}
    for _ in range(args.repeats):
        peaks.append(peak())
        for key, work in works.items():
            start = time.perf_counter()
            counts[key].append(work.round())
            seconds[key].append(time.perf_counter() - start)
    top = float(np.median(peaks))
    print(f"square float32 matmul: median {top:.0f} GFLOP/s, best {max(peaks):.0f}; {jax.devices()[0].device_kind}")
    print(
        f"{'work':9}{'remat':7}{'rows x T':>24}{'tokens/s median':>17}{'best':>8}{'laid/s':>8}{'padding %':>11}"
        f"{'of peak':>9}{'first call s':>14}"
    )
    for key, work in works.items():
        times, done = np.array(seconds[key]), counts[key]
        rate = np.array([c.real for c in done]) / times
        laid, used = sum(c.laid for c in done), sum(c.used for c in done)
        share = np.median([c.flops / s / 1e9 for c, s in zip(done, times)]) / top
        print(
            f"{key[0]:9}{key[2] if key[0] != 'score' else '-':7}{work.shape:>24}"
            f"{np.median(rate):17.0f}{rate.max():8.0f}"
            f"{np.median([c.laid / s for c, s in zip(done, times)]):8.0f}{100 * (1 - used / laid):11.1f}"
            f"{share:9.2f}{compile_seconds[key]:14.1f}",
            flush=True,
        )


WORK: dict[str, Callable[[int, argparse.Namespace, ModelConfig], Training | Scoring]] = {
    "cached": lambda T, args, cfg: Training(T, args, in_step=False, cfg=cfg),
    "in_step": lambda T, args, cfg: Training(T, args, in_step=True, cfg=cfg),
    "score": lambda T, args, cfg: Scoring(T, args),
}


if __name__ == "__main__":
    main()
