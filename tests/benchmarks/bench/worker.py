"""A process that holds one worker's model and does a round of work when it is asked to.

    python -m tests.benchmarks.bench.worker MODULE WORK INPUTS

One line of JSON on standard output for every line of standard input: `check` or `round`. `peak_mb` is the most memory
that the process had since the last answer (without Linux: since it started).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pathlib
import re
import resource
import sys
import time


def main() -> None:
    module, name, folder = sys.argv[1:]
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        peer = importlib.import_module(f"tests.benchmarks.bench.{module}")
        if name not in getattr(peer, "WORKS", {name}):
            sys.exit(f"it has no {name}")
        work = peer.work(name, pathlib.Path(folder))
        print(json.dumps({"name": peer.NAME}), file=out, flush=True)
        for line in sys.stdin:
            start, cpu = time.perf_counter(), time.process_time()
            found = {"values": work.check()} if line.strip() == "check" else dict(work.round())
            found |= getattr(peer, "compiled", dict)()
            found |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "peak_mb": _peak_mb()}
            print(json.dumps(found), file=out, flush=True)


def _peak_mb() -> float:
    """Since the last call."""
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        return int(peak[1]) / 1024 if peak else 0.0
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
