"""What many pairs cost at the start of a run: reading and tokenizing them once, finding them again, planning, memory.

    python tests/benchmarks/million_pairs.py [--sizes 10000 100000 1000000] [--row-tokens 1536] [--work FOLDER]

For every size rows of two answers of about 200 tokens each to a prompt of about 50, in words of their own, a BPE of
them and a tiny model are written. A run of SeRA is started on it in a process of its own and stopped after its first
update of SFT, and then started again. Of both the table has, in seconds since the process began, when the corpus was
there and when the first update was done (the programs that both compile included), how long planning took, and the
peak of the process's own memory; beside it, in brackets, with the files that are mapped into it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time

START = time.monotonic()
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MB = 10**6
TIMES = ("corpus", "planning", "first update", "cpu")
WORDS = (40, 150, 150)  # of a prompt and its answers, in the mean


def write_rows(path: pathlib.Path, count: int) -> None:
    """Rows whose words are drawn by Zipf's law; their lengths are log-normal."""
    import numpy as np

    rng = np.random.default_rng(0)
    parts = ["".join(pair) for pair in zip("bdfgklmnprstvz" * 5, "aeiou" * 14)]
    words = np.unique(["".join(rng.choice(parts, rng.integers(1, 5))) for _ in range(30000)])
    rng.shuffle(words)
    share = np.cumsum(1 / np.arange(1, len(words) + 1))

    def text(mean: int) -> str:
        drawn = rng.random(max(3, int(mean * rng.lognormal(-0.125, 0.5)))) * share[-1]
        return " ".join(words[np.searchsorted(share, drawn)])

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = dict(zip(("prompt", "chosen", "rejected"), map(text, WORDS), strict=True))
            file.write(json.dumps(row) + "\n")


def write_model(folder: pathlib.Path, rows: pathlib.Path) -> None:
    import itertools

    import jax

    from sera_jax.data.bpe import train_bpe
    from sera_jax.data.tokenizing import Tokenizer
    from sera_jax.mesh import make_mesh
    from sera_jax.models.config import ModelConfig
    from sera_jax.models.huggingface import save_pretrained
    from sera_jax.training.parameters import load_params

    with rows.open(encoding="utf-8") as lines:
        texts = [text for line in itertools.islice(lines, 2000) for text in json.loads(line).values()]
    train_bpe(texts, 8192, out_dir=folder / "tokenizer")
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    cfg = ModelConfig(vocab_size=Tokenizer.load(folder / "tokenizer").vocab_size, num_key_value_heads=1, **size)  # type: ignore
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    save_pretrained(folder / "model", cfg, load_params(cfg, mesh, jax.random.key(0)))


def start(folder: pathlib.Path, row_tokens: int) -> None:
    """A run to its first update; prints what it took as JSON."""
    from configs.base import get_config
    from sera_jax import experiment
    from sera_jax.data import batches
    from sera_jax.experiment.methods import parse
    from sera_jax.loops import optimise
    from sera_jax.loops.runtime import Preempted

    seconds: dict[str, float] = {}
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], own_memory())

    def timed(owner, name, label, taken=False):
        made = getattr(owner, name)

        def wrapped(*args, **options):
            began = time.monotonic()
            found = made(*args, **options)
            seconds[label] = time.monotonic() - (began if taken else START)
            return found

        setattr(owner, name, wrapped)

    timed(experiment, "read_corpus", "corpus")
    timed(batches, "StepPlanner", "planning", taken=True)
    timed(optimise._Optimisation, "step", "first update")
    config = get_config()
    config.workdir = str(folder / "run")
    config.data.train = str(folder / "rows.jsonl")
    config.data.row_tokens = row_tokens
    config.data.eval_fraction = 0.001
    config.model.model_name_or_path = str(folder / "model")
    config.model.tokenizer_name_or_path = str(folder / "tokenizer")
    config.log.tensorboard = False
    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(Preempted):
        experiment.run(parse(config), stop_requested=lambda: "first update" in seconds)
    done.set()
    with_files = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**seconds, "own": peak[0], "all": with_files, "cpu": time.process_time()}))


def own_memory() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measure(count: int, args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.work or None) as work:
        folder = pathlib.Path(work)
        write_rows(folder / "rows.jsonl", count)
        write_model(folder, folder / "rows.jsonl")
        command = [sys.executable, __file__, f"--folder={folder}", f"--row-tokens={args.row_tokens}"]
        for which in ("first", "second"):
            made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found = json.loads(made.splitlines()[-1])
            took = " | ".join(f"{found[name]:.1f}" for name in TIMES)
            print(f"| {count:,} | {which} | {took} | {found['own'] / MB:.0f} ({found['all'] / MB:.0f}) |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--row-tokens", type=int, default=1536)
    parser.add_argument("--work", default="", help="where rows are written; default the system's temporary folder")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.folder:
        start(pathlib.Path(args.folder), args.row_tokens)
        return
    print(f"| pairs | start | {', s | '.join(TIMES)}, s | peak, MB |\n{'|---' * (len(TIMES) + 3)}|")
    for count in args.sizes:
        measure(count, args)


if __name__ == "__main__":
    main()
