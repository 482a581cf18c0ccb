"""A process that holds one worker's model and does a round of work when it is asked to.

    python -m tests.benchmarks.bench.worker MODULE WORK INPUTS

One line of JSON on standard output for every line of standard input: `check`, `round` or `peak`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pathlib
import resource
import sys
import time


def main() -> None:
    module, name, folder = sys.argv[1:]
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        peer = importlib.import_module(f"tests.benchmarks.bench.{module}")
        work = peer.work(name, pathlib.Path(folder))
        print(json.dumps({"name": peer.NAME}), file=out, flush=True)
        for line in sys.stdin:
            start, cpu = time.perf_counter(), time.process_time()
            asked = line.strip()
            if asked == "peak":
                found = peer.peak()
            else:
                found = {"values": work.check()} if asked == "check" else dict(work.round())
            found |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
            found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
            print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    main()
