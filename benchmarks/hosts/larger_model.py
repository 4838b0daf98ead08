"""A model larger than any node: cut, sent by hash, loaded and served where one session cannot even open it.

    python benchmarks/hosts/larger_model.py [--gigabytes 6] [--limit-gigabytes 2.5] [--stages 4] [--folder DIR] [--json]

Needs root and the kernel's memory controller: every process is held to the limit twice, by its control group (page
cache counted) and by its address space. One session of the whole model cannot even map its weights in that address
space; held by the group alone, it is killed by the kernel when it packs them. Nodes fetch their stages into a cache of
their own, over links with keys. Needs four times the model's size of disk.
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

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

from environment import benchmark, environment_line

from onnxsplit.plan_files import load_plan
from runtime.wire.keys import create_for

WIDTH = 4096
PORT = 5700


@contextmanager
def limited(name: str, limit_bytes: int) -> Iterator[Path]:
    """A group of processes that may not take more memory together."""
    first = Path("/sys/fs/cgroup/memory")
    group = (first if first.is_dir() else Path("/sys/fs/cgroup")) / f"onnxsplit-{os.getpid()}-{name}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")).write_text(str(limit_bytes))
    try:
        yield group
    finally:
        deadline = time.monotonic() + 5
        while group.exists() and time.monotonic() < deadline:
            with suppress(OSError):  # somebody in it is not gone yet
                group.rmdir()
            time.sleep(0.05)


def started(
    group: Path, *words: object, cache: Path, log: Path | None = None, space: int | None = None
) -> subprocess.Popen[Any]:
    """A command of this Python in a group, with so much address space."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    stream = log.open("wb") if log is not None else subprocess.DEVNULL
    narrow = f"ulimit -v {space >> 10} && " if space is not None else ""
    join = f'{narrow}echo $$ > {group}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", join, "sh", sys.executable, "-P", *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)


class Peak:
    """The largest anonymous and whole memory of some processes, looked at ten times a second."""

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
""".replace("WIDTH", str(WIDTH))


def measure(given: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Everything."""
    limit = int(given.limit_gigabytes * (1 << 30))
    model = benchmark("cutting/large_models").make(place, given.gigabytes)
    found: dict[str, Any] = {"model_bytes": (place / "weights.bin").stat().st_size, "limit_bytes": limit}
    subprocess.run(["sh", "-c", "sync; echo 3 > /proc/sys/vm/drop_caches"], check=True)
    begun = time.monotonic()
    with (place / "weights.bin").open("rb") as stream:
        while stream.read(16 << 20):
            pass
    found["read_s"] = time.monotonic() - begun
    for name, space in (("address_space", limit), ("group_alone", None)):
        with limited("whole", limit) as group:
            begun = time.monotonic()
            log = place / f"whole-{name}.log"
            whole = started(group, "-c", WHOLE, model, place / "whole.npy", cache=place, space=space, log=log)
            found[f"whole_under_{name}"] = status(whole.wait(900))
            found[f"whole_under_{name}_s"] = time.monotonic() - begun
            found[f"whole_under_{name}_said"] = (log.read_text().splitlines() or [""])[-1][-150:]
    if not (place / "whole.npy").exists():  # what the answers are compared with comes from a process without limits
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-P", "-c", WHOLE, str(model), str(place / "whole.npy")]
        subprocess.run(command, env=environment, check=True)
    plan = place / "m.plan"
    with limited("planner", limit) as group:
        begun = time.monotonic()
        words = ["-m", "onnxsplit", "partition", model, "-o", plan, "--stages", given.stages, "--costs", "analytic"]
        planner = started(group, *words, "--dim", "batch=1", cache=place, log=place / "planner.log")
        with Peak({"planner": planner.pid}) as peak:
            code = planner.wait(1200)
        if code:
            sys.exit((place / "planner.log").read_text())
        found |= {"plan_s": time.monotonic() - begun, "planner_bytes": peak.resident["planner"]}
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
            node = started(group, *words, cache=cache, log=log, space=limit)
            nodes.append(node)
            pids[f"node {stage.index}"] = node.pid
        with Peak(pids) as peak:
            code = caller.wait(1200)
        for node in nodes:
            node.send_signal(signal.SIGTERM)
            node.wait(60)
        text = (place / "caller.log").read_text()
        if code:
            sys.exit(text + "".join((place / f"node{n}.log").read_text()[-1500:] for n in range(len(nodes))))
        found |= json.loads(text.splitlines()[-1])
        found |= {"anonymous_bytes": peak.anonymous, "resident_bytes": peak.resident}
    return found


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
""".replace("WIDTH", str(WIDTH))


def status(code: int) -> str:
    """An exit status in words."""
    return "ran" if code == 0 else f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=int, default=6)
    parser.add_argument("--limit-gigabytes", type=float, default=2.5)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("limits of memory need root")
    with tempfile.TemporaryDirectory(prefix="onnxsplit-larger-", dir=given.folder) as scratch:
        found = measure(given, Path(scratch))
    if given.json:
        print(json.dumps(found))
        return
    print(environment_line() + "\n")
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {size / (1 << 20):.0f} MiB" for key, size in value.items())
        elif name.endswith("_bytes"):
            value = f"{value / (1 << 20):.0f} MiB"
        elif isinstance(value, float):
            value = f"{value:.3g}"
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()
