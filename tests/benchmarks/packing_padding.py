"""How much of a packed epoch is padding, and how many tokens it takes beside padded batches, on real pairs.

    python tests/benchmarks/packing_padding.py [--row-tokens 1024] [--batch-size 64] [--row-multiple 1]

`padding` counts every token of every row, rows added by rounding up to the few compiled sizes included. `of padded` is
the packed tokens over those of the usual batches: 8 pairs, each side carrying its prompt, all padded to the batch's
longest; in the file's order, and in brackets the mean over shuffled orders.
"""

import argparse
import gzip
import json
import os
import pathlib
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sera_jax.data.batches import PairLoader  # noqa: E402
from sera_jax.data.items import Item, PairItem  # noqa: E402
from sera_jax.data.packing import Layout, build_rows, pack, shared_prompt_savings, spec_for  # noqa: E402

FILES = ("hh_helpful_rejection_sampled_test", "hh_helpful_base_test")
BOS, EOS = 1, 2


def read_lengths(path: pathlib.Path, tokenizer) -> np.ndarray:
    """i64[n, 3] tokens of prompt (with BOS), chosen and rejected (with EOS) of every pair."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sides = []
    for key in ("prompt", "chosen", "rejected"):
        encoded = tokenizer.encode_batch([row[key] for row in rows], add_special_tokens=False)
        sides.append([len(one.ids) + 1 for one in encoded])
    return np.array(sides).T


def make_pairs(lengths: np.ndarray, row_tokens: int) -> list[PairItem]:
    """Pairs of these lengths; responses cut to half a row at most, prompts to what is left."""
    pairs = []
    for i, (prompt, chosen, rejected) in enumerate(lengths):
        chosen, rejected = min(chosen, row_tokens // 2 - 1), min(rejected, row_tokens // 2)
        prompt = min(prompt, row_tokens - chosen - rejected)
        arrays = [np.ones(n, np.int32) for n in (prompt, chosen, rejected)]
        pairs.append(PairItem(Item(str(i), arrays[0], (arrays[1], arrays[2]))))
    return pairs


def padded_tokens(lengths: np.ndarray, order: np.ndarray, batch: int = 8) -> int:
    """Tokens of batches of pairs padded to the longest prompt + response of the batch."""
    longest = lengths[order, 0] + lengths[order, 1:].max(1)
    parts = [longest[i : i + batch] for i in range(0, len(longest), batch)]
    return sum(2 * len(part) * int(part.max()) for part in parts)


def measure(name: str, lengths: np.ndarray, args: argparse.Namespace) -> None:
    pairs = make_pairs(lengths, args.row_tokens)
    items = [pair.item for pair in pairs]
    plain = padded_tokens(lengths, np.arange(len(lengths)))
    rngs = [np.random.default_rng(seed) for seed in range(10)]
    shuffled = np.mean([padded_tokens(lengths, rng.permutation(len(lengths))) for rng in rngs])
    print(f"{name}: {len(pairs)} pairs, sharing the prompt lays {shared_prompt_savings(items):.3f} of the tokens")
    print(f"{'seed':>6} {'epoch':>6} {'padding %':>10} {'of padded':>16} {'rows R':>14}  (T, M, K, Q)")
    for seed in range(args.seeds):
        start = time.perf_counter()
        loader = PairLoader(
            pairs,
            Layout(
                args.row_tokens, multiple=args.row_multiple, shards=args.row_multiple, max_shapes=args.max_row_shapes
            ),
            batch_size=args.batch_size,
            seed=seed,
        )
        planned = time.perf_counter() - start
        for epoch in range(args.epochs):
            first = epoch * loader.steps_per_epoch
            batches = [loader.batch(first + step) for step in range(loader.steps_per_epoch)]
            laid = sum(batch.tokens for batch in batches)
            padding = 1 - sum(batch.real_tokens for batch in batches) / laid
            spec, sizes = loader.spec, ",".join(map(str, loader.shapes.sizes))
            print(
                f"{seed:>6} {epoch:>6} {100 * padding:>10.2f} {laid / plain:>7.4f} ({laid / shuffled:.4f}) "
                f"{sizes:>13}  {(spec.row_tokens, spec.scored, spec.slots, spec.pairs)}"
            )
    start = time.perf_counter()
    rows = pack(items, args.row_tokens)
    packed = time.perf_counter()
    build_rows(items, rows, spec_for(items, rows, args.row_tokens), len(rows))
    built = time.perf_counter()
    rates = [len(items) / seconds for seconds in (packed - start, built - packed, planned)]
    print("items/s: {:,.0f} packing, {:,.0f} laying rows, {:,.0f} planning an epoch\n".format(*rates))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("SERA_JAX_SHARED_DATA", ROOT.parent / "shared" / "data")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path(default), help="folder of real data")
    parser.add_argument("--tokenizer", default="mistral_7b_v01_tokenizer.json.gz", help="file in its tokenizers folder")
    parser.add_argument("--files", nargs="+", default=FILES, help="names in its preference folder")
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--row-multiple", type=int, default=1)
    parser.add_argument("--max-row-shapes", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    tokenizer_file = args.data / "tokenizers" / args.tokenizer
    if not tokenizer_file.is_file():
        print(f"skipped: no tokenizer at {tokenizer_file}; give the folder of real data with --data")
        return
    from tokenizers import Tokenizer

    with gzip.open(tokenizer_file, "rt", encoding="utf-8") as file:
        tokenizer = Tokenizer.from_str(file.read())
    for name in args.files:
        measure(name, read_lengths(args.data / "preference" / f"{name}.jsonl.gz", tokenizer), args)


if __name__ == "__main__":
    main()
