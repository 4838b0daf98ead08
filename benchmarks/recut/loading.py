"""How much slower is a busy pipeline while another plan loads beside it, and how long does loading take?

A model in two stages, with one thread each, keeps two cores busy. In each round, the same plan is loaded beside it in
every way once, in random order: at normal priority, at idle priority for at most 2, 5 and 10 s (a pipeline that changes
its plan loads for at most 5 s so), and at normal priority one node after another. The rate while loading is divided by
the rate in the seconds before. Medians over the rounds.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from benchmarks.recut.observed import ClosedLoop
from onnxsplit.planning.planner import partition
from runtime import Pipeline
from runtime.launch.local import LocalHandle, LocalLauncher

TAKES = "10 min"

_ARENA_BYTES = 256 << 20
_LOOK_S = 0.05


class OneAfterAnother(LocalLauncher):
    """Starts all nodes, and suspends each until the log of the one before says that it has loaded its stage."""

    def start(self, *, stage: int, replica: int, **words: Any) -> LocalHandle:
        """As :meth:`.LocalLauncher.start`; the node is suspended unless it is that of the first stage."""
        handle = super().start(stage=stage, replica=replica, **words)
        if stage:
            os.kill(handle.pid, signal.SIGSTOP)
            threading.Thread(target=self._resume, args=(handle.pid, stage), daemon=True).start()
        return handle

    def _resume(self, pid: int, stage: int) -> None:
        log = self.folder / f"node-{stage - 1}.0.log"
        with suppress(OSError):  # the nodes were given up
            while b"stage loaded" not in log.read_bytes():
                time.sleep(_LOOK_S)
            os.kill(pid, signal.SIGCONT)


def launcher(way: str) -> LocalLauncher:
    """The launcher for a way of loading."""
    if way == "one after another":
        return OneAfterAnother(memory_bytes=_ARENA_BYTES)
    seconds = float(way.split()[1]) if way.startswith("idle") else 0.0
    return LocalLauncher(memory_bytes=_ARENA_BYTES, background_s=seconds)


def main() -> None:
    """Print a row for each way of loading."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("name", nargs="?", default="resnet50", metavar="NAME|MODEL.onnx")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="time without loading before each loading")
    parser.add_argument("--idle", nargs="*", type=float, default=[2, 5, 10], help="seconds at idle priority")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    report = harness.Report(given, way="17", per_s="6.2f", ratio="6.2f", least="6.2f", most="6.2f", ready_s="7.2f")
    ways = ["normal", *(f"idle {seconds:g} s" for seconds in given.idle), "one after another"]
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    source = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="loading-") as scratch:
        folder = Path(scratch)
        model, dims = example_models.named(given.name, folder)
        partition(model, stages=2, out=folder / "m.plan", dims=dims)
        inputs = harness.example(folder / "m.plan")
        with (
            Pipeline.launch(folder / "m.plan", threads=1) as pipeline,
            ClosedLoop(pipeline, 4, lambda _: inputs, lambda _number, _outputs: True) as loop,
        ):
            for _ in range(given.rounds):
                for way in source.sample(ways, len(ways)):
                    begun = time.monotonic()
                    time.sleep(given.seconds)
                    loading = time.monotonic()
                    with Pipeline.launch(folder / "m.plan", launcher=launcher(way), threads=1, start_timeout=120):
                        ready = time.monotonic()
                    before = loop.answers.between(begun, loading).per_s
                    found[way].append((before, loop.answers.between(loading, ready).per_s / before, ready - loading))
    for way, rounds in found.items():
        rates, ratios, seconds = zip(*rounds, strict=True)
        row = {"way": way, "per_s": statistics.median(rates), "ratio": statistics.median(ratios)}
        report.row(row | {"least": min(ratios), "most": max(ratios), "ready_s": statistics.median(seconds)})


if __name__ == "__main__":
    main()
