"""How many more requests does a pipeline answer that changes its plan when a device loses half of its core?

Nodes are started by hand (``onnxsplit node --connect``). Each is in a control group of its own, with the node that it
starts as its successor; a group has at first the same share of a core as the others: a whole one, or less where there
are more nodes than cores. Under a closed loop of two requests for each stage, the group of the first stage falls to
half, and `rebalance="auto"` does the rest. ``gain`` is the rate after the change over the drifted one, and ``planned
gain`` the rate that the new plan promises over the drifted one. Memory is the proportional set size of all node
processes: before the change, at the peak, of the new nodes alone, and after the change, with the first processes, which
wait for their successors. ``memory`` is the peak over the sum of the old nodes and the new ones. It needs root and the
kernel's CPU controller. The exit status is 1 if a request was lost or answered wrong.
"""

from __future__ import annotations

import argparse
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
from benchmarks.harness import CpuGroup
from benchmarks.recut.episode import episode
from benchmarks.recut.observed import ClosedLoop, History
from onnxsplit.cluster import Cluster, Device
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.session import host_cores
from runtime import Pipeline

TAKES = "10 min"

_SAMPLE_S = 0.25
_END_S = 30.0


class NodeMemory:
    """Samples the memory of all processes of some groups; a context manager."""

    def __init__(self, groups: list[CpuGroup]) -> None:
        self._groups = groups
        self._samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> NodeMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def most_mib(self, begin: float, end: float) -> float:
        """The largest sum of proportional set sizes between two moments of the monotonic clock."""
        return max((size for at, size in self._samples if begin <= at <= end), default=0) / 2**20

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_S):
            self._samples.append((time.monotonic(), sum(pss(pid) for group in self._groups for pid in group.pids)))


def pss(pid: int) -> int:
    """The proportional set size of a process in bytes; 0 if it has ended."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 0


@contextmanager
def node(address: str, stage: int, group: CpuGroup, log: Path) -> Iterator[None]:
    """Start a node by hand, in a group."""
    command = [sys.executable, "-P", "-m", "onnxsplit", "node", "--connect", address]
    with log.open("wb") as stream:
        process = subprocess.Popen([*command, "--stage", str(stage), "--threads", "1"], stdout=stream, stderr=stream)
    try:
        group.add(process.pid)
        yield
        process.wait(_END_S)  # it ends with its pipeline
    finally:
        process.kill()
        process.wait()


def measure(name: str, model: Path, dims: dict[str, int], stages: int, given: argparse.Namespace) -> dict[str, Any]:
    """Run one case; returns its row."""
    share = given.share or min(1.0, host_cores() / stages)
    with tempfile.TemporaryDirectory(prefix="quota-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        cluster = folder / "cluster.toml"
        devices = tuple(Device(name=f"cpu{number}") for number in range(stages))
        cluster.write_text(Cluster(devices, {}).to_toml())
        partition(model, out=folder / "m.plan", cluster=cluster, stages=stages, dims=dims)
        plan, example = load_plan(folder / "m.plan"), harness.example(folder / "m.plan")
        groups = [stack.enter_context(harness.cpu_group(f"{name}-{stage}", share)) for stage in range(stages)]
        address = f"ipc://{folder / 'control'}"
        for stage, group in enumerate(groups):
            stack.enter_context(node(address, stage, group, folder / f"{stage}.log"))
        memory = stack.enter_context(NodeMemory(groups))
        pipeline = stack.enter_context(Pipeline.listen(folder / "m.plan", bind=address, rebalance="auto"))
        wanted = pipeline.run(example)
        history = stack.enter_context(History(pipeline))
        loop = stack.enter_context(
            ClosedLoop(pipeline, 2 * stages, lambda _: example, lambda _, found: harness.right(found, wanted))
        )
        begun = time.monotonic()
        found = episode(pipeline, loop, history, lambda: groups[0].limit(share * given.falls_to), given.seconds)
        row: dict[str, Any] = {"model": name, "stages": stages, "share": share, **found.row}
        row["ops"] = [[stage.ops for stage in one.stages] for one in (plan, pipeline.plan)]
        if found.after is not None:
            loading, ended = found.loaded_s
            old, both = memory.most_mib(begun, loading), memory.most_mib(loading, ended)
            new = sum(pss(node.pid) for node in pipeline.nodes) / 2**20
            row |= {"old_mib": old, "both_mib": both, "new_mib": new, "memory": both / (old + new)}
            row["after_mib"] = memory.most_mib(ended + 1, time.monotonic())
    return row | {"answered": loop.sent - loop.lost, "lost": loop.lost, "wrong": loop.wrong, "errors": loop.errors}


def main() -> None:
    """Print a row for each case; exit with 1 if a request was lost or answered wrong."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=["resnet50", "bert"], metavar="NAME|MODEL.onnx")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--share", type=float, help="share of a core that each node has at first")
    parser.add_argument("--falls-to", type=float, default=0.5, help="share of its share that the first node is left")
    parser.add_argument("--seconds", type=float, default=20.0, help="time that is measured before and after the change")
    parser.add_argument("--models", type=Path, help="folder that keeps exported models")
    given = parser.parse_args()
    report = harness.Report(
        given,
        model="10", stages="6", before="6.2f", drifted="7.2f", loading="7.2f", after="6.2f",
        gain="5.2f", planned_gain="12.2f", while_loading="13.2f", swap_s="6.1f",
        old_mib="7.0f", both_mib="8.0f", new_mib="7.0f", after_mib="9.0f", memory="6.2f", lost="4", wrong="5",
    )  # fmt: skip
    failed = 0
    with tempfile.TemporaryDirectory(prefix="models-") as scratch:
        for name in given.names:
            model, dims = example_models.named(name, given.models or Path(scratch))
            for stages in given.stages:
                row = measure(Path(name).stem, model, dims, stages, given)
                report.row(row)
                failed += row["lost"] + row["wrong"]
                report.note(f"{'changed' if 'after' in row else 'no change'}: {row['why']}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
