"""Can a pipeline serve a model that is larger than any of its nodes?

The model is cut, fetched by hash, loaded and served under a memory limit at which one session cannot open it. The
benchmark needs root, the kernel's memory controller, and four times the model's size of disk. Every process is limited
twice: by its control group (with page cache) and by its address space. One session of the whole model cannot map its
weights in that address space; limited by the group alone, it is killed by the kernel when it packs them. Each node
fetches its stage into its own cache, over links with keys.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from benchmarks.example_models import LARGE_WIDTH
from onnxsplit.plan_files import load_plan
from runtime.wire.keys import create_for

TAKES = "10 min"

PORT = 5700


@contextmanager
def limited(name: str, limit_bytes: int) -> Iterator[Path]:
    """Make a control group of processes with a common memory limit."""
    first = Path("/sys/fs/cgroup/memory")
    group = (first if first.is_dir() else Path("/sys/fs/cgroup")) / f"onnxsplit-{os.getpid()}-{name}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")).write_text(str(limit_bytes))
    try:
        yield group
    finally:
        deadline = time.monotonic() + 5
        while group.exists() and time.monotonic() < deadline:
            with suppress(OSError):  # a process of the group has not ended yet
                group.rmdir()
            time.sleep(0.05)


def started(
    group: Path, *words: object, cache: Path, log: Path | None = None, space: int | None = None
) -> subprocess.Popen[Any]:
    """Start this Python with arguments in a group, with a limited address space."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    stream = log.open("wb") if log is not None else subprocess.DEVNULL
    narrow = f"ulimit -v {space >> 10} && " if space is not None else ""
    join = f'{narrow}echo $$ > {group}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", join, "sh", sys.executable, "-P", *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)


class Peak:
    """The largest anonymous and resident memory of some processes, sampled ten times a second."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.pids, self.anonymous, self.resident = pids, dict.fromkeys(pids, 0), dict.fromkeys(pids, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            for name, pid in self.pids.items():
                try:
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
                total = next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS")), 0)
                self.anonymous[name] = max(self.anonymous[name], values.get("RssAnon", 0))
                self.resident[name] = max(self.resident[name], total)


WHOLE = """
import sys, numpy as np
from pathlib import Path
from onnxsplit.session import open_session
session = open_session(Path(sys.argv[1]), threads=1)
np.save(sys.argv[2], session.run({'x': np.ones((1, WIDTH), np.float32)})[session.outputs[0][0]])
""".replace("WIDTH", str(LARGE_WIDTH))


def whole(model: Path, limit: int, place: Path) -> dict[str, Any]:
    """Try one session of the whole model under each limit; its outputs are in ``whole.npy`` afterwards."""
    figures: dict[str, Any] = {}
    for name, space in (("address_space", limit), ("group_alone", None)):
        with limited("whole", limit) as group:
            begun = time.monotonic()
            log = place / f"whole-{name}.log"
            process = started(group, "-c", WHOLE, model, place / "whole.npy", cache=place, space=space, log=log)
            figures[f"whole_under_{name}"] = status(process.wait(900))
            figures[f"whole_under_{name}_s"] = time.monotonic() - begun
            figures[f"whole_under_{name}_said"] = (log.read_text().splitlines() or [""])[-1][-150:]
    if not (place / "whole.npy").exists():  # the reference comes from a process without limits
        subprocess.run([sys.executable, "-P", "-c", WHOLE, str(model), str(place / "whole.npy")], check=True)
    return figures


def cut(model: Path, limit: int, place: Path, stages: int) -> dict[str, Any]:
    """Cut the model under the limit into ``m.plan``."""
    with limited("planner", limit) as group:
        begun = time.monotonic()
        words = ["-m", "onnxsplit", "partition", model, "-o", place / "m.plan", "--stages", stages]
        words += ["--costs", "analytic", "--dim", "batch=1"]
        planner = started(group, *words, cache=place, log=place / "planner.log")
        with Peak({"planner": planner.pid}) as peak:
            code = planner.wait(1200)
        if code:
            sys.exit((place / "planner.log").read_text())
        return {"plan_s": time.monotonic() - begun, "planner_bytes": peak.resident["planner"]}


def serve(limit: int, place: Path) -> dict[str, Any]:
    """Serve ``m.plan`` with nodes under the limit, and compare the answers with ``whole.npy``."""
    plan = place / "m.plan"
    create_for(place / "keys", ("node",))
    with ExitStack() as stack:
        address = f"tcp://127.0.0.1:{PORT}"
        served = stack.enter_context(limited("serve", limit))
        words = ["-c", CALLER, plan, address, place / "keys" / "coordinator", place / "whole.npy"]
        caller = started(served, *words, cache=place, log=place / "caller.log")
        pids = {"coordinator": caller.pid}
        nodes = []
        for stage in load_plan(plan, check_files=False).stages:
            group = stack.enter_context(limited(f"node{stage.index}", limit))
            words = ["-m", "onnxsplit", "node", "--connect", address, "--keys", place / "keys" / "node", "--fetch"]
            words += ["--stage", stage.index, "--no-shared-memory"]
            log, cache = place / f"node{stage.index}.log", place / f"cache{stage.index}"
            nodes.append(started(group, *words, cache=cache, log=log, space=limit))
            pids[f"node {stage.index}"] = nodes[-1].pid
        with Peak(pids) as peak:
            code = caller.wait(1200)
        for node in nodes:
            node.send_signal(signal.SIGTERM)
            node.wait(60)
        text = (place / "caller.log").read_text()
        if code:
            sys.exit(text + "".join((place / f"node{n}.log").read_text()[-1500:] for n in range(len(nodes))))
        answer: dict[str, Any] = json.loads(text.splitlines()[-1])
        return answer | {"anonymous_bytes": peak.anonymous, "resident_bytes": peak.resident}


def measure(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Make the model, run it whole, cut it and serve it."""
    limit = int(given.limit_gigabytes * (1 << 30))
    model = example_models.large(place, given.gigabytes)
    figures: dict[str, Any] = {"model_bytes": (place / "weights.bin").stat().st_size, "limit_bytes": limit}
    subprocess.run(["sh", "-c", "sync; echo 3 > /proc/sys/vm/drop_caches"], check=True)
    begun = time.monotonic()
    with (place / "weights.bin").open("rb") as stream:
        while stream.read(16 << 20):
            pass
    figures["read_s"] = time.monotonic() - begun
    return figures | whole(model, limit, place) | cut(model, limit, place, given.stages) | serve(limit, place)


CALLER = """
import json, sys, time
import numpy as np
from pathlib import Path
from runtime import Pipeline
begun = time.monotonic()
plan, bind, keys, wanted = sys.argv[1:]
with Pipeline.listen(plan, bind=bind, keys=Path(keys), shared_memory=False, start_timeout=1200) as pipeline:
    ready = time.monotonic() - begun
    one = {'x': np.ones((1, WIDTH), np.float32)}
    found = next(iter(pipeline.run(one).values()))
    difference = float(np.abs(found - np.load(wanted)).max() / np.abs(np.load(wanted)).max())
    begun = time.monotonic()
    for future in [pipeline.submit(one) for _ in range(20)]:
        future.result()
    print(json.dumps({'ready_s': ready, 'difference': difference, 'per_s': 20 / (time.monotonic() - begun)}))
""".replace("WIDTH", str(LARGE_WIDTH))


def status(code: int) -> str:
    """Describe how a process ended."""
    return "ran" if code == 0 else f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def main() -> None:
    """Print the figures."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--gigabytes", type=int, default=6, help="size of the model")
    parser.add_argument("--limit-gigabytes", type=float, default=2.5, help="memory of each process")
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="folder for the model")
    given = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("Memory limits need root.")
    report = harness.Report(given)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-larger-", dir=given.folder) as scratch:
        report.figures(measure(given, Path(scratch)))


if __name__ == "__main__":
    main()
