"""What reading and tokenizing pairs costs, beside `datasets` and `tokenizers` doing the same job.

    python tests/benchmarks/reading_speed.py [--rows 100000] [--repeats 5] [--work FOLDER]

Rows of UltraFeedback's binarized form (a prompt, two conversations, the conversation, scores; JSON Lines) with two
answers of about 200 tokens to a prompt of about 50 are written, and a BPE of their words. Both sides make of every row
the tokens of the prompt and of both answers under the transcript template, and write them to disk: `load_preferences`
and `keeping` here, `load_dataset` and a batched `map` that joins strings and calls `encode_batch_fast` there. That the
tokens are the same is checked. Each side runs in a process of its own on one thread, one after the other; the table has
the CPU seconds of the work without the imports, in the median, and their ratio. It needs `pip install datasets`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
COLUMNS = ("prompt", "chosen", "rejected")


def write_rows(path: pathlib.Path, count: int) -> None:
    """Rows of words of `million_pairs`, as UltraFeedback (binarized) has them."""
    from tests.benchmarks import million_pairs

    plain = path.with_name("plain.jsonl")
    million_pairs.write_rows(plain, count)
    with plain.open(encoding="utf-8") as rows, path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(rows):
            row = {
                name: text.replace(" ka", ", ka").replace(" te", ".\n\nTe") for name, text in json.loads(line).items()
            }
            asked = {"content": row["prompt"], "role": "user"}
            sides = {side: [asked, {"content": row[side], "role": "assistant"}] for side in COLUMNS[1:]}
            about = {
                "prompt_id": f"{number:064x}",
                "messages": sides["chosen"],
                "score_chosen": 8.0,
                "score_rejected": 6.5,
            }
            file.write(json.dumps({"prompt": row["prompt"], **sides, **about}) + "\n")
    plain.unlink()


def write_tokenizer(folder: pathlib.Path, rows: pathlib.Path) -> None:
    import itertools

    from sera_jax.data.bpe import train_bpe

    with rows.open(encoding="utf-8") as lines:
        train_bpe(
            (json.loads(line)["chosen"][1]["content"] for line in itertools.islice(lines, 2000)), 8192, out_dir=folder
        )


def ours(folder: pathlib.Path) -> float:
    from sera_jax.data import keeping
    from sera_jax.data.loading import Limits, load_preferences
    from sera_jax.data.tokenizing import Tokenizer

    tokenizer, limits = Tokenizer.load(folder / "tokenizer"), Limits(10**5, 10**5, 10**6)
    spec, out = str(folder / "rows.jsonl"), folder / "ours"
    out.mkdir()
    began = time.process_time()
    keeping.keep(out, 2, [spec], lambda into: load_preferences(spec, tokenizer, limits=limits, into=into)[1])
    return time.process_time() - began


def theirs(folder: pathlib.Path) -> float:
    import datasets
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    bos, eos = "<|bos|>", tokenizer.token_to_id("<|eos|>")
    datasets.disable_progress_bars()

    def tokenize(batch):
        def ids(texts, end=()):
            return [[*found.ids, *end] for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

        answers = {side: ids([f" {talk[-1]['content']}" for talk in batch[side]], [eos]) for side in COLUMNS[1:]}
        return {"prompt": ids([f"{bos}\n\nHuman: {text}\n\nAssistant:" for text in batch["prompt"]]), **answers}

    began = time.process_time()
    cache = str(folder / "theirs")
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=cache)
    rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    return time.process_time() - began


def check_same(folder: pathlib.Path) -> None:
    """Both gave the same tokens."""
    import datasets
    import numpy as np

    from sera_jax.data import keeping

    items, report = keeping.kept(folder / "ours", "rows", [str(folder / "rows.jsonl")])
    (made,) = (folder / "theirs").rglob("cache-*.arrow")
    rows = datasets.Dataset.from_file(str(made))
    assert report.kept == len(rows) == len(items)
    for item, row in zip(items, rows, strict=True):
        for tokens, own in zip((item.prompt, *item.responses), map(row.get, COLUMNS), strict=True):
            assert np.array_equal(tokens, own), item.id


SIDES = {"ours": ours, "theirs": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", default="", help="where rows are written; default the system's temporary folder")
    parser.add_argument("--run", choices=[*SIDES, "check"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = pathlib.Path(args.folder)
    if args.run == "check":
        check_same(folder)
        return
    if args.run:
        print(SIDES[args.run](folder))
        return
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(dir=args.work or None) as work:
        folder = pathlib.Path(work)
        write_rows(folder / "rows.jsonl", args.rows)
        write_tokenizer(folder / "tokenizer", folder / "rows.jsonl")

        def run(what: str) -> str:
            command = [sys.executable, __file__, f"--run={what}", f"--folder={folder}"]
            return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

        for repeat in range(args.repeats):
            for side in SIDES:
                seconds[side].append(float(run(side).split()[-1]))
            if not repeat:
                run("check")
            subprocess.run(["rm", "-r", folder / "ours", folder / "theirs"], check=True)
    ours_, theirs_ = (statistics.median(found) for found in seconds.values())
    print("| pairs | CPU seconds here | datasets + tokenizers | ratio |\n|---|---|---|---|")
    print(f"| {args.rows:,} | {ours_:.1f} | {theirs_:.1f} | {ours_ / theirs_:.2f} |")
    print({side: [round(value, 2) for value in found] for side, found in seconds.items()})


if __name__ == "__main__":
    main()
