"""Sampling speed at bench size: new tokens per second, prefill included, compilation not.

    python -m tests.benchmarks.sampling_speed [--repeats 5] [--slots 64]

Llama shape: hidden 256, intermediate 688, 8 layers, 8 heads, 4 key/value heads, vocabulary 8192, untied, float32,
random weights; 64 prompts of 64 tokens with 128 new tokens each, temperature 0.7. The last row draws answers of uneven
length (stopping at any of 128 tokens), so that slots are refilled. Variants are timed in turn, so that a busy machine
slows all alike.
"""

import argparse
import dataclasses
import time

import jax
import numpy as np

from sera_jax.models.decoder import init_params
from sera_jax.sampling import Draws, SamplingParams, Stats, generate
from tests.benchmarks.training_speed import BENCH

FIXED = SamplingParams(temperature=0.7, max_new_tokens=128, min_new_tokens=128, stop_ids=(2,))
VARIANTS = {
    "top-p 1": (FIXED, 1),
    "top-p 0.9": (dataclasses.replace(FIXED, top_p=0.9), 1),
    "top-k 50, top-p 0.9": (dataclasses.replace(FIXED, top_k=50, top_p=0.9), 1),
    "greedy": (dataclasses.replace(FIXED, temperature=0.0), 1),
    "uneven lengths, 4 samples": (dataclasses.replace(FIXED, min_new_tokens=0, stop_ids=tuple(range(128))), 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slots", type=int, default=64)
    args = parser.parse_args()
    params = jax.jit(lambda key: init_params(BENCH, key))(jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, BENCH.vocab_size, 64) for _ in range(64)]

    def run(sampling: SamplingParams, num_samples: int) -> tuple[float, Stats]:
        stats = Stats()
        start = time.perf_counter()
        generate(
            BENCH,
            params,
            Draws(prompts, range(64), num_samples),
            sampling,
            slots=args.slots,
            stats=stats,
        )
        return time.perf_counter() - start, stats

    first = {name: run(*variant)[0] for name, variant in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    stats: dict[str, Stats] = {}
    for _ in range(args.repeats):
        for name, variant in VARIANTS.items():
            elapsed, stats[name] = run(*variant)
            seconds[name].append(elapsed)
    print(f"{'variant':28}{'tokens/s median':>16}{'best':>8}{'steps':>8}{'full slots':>12}{'first call s':>14}")
    for name, times in seconds.items():
        s = stats[name]
        rates = s.tokens / np.array(times)
        full = s.tokens / (s.decode_steps * args.slots)
        print(
            f"{name:28}{np.median(rates):16.0f}{rates.max():8.0f}{s.decode_steps:8}{full:12.3f}{first[name]:14.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
