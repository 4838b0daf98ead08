"""What is left behind when pipelines end, normally or not?

A pipeline is launched many times. Of every five launches one is interrupted with SIGINT and one has its parent killed
with SIGKILL, each while requests are running; the others are closed. Five seconds later, the node processes, sockets,
folders and shared memory that are left are counted.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import build
import psutil

from benchmarks import harness
from onnxsplit.planning.planner import partition

TAKES = "2 min"

CALLER = """
import sys
import numpy as np
from runtime import Pipeline
with Pipeline.launch(sys.argv[1]) as pipeline:
    print(*(node.pid for node in pipeline.nodes), flush=True)
    for _ in range(100 if sys.argv[2] == "close" else 10**9):
        pipeline.run({"x": np.ones((1, 32), np.float32)})
"""


def present() -> dict[str, set[str]]:
    """Return the names of processes, sockets, folders and shared memory that could be left, by kind."""
    sockets = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if "onnxsplit" in line}
    processes = {
        str(p.pid)
        for p in psutil.process_iter(["cmdline"])
        if "runtime.node" in (p.info["cmdline"] or []) and p.status() != psutil.STATUS_ZOMBIE
    }
    folders = {str(path) for path in Path(tempfile.gettempdir()).glob("onnxsplit-*")}
    memory = {str(path) for path in Path("/dev/shm").iterdir()}
    return {"processes": processes, "sockets": sockets, "folders": folders, "shared memory": memory}


def main() -> None:
    """Print the counts."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--launches", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ends-benchmark-") as scratch:
        plan = Path(scratch) / "chain.plan"
        partition(build.save(build.chain(), Path(scratch)), stages=2, out=plan, costs="analytic")
        before = present()
        ways = {0: "SIGINT", 1: "SIGKILL"}
        counts: dict[str, int] = {}
        for number in range(given.launches):
            way = ways.get(number % 5, "close")
            counts[way] = counts.get(way, 0) + 1
            caller = subprocess.Popen(
                [sys.executable, "-P", "-c", CALLER, str(plan), way],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=harness.ROOT,
            )
            assert caller.stdout is not None
            assert len(caller.stdout.readline().split()) == 2
            if way != "close":
                caller.send_signal(signal.Signals[way])
            caller.wait(30)
            caller.stdout.close()
        time.sleep(5)  # leftovers are counted after five seconds
        left = {kind: sorted(names - before[kind]) for kind, names in present().items()}
    ended = ", ".join(f"{count} ended by {way}" for way, count in counts.items())
    remains = ", ".join(f"{len(names)} {kind}" for kind, names in left.items())
    harness.Report(given).row({"launches": counts, "left": left}, f"launches: {ended}\nleft after 5 s: {remains}")


if __name__ == "__main__":
    main()
