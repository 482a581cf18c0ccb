"""Memory of loading a checkpoint of 2 GB, as held, onto 8 simulated devices, and of exporting it from there.

    python tests/benchmarks/loading_memory.py [--file_dtype=bfloat16] [--param_dtype=float32] [--shard_bytes=5e8]

Writes a model of that size (0.5e9 float32 or 1e9 bfloat16 parameters; --layers for another), loads it in a process of
its own, exports it again, and prints in MB the bytes of the parameters as held and, as multiples of that, the largest
resident sizes of the process in both, less what it had before; mapped files are not counted, the parameters are. The
laws: loading stays below 1.3, exporting below 1.5 (no second copy); 1 is exited with where one does not hold. The
simulated devices share the memory of the process, so the multiples are of all of them together.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

DEVICES = 8
LIMITS = (1.3, 1.5)
MB = 10**6


def main() -> None:
    args = _parser().parse_args()
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={DEVICES}")
    if args.write:
        _write(args)
        return
    with tempfile.TemporaryDirectory(dir=args.work or None) as work:
        args.folder = str(pathlib.Path(work) / "model")
        subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--folder={args.folder}", "--write"], check=True)
        _measure(args)


def _measure(args: argparse.Namespace) -> None:
    import jax

    from sera_jax.mesh import make_mesh
    from sera_jax.models.huggingface import load_pretrained, save_pretrained

    mesh = make_mesh(1, DEVICES, 1)
    jax.block_until_ready([jax.device_put(0.0, device) for device in jax.devices()])
    before, peak, done = _resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _resident())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.monotonic()
    cfg, params = load_pretrained(args.folder, mesh=mesh, param_dtype=args.param_dtype)
    jax.block_until_ready(params)
    seconds, loading = time.monotonic() - start, peak[0]
    peak[0] = 0
    save_pretrained(f"{args.folder}-again", cfg, params, max_shard_bytes=int(args.shard_bytes))
    done.set()
    thread.join()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    ratios = [(most - before) / held for most in (loading, peak[0])]
    files = len(list(pathlib.Path(args.folder).glob("*.safetensors")))
    print(f"{args.file_dtype} in {files} files, held in {args.param_dtype} on {DEVICES} simulated devices")
    print(f"parameters {held / MB:.0f} MB; peak of loading {ratios[0]:.3f} times that, in {seconds:.1f} s")
    print(f"peak of exporting {ratios[1]:.3f} times that")
    sys.exit(int(any(ratio >= limit for ratio, limit in zip(ratios, LIMITS, strict=True))))


def _resident() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def _write(args: argparse.Namespace) -> None:
    import jax
    import numpy as np

    from sera_jax.models.config import ModelConfig
    from sera_jax.models.decoder import abstract_params
    from sera_jax.models.huggingface import save_pretrained

    layers = args.layers or (8 if args.param_dtype == "float32" else 18)
    cfg = ModelConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
        export_dtype=args.file_dtype,
    )
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float16), abstract_params(cfg))
    save_pretrained(args.folder, cfg, params, max_shard_bytes=int(args.shard_bytes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--file_dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--param_dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--shard_bytes", type=float, default=5e9)
    parser.add_argument("--work", default="", help="where the model is written; default the system's temporary folder")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
