"""The same work by sera_jax and its peers, in turns; a table, and the same as JSON.

    python -m tests.benchmarks.bench [--works W1 W2] [--repeats 5] [--check] [--json bench.json]

Every worker is a process of its own with its model loaded; rounds are asked for in turn, so that a busy machine slows
all alike. Before anything is timed the workers' numbers are compared (log-probs, greedy tokens), and a peer
that differs is left out. A round during which other processes took more than a tenth of the cores is busy: their number
stands beside the row.

tokens/s count real tokens, a prompt once per response; the ratio is ours to the best peer's, above 1 is faster. Of our
own side a line says what share of the matmul peak it reached, counting what real tokens need alone (no padding, nothing
computed again, a shared prompt once, visible keys only), and what it compiled. `peak` is the most memory that the
worker's process had in a round. --check ends with 1 where a goal is missed. A peer that cannot be imported, or has no
such work, is left out by name; so is work whose environment variables are not set (`works.Bench.needs`). Tunix and
EasyDeL need other versions of what TRL needs too, so each has an environment of its own.
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
from typing import Any

from tests.benchmarks.bench.works import BENCHES

OURS, YARDSTICK = "ours", "yardstick"
PEERS = {  # and whose Python runs them
    "trl_peer": sys.executable,
    "tunix_peer": ".venv-tunix/bin/python",
    "easydel_peer": ".venv-easydel/bin/python",
}
BUSY = 0.1  # of the cores, by other processes
AGREE = 2e-3  # relative, of log-probs of whole responses in float32


class Worker:
    """A process, asked by lines."""

    def __init__(self, module: str, work: str, inputs: pathlib.Path, python: str = sys.executable) -> None:
        command = [python, "-m", "tests.benchmarks.bench.worker", module, work, str(inputs)]
        self.module, self.log = module, tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.rounds: list[dict[str, Any]] = []
        self.name = self._line()["name"]

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        before = _used()
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        found = self._line()
        used = _used() - before - found["cpu"]
        return found | {"busy": used > BUSY * found["seconds"] * (os.cpu_count() or 1)}

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        raise RuntimeError(f"{self.module} ended: {self.log.read().strip().splitlines()[-1:]}")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def _used() -> float:
    """Seconds that all cores were busy since the machine started; 0 where that is not known."""
    try:
        user, nice, system, *_ = map(int, pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def measure(name: str, inputs: pathlib.Path, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    yardstick, workers, checks, furthest = Worker(YARDSTICK, name, inputs), [], [], 0.0
    try:
        yardstick.ask("check")
        workers.append(Worker(OURS, name, inputs))
        checks.append(workers[0].ask("check"))
        for module, python in PEERS.items():
            try:
                peer = Worker(module, name, inputs, python)
                check = peer.ask("check")
            except (RuntimeError, OSError) as error:
                print(f"{name}: {module} is left out: {error}", flush=True)
                continue
            apart = _apart(checks[0]["values"], check["values"])
            if apart > AGREE:
                print(f"{name}: {module} is left out: it differs by {apart:.1e}, more than {AGREE}", flush=True)
                peer.end()
                continue
            workers.append(peer)
            checks.append(check)
            furthest = max(furthest, apart)
        peaks = []
        for _ in range(repeats):
            peaks.append(yardstick.ask("round"))
            for worker in workers:
                worker.rounds.append(worker.ask("round"))
        return _row(name, workers, checks, peaks, furthest)
    finally:
        for worker in (yardstick, *workers):
            worker.end()


def _apart(ours: list[float], theirs: list[float]) -> float:
    scale = max([1e-9, *map(abs, ours)])
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0) / scale


def _row(
    name: str, workers: list[Worker], checks: list[dict[str, Any]], peaks: list[dict[str, Any]], apart: float
) -> dict[str, Any]:
    rate = BENCHES[name].unit == "tokens/s"

    def figure(one: dict[str, Any]) -> float:
        return (
            one["tokens"] / one["seconds"] if rate else one["seconds"] / (1 if name == "W5" else one.get("repeats", 1))
        )

    found = {}
    for worker, check in zip(workers, checks, strict=True):
        figures = [figure(one) for one in worker.rounds]
        found[worker.module] = {
            "name": worker.name,
            "median": statistics.median(figures),
            "least": min(figures),
            "most": max(figures),
            "first_call_s": check["seconds"],
            "peak_mb": max(one["peak_mb"] for one in worker.rounds),
            "busy_rounds": sum(one["busy"] for one in worker.rounds),
        }
    ours, peers = found[OURS], [found[m] for m in found if m != OURS]
    peak = statistics.median(one["matmul_gflops"] for one in peaks)
    rounds = workers[0].rounds
    ratio = memory = None
    if peers:
        best = (max if rate else min)(peer["median"] for peer in peers)
        ratio = ours["median"] / best if rate else best / ours["median"]
        memory = ours["peak_mb"] / min(peer["peak_mb"] for peer in peers)
    return {
        "work": name,
        "what": BENCHES[name].what,
        "unit": BENCHES[name].unit,
        "goal": BENCHES[name].goal,
        "ratio": ratio,
        "memory_ratio": memory,
        "share_of_peak": statistics.median(one["flops"] / one["seconds"] for one in rounds) / (1e9 * peak),
        "programs": checks[0]["programs"],
        "compile_s": checks[0]["compile_s"],
        "compiled_while_timed": rounds[-1]["programs"] - checks[0]["programs"],
        "apart": apart,
        "matmul_gflops": peak,
        "bandwidth_gbs": statistics.median(one["bandwidth_gbs"] for one in peaks),
        "workers": found,
    }


def _print(row: dict[str, Any]) -> None:
    print(f"{row['work']}: {row['what']} ({row['unit']})", flush=True)
    for module, one in row["workers"].items():
        busy = f", {one['busy_rounds']} busy rounds" if one["busy_rounds"] else ""
        print(
            f"  {one['name'] if module != OURS else 'sera_jax':62}{one['median']:10.2f} ({one['least']:.2f} to "
            f"{one['most']:.2f}), first call {one['first_call_s']:.0f} s, peak {one['peak_mb']:.0f} MB{busy}"
        )
    if row["ratio"] is not None:
        reached = "reached" if row["ratio"] >= row["goal"] else "missed"
        print(f"  ratio {row['ratio']:.2f}, goal {row['goal']}: {reached}; memory ratio {row['memory_ratio']:.2f}")
    print(
        f"  float32 matmul {row['matmul_gflops']:.0f} GFLOP/s, {row['share_of_peak']:.2f} of it ours; vectors "
        f"{row['bandwidth_gbs']:.1f} GB/s; {row['programs']} programs compiled in {row['compile_s']:.0f} s, "
        f"{row['compiled_while_timed']} more while timed",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default="", help="where the figures are written")
    parser.add_argument("--check", action="store_true", help="end with 1 where a ratio misses its goal")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        inputs = pathlib.Path(folder)
        subprocess.run(
            [sys.executable, "-c", "import pathlib, sys; from tests.benchmarks.bench import ours;"
             "ours.make_inputs(pathlib.Path(sys.argv[1]))", folder], check=True)  # fmt: skip
        for name in args.works:
            if absent := [variable for variable in BENCHES[name].needs if not os.environ.get(variable)]:
                print(f"{name}: left out: {', '.join(absent)} is not set", flush=True)
                continue
            start = time.monotonic()
            rows.append(measure(name, inputs, args.repeats))
            rows[-1]["took_s"] = time.monotonic() - start
            _print(rows[-1])
            if args.json:
                pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    missed = [row["work"] for row in rows if row["ratio"] is None or row["ratio"] < row["goal"]]
    if args.check and missed:
        print(f"missed: {', '.join(missed)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
