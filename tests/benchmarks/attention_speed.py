"""A layer's attention by `xla` and by `xla_tiles`, forward and with its gradients, over packed pairs; milliseconds.

    python -m tests.benchmarks.attention_speed [--repeats 7]

Rows are filled with pairs whose prompts and responses have lengths uniform between two bounds. The two take turns.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from sera_jax.ops.attention import Places
from sera_jax.ops.backends import ATTENTION

NAMES = ("xla", "xla_tiles")
# rows, tokens of a row, prompt, response; query heads, key/value heads, dimensions of a head
CASES = [
    (24, 128, (20, 30), (20, 40), (8, 4, 32)),
    (12, 256, (40, 65), (40, 65), (8, 4, 32)),
    (6, 512, (64, 65), (48, 193), (8, 4, 32)),
    (3, 1024, (64, 65), (48, 193), (8, 4, 32)),
    (16, 1024, (64, 65), (48, 193), (8, 4, 32)),
    (2, 2048, (64, 65), (48, 193), (8, 4, 32)),
    (2, 2048, (500, 701), (300, 701), (8, 4, 32)),
    (6, 512, (40, 61), (15, 61), (9, 3, 64)),
    (3, 1024, (64, 65), (48, 193), (32, 8, 128)),
]


def packed(rows: int, length: int, prompt: tuple[int, int], response: tuple[int, int]) -> tuple[Places, int]:
    """Where the tokens of full rows stand, and how many the longest pair has."""
    rng, longest, items = np.random.default_rng(0), 0, 0
    segment, branch, position = (np.zeros((rows, length), np.int32) for _ in range(3))
    for row in range(rows):
        at = 0
        while True:
            parts = [int(rng.integers(*prompt)), *(int(n) for n in rng.integers(*response, 2))]
            if at + sum(parts) > length:
                break
            items, longest = items + 1, max(longest, sum(parts))
            for k, count in enumerate(parts):
                own = np.s_[row, at : at + count]
                segment[own], branch[own] = items, k
                position[own] = np.arange(count) + (parts[0] if k else 0)
                at += count
    return jax.tree.map(jnp.asarray, Places.in_rows(segment, branch, position)), longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print("| rows | prompts, answers | heads | `xla` | `xla_tiles` | with gradients: `xla` | `xla_tiles` |")
    print("|---|---|---|---|---|---|---|")
    for rows, length, prompt, response, (heads, groups, depth) in CASES:
        at, longest = packed(rows, length, prompt, response)
        rng, real = np.random.default_rng(0), (at.segment > 0)[:, None, :, None]
        given = [
            jnp.asarray(rng.standard_normal((rows, h, length, depth)), jnp.float32) for h in (heads, groups, groups)
        ]
        programs, seconds = {}, {}
        for name in NAMES:

            def mix(q, k, v, at, name=name, longest=longest):
                return ATTENTION[name].attend(q, k, v, at, at, longest_item=longest)

            def total(q, k, v, at, mix=mix, real=real):
                return jnp.sum(jnp.where(real, mix(q, k, v, at), 0.0) ** 2)

            programs |= {(name, "forward"): jax.jit(mix), (name, "gradients"): jax.jit(jax.grad(total, (0, 1, 2)))}
        for key, program in programs.items():
            jax.block_until_ready(program(*given, at))
            seconds[key] = []
        for _ in range(args.repeats):
            for key, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*given, at))
                seconds[key].append(time.perf_counter() - start)
        taken = [
            f"{1e3 * statistics.median(seconds[name, what]):.1f}" for what in ("forward", "gradients") for name in NAMES
        ]
        spans = ", ".join(f"{low}" if low + 1 == high else f"{low} to {high - 1}" for low, high in (prompt, response))
        print(f"| {rows} x {length} | {spans} | {heads}/{groups} of {depth} | {' | '.join(taken)} |", flush=True)


if __name__ == "__main__":
    main()
