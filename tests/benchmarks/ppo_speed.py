"""Seconds of one iteration of Self-Rewarding PPO at bench size, beside the matmul peak of the machine in the same run.

    python -m tests.benchmarks.ppo_speed [--repeats 3] [--row-tokens 128] [--num-mini-batches 4]

Llama shape: hidden 256, intermediate 688, 8 layers, 8 heads, 4 key/value heads, vocabulary 8192, untied, float32,
random weights; 16 prompts of 64 tokens, 64 new tokens each, temperature 1, one epoch. Four models: policy, SFT model,
base (of which the SFT model is a perturbation, so that rewards differ) and a critic of its own. The iteration is the
shipped one, from sampling to the last update, with its packing, transfers and checks; nothing is evaluated or saved.

The first iterations compile and are not timed. Several row lengths or numbers of minibatches are timed in turn, so that
a busy machine slows all alike; `cpu s` are the seconds of all cores together, which a busy machine changes least. Peak
memory is that of the whole process. `tokens` are prompts and responses; `of peak` are the FLOPs of the matmuls that
these tokens need (no padding, no recomputation, attention over visible keys only) over those a square float32 matmul
reaches.
"""

import argparse
import pathlib
import resource
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np

from sera_jax.checkpoint import Workdir
from sera_jax.config import PpoGroup, RewardGroup, SamplingGroup, TrainGroup
from sera_jax.data.items import Item
from sera_jax.data.packing import Layout
from sera_jax.loops.ppo import Learner
from sera_jax.loops.runtime import Policy, Runtime
from sera_jax.loops.srppo import SRPPO_ARM, iterate
from sera_jax.loops.srppo_study import SrppoStudy
from sera_jax.mesh import make_mesh
from sera_jax.models.decoder import Params, init_params
from sera_jax.writer import MetricWriter
from tests.benchmarks.bench.works import PPO_NEW_TOKENS, PPO_PROMPTS, PROMPT_TOKENS, STOP_ID
from tests.benchmarks.training_speed import BENCH, item_flops, matmul_peak

PROMPTS, NEW_TOKENS = PPO_PROMPTS, PPO_NEW_TOKENS
PERTURBATION = 1e-3  # of the SFT model's parameters; those of the base have a standard deviation of 0.02
WARM_UP = 2  # the first iteration compiles; the second must not
PARTS = ("rollout", "score", "update")


def base_params() -> Params:
    return jax.jit(lambda key: init_params(BENCH, key))(jax.random.key(0))


def sft_params() -> Params:
    """The base with noise on every leaf."""

    def perturb(params: Params) -> Params:
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        moved = [x + PERTURBATION * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, moved)

    return jax.jit(perturb)(base_params())


def demonstrations() -> list[Item]:
    """What the prompts are taken from; nothing reads the responses."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(3, BENCH.vocab_size, count).astype(np.int32)

    return [Item(f"d{i}", tokens(PROMPT_TOKENS), (tokens(8),)) for i in range(4 * PROMPTS)]


class Iterating:
    """Iterations of PPO, one after the other."""

    def __init__(self, run: Runtime, base: Policy, sft: Policy, num_mini_batches: int) -> None:
        study = SrppoStudy(
            run=run,
            base=base,
            sft=sft,
            reward=RewardGroup(missing_eos="keep"),  # hardly any answer ends by itself
            ppo=PpoGroup(num_mini_batches=num_mini_batches),
            train=TrainGroup(batch_size=PROMPTS),
            sampling=SamplingGroup(temperature=1.0, min_new_tokens=0, max_new_tokens=NEW_TOKENS, slots=PROMPTS),
            demonstrations=demonstrations(),
            prompts=(),
            evaluate=lambda policy, round_: {},
            gold=None,
            texts=lambda item, tokens: {},
            rollout_iterations=0,
            reward_model=TrainGroup(),
            pairs=(),
            heldout_pairs=(),
        )
        self.learner, self.done = Learner(study, SRPPO_ARM), 0
        self.state = self.learner.programs.start(run.params(sft))
        self.metrics: dict[str, float] = {}

    def next(self) -> list[float]:
        """Seconds of the next iteration, of its parts, and of all cores."""
        self.done += 1
        start, cpu = time.perf_counter(), time.process_time()
        self.state, self.metrics = iterate(self.learner, self.state, self.done)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        assert self.metrics["ppo/updates"] == self.learner.study.ppo.num_mini_batches, "every update was done"
        split = self.learner.timings()
        return [seconds, *(split[f"timing_s/{part}"] for part in PARTS), cpu]

    def tokens(self) -> int:
        """Of the last iteration, prompts included."""
        return PROMPTS * PROMPT_TOKENS + round(self.metrics["rollout/tokens"])


def needed_flops() -> float:
    """Matmul FLOPs of an iteration: sampling, three scores and an update of the policy; a score and an update of the
    critic, which has no vocabulary. An update is three passes."""
    item = Item("", np.zeros(PROMPT_TOKENS, np.int32), (np.zeros(NEW_TOKENS, np.int32),))
    whole, head = item_flops(BENCH, item), 2.0 * NEW_TOKENS * BENCH.hidden_size * BENCH.vocab_size
    return PROMPTS * ((1 + 3 + 3) * whole + (1 + 3) * (whole - head))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row-tokens", "--row_tokens", type=int, nargs="+", default=[128])
    parser.add_argument("--num-mini-batches", "--num_mini_batches", type=int, nargs="+", default=[4])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(pathlib.Path(folder), args)


def runtimes(folder: pathlib.Path, row_tokens: Sequence[int]) -> dict[int, Runtime]:
    """By the length of their rows, in one work directory."""
    workdir = Workdir(folder, {})
    writer = MetricWriter(folder, tensorboard=False)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def runtime(row_tokens: int) -> Runtime:
        return Runtime(
            cfg=BENCH,
            mesh=mesh,
            workdir=workdir,
            writer=writer,
            seed=0,
            layout=Layout(row_tokens),
            chunk_tokens=TrainGroup().logits_chunk_tokens,
            stop_ids=(STOP_ID,),
        )

    return {T: runtime(T) for T in row_tokens}


def measure(folder: pathlib.Path, args: argparse.Namespace) -> None:
    runs = runtimes(folder, args.row_tokens)
    first = runs[args.row_tokens[0]]
    base, sft = first.store("base", {}, base_params), first.store("sft", {}, sft_params)
    works = {(T, n): Iterating(run, base, sft, n) for T, run in runs.items() for n in args.num_mini_batches}
    warm = {key: [work.next()[0] for _ in range(WARM_UP)] for key, work in works.items()}
    compiled = {T: run.compilations() for T, run in runs.items()}
    peak = matmul_peak()
    peaks: list[float] = []
    seconds: dict[tuple[int, int], list[list[float]]] = {key: [] for key in works}
    tokens: dict[tuple[int, int], list[int]] = {key: [] for key in works}
    for _ in range(args.repeats):
        peaks.append(peak())
        for key, work in works.items():
            seconds[key].append(work.next())
            tokens[key].append(work.tokens())
    again = sum(sum(run.compilations().values()) - sum(compiled[T].values()) for T, run in runs.items())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    top = float(np.median(peaks))
    print(f"square float32 matmul: median {top:.0f} GFLOP/s, best {max(peaks):.0f}; {jax.devices()[0].device_kind}")
    print(f"peak memory {memory:.2f} GiB; programs compiled while timed: {again}")
    print(
        f"{'row tokens':>10}{'minibatches':>13}{'seconds median':>16}{'best':>7}{'rollout':>9}{'score':>7}{'update':>8}"
        f"{'cpu s':>7}{'tokens':>8}{'tokens/s':>10}{'of peak':>9}{'first call s':>14}"
    )
    for key, rounds in seconds.items():
        total, rollout, score, update, cpu = np.median(rounds, axis=0)
        best, count = np.min(rounds, axis=0)[0], float(np.median(tokens[key]))
        print(
            f"{key[0]:10}{key[1]:13}{total:16.2f}{best:7.2f}{rollout:9.2f}{score:7.2f}{update:8.2f}"
            f"{cpu:7.2f}{count:8.0f}{count / total:10.0f}{needed_flops() / 1e9 / total / top:9.2f}{warm[key][0]:14.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
