"""Memory of starting a model on simulated devices, fresh or from a Hugging Face folder, until its phase is stored.

    python tests/benchmarks/placement_memory.py [--layers=22] [--param_dtype=bfloat16] [--folder=DIR] [--work=DIR]

The shape is that of a decoder of 1.1e9 parameters (TinyLlama's: 22 layers, hidden size 2048). Without --folder the
parameters are fresh; with it they are read from there, and written there first where it is empty, in a process of its
own. Prints, in MB: the parameters' bytes, one device's part of them, the most that one device held at a time (arrays
that live, and what a program needs besides), and the largest resident size of the process less the files it has mapped.

The simulated devices share the memory of the process, so that its resident size is about the sum over all of them.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

DEVICES = 8
MB = 10**6


def main() -> None:
    args = _parser().parse_args()
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={DEVICES}")
    if args.write:
        _write(args)
        return
    if args.folder and not list(pathlib.Path(args.folder).glob("*.safetensors")):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--write"], check=True)
    with tempfile.TemporaryDirectory(dir=args.work or None) as work:
        _measure(args, pathlib.Path(work))


def _measure(args: argparse.Namespace, work: pathlib.Path) -> None:
    import jax

    from sera_jax.checkpoint import Workdir, arrays
    from sera_jax.core import Stream, key_for
    from sera_jax.data.packing import Layout
    from sera_jax.loops.runtime import Runtime
    from sera_jax.mesh import make_mesh, placed_shapes
    from sera_jax.models.decoder import abstract_params
    from sera_jax.training.parameters import load_params
    from sera_jax.writer import MetricWriter

    cfg, mesh = _config(args), make_mesh()
    held = _watch(jax, arrays)
    leaves = jax.tree.leaves(placed_shapes(mesh, abstract_params(cfg)))
    parts = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves]
    with MetricWriter(work, tensorboard=False) as writer, jax.set_mesh(mesh), _Resident() as resident:
        run = Runtime(
            cfg=cfg,
            mesh=mesh,
            workdir=Workdir(work, {}),
            writer=writer,
            seed=0,
            layout=Layout(64),
            chunk_tokens=64,
            stop_ids=(2,),
        )
        start, before = time.monotonic(), resident.now()
        run.store("base", {}, lambda: load_params(cfg, mesh, args.folder or key_for(0, Stream.INIT)))
        seconds = time.monotonic() - start
    print(f"{'from a folder' if args.folder else 'fresh'}, {cfg.param_dtype}, {DEVICES} simulated devices")
    print(f"parameters            {sum(leaf.size for leaf in leaves) / 1e9:10.3f} e9")
    for name, value in {
        "parameters, bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        "one device's part": sum(parts),
        "largest leaf's part": max(parts),
        "peak of one device": max(held),
        "resident before": before,
        "resident at the peak": resident.peak,
    }.items():
        print(f"{name:21} {value / MB:10.1f} MB")
    print(f"seconds               {seconds:10.1f}")


def _config(args: argparse.Namespace):
    from sera_jax.models.config import ModelConfig

    return ModelConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
        param_dtype=args.param_dtype,
        export_dtype=args.param_dtype,
    )


def _write(args: argparse.Namespace) -> None:
    from sera_jax.core import Stream, key_for
    from sera_jax.mesh import make_mesh
    from sera_jax.models.huggingface import save_pretrained
    from sera_jax.training.parameters import load_params

    cfg = _config(args)
    save_pretrained(args.folder, cfg, load_params(cfg, make_mesh(), key_for(0, Stream.INIT)), overwrite=True)


def _watch(jax, arrays) -> list[int]:
    """Bytes on the fullest device, noted whenever a parameter was made or a program runs."""
    noted = []

    def note(more: int = 0) -> None:
        held = dict.fromkeys(jax.devices(), 0)
        for array in jax.live_arrays():
            for device in array.sharding.device_set:
                held[device] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        noted.append(max(held.values()) + more)

    def watched(jitted):
        def call(*args):
            compiled = jitted.lower(*args).compile()
            memory = compiled.memory_analysis()
            note(memory.output_size_in_bytes + memory.temp_size_in_bytes)
            return compiled(*args)

        return call

    jit, make_array = jax.jit, jax.make_array_from_callback
    jax.jit = lambda function, **options: watched(jit(function, **options))
    arrays._sums = watched(arrays._sums)
    jax.make_array_from_callback = lambda *args: (make_array(*args), note())[0]
    return noted


class _Resident(threading.Thread):
    """Looks every 10 ms at the memory that the process holds besides mapped files."""

    peak, _done = 0, False

    @staticmethod
    def now() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def run(self) -> None:
        while not self._done:
            self.peak = max(self.peak, self.now())
            time.sleep(0.01)

    def __enter__(self) -> _Resident:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._done = True
        self.join()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--param_dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--folder", default="", help="a Hugging Face folder of this shape, or where to write one")
    parser.add_argument("--work", default="", help="where the phase is written; default the system's temporary folder")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
