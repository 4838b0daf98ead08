"""Devices that are not alike, for real: nodes held to 100 %, 50 % and 25 % of a core, a planned cut and an equal one.

    python benchmarks/balance/devices.py [NAME|MODEL.onnx ...] [--slices 10] [--json]
    python benchmarks/balance/devices.py --hybrid [NAME ...]    stages and replicas planned for 2, 4 and 8 alike devices

The shares are quotas of the kernel's CPU controller (cgroup v1 or v2, as root); without it nothing is measured. The two
pipelines take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

from environment import benchmark, environment_line

from onnxsplit.cluster import Cluster, Device
from onnxsplit.errors import PartitionError
from onnxsplit.partitioner import stage_memory
from onnxsplit.planning.model_partitioner import model_partitioner
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import write_plan
from onnxsplit.planning.subject import examine
from runtime import Pipeline

SHARES = (1.0, 0.5, 0.25)
PERIOD_US = 20_000
SLICE_S = 2.0


@contextmanager
def held(pid: int, share: float) -> Iterator[None]:
    """Hold a process to a share of one core."""
    first = Path("/sys/fs/cgroup/cpu")
    group = (first if first.is_dir() else Path("/sys/fs/cgroup")) / f"onnxsplit-{os.getpid()}-{pid}"
    group.mkdir()
    try:
        quota = round(share * PERIOD_US)
        if first.is_dir():
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        for member in (group / "cgroup.procs").read_text().split():
            (group.parent / "cgroup.procs").write_text(member)
        group.rmdir()


def rate(pipeline: Pipeline, inputs: dict[str, Any], seconds: float) -> float:
    """Requests a second with the pipeline kept full."""
    pending = [pipeline.submit(inputs) for _ in range(6)]
    count, begun = 0, time.monotonic()
    while time.monotonic() - begun < seconds:
        pending.pop(0).result()
        count += 1
        pending.append(pipeline.submit(inputs))
    elapsed = time.monotonic() - begun
    for future in pending:
        future.result()
    return count / elapsed


def mixed(name: str, model: Path, dims: dict[str, int], slices: int, folder: Path) -> dict[str, Any]:
    """Throughput of the planned cut and of the equal cut on the same shares."""
    subject = examine(model, dims=dims, threads=1)
    row: dict[str, Any] = {"model": name}
    with ExitStack() as stack:
        pipelines = {}
        for kind, speeds in (("planned", SHARES), ("equal", (1.0,) * len(SHARES))):
            devices = tuple(Device(name=f"cpu{i}", speed=speed) for i, speed in enumerate(speeds))
            file = folder / f"{kind}.toml"
            file.write_text(Cluster(devices, {}).to_toml())
            made = write_plan(subject, folder / f"{kind}.plan", CutOptions(cluster=file, stages=len(SHARES)))
            row[f"{kind}_ms"] = [(s.measured_time_ns or 0) / 1e6 for s in made.plan.stages]
            share_of = {f"cpu{i}": share for i, share in enumerate(SHARES)}
            row[f"{kind}_devices"] = [share_of[s.device or ""] for s in made.plan.stages]
            pipeline = stack.enter_context(Pipeline.launch(folder / f"{kind}.plan"))
            for node in pipeline.nodes:
                stack.enter_context(held(node.pid, row[f"{kind}_devices"][node.stage]))
            pipelines[kind] = pipeline
        inputs = dict(subject.inputs)
        rates: dict[str, list[float]] = {kind: [] for kind in pipelines}
        for _ in range(slices):
            for kind, pipeline in pipelines.items():
                rates[kind].append(rate(pipeline, inputs, SLICE_S))
    for kind, found in rates.items():
        row[f"{kind}_per_s"] = statistics.median(found)
    row["ratio"] = statistics.median(a / b for a, b in zip(rates["planned"], rates["equal"], strict=True))
    return row


def hybrid(name: str, model: Path, dims: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Predicted throughput of a plan of stages and replicas, a pure pipeline, and pure data parallel."""
    subject = examine(model, dims=dims, threads=1)
    whole = subject.problem(subject.costs.time_ns)
    everything = stage_memory(whole, (0,) * whole.atoms, 1)[0]
    for cap in (None, everything // 2):
        for devices in (2, 4, 8):
            row: dict[str, Any] = {"name": name, "devices": devices, "max_memory": cap}
            for parallel in ("hybrid", "model", "data"):
                options = CutOptions(
                    parallel=parallel,
                    devices=devices,
                    stages={"model": devices, "data": 1}.get(parallel),
                    max_memory=cap,
                )
                try:
                    chosen = model_partitioner(subject, options, lambda _: None)(subject.costs.time_ns)
                    row[parallel] = 1e9 / chosen.score.bottleneck_ns
                    if parallel == "hybrid":
                        row["replicas"] = [len(group) for group in chosen.partition.devices]
                        row["gap"] = chosen.gap
                except PartitionError:
                    row[parallel] = None
            yield row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--hybrid", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    throughput = benchmark("data_path/throughput")
    if not given.json:
        print(environment_line())
    names = given.names or (["resnet50", "bert", "ocr-recognizer", "table"] if given.hybrid else ["resnet50", "bert"])
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        for name in names:
            model, dims = throughput.model_of(name, Path(folder))
            if given.hybrid:
                for row in hybrid(name, model, dims):
                    print(json.dumps(row) if given.json else hybrid_text(row), flush=True)
            else:
                row = mixed(name, model, dims, given.slices, Path(folder))
                print(json.dumps(row) if given.json else mixed_text(row), flush=True)


def mixed_text(row: dict[str, Any]) -> str:
    """A row for people."""
    lines = [f"{row['model']}: planned over equal {row['ratio']:.2f}"]
    for kind in ("planned", "equal"):
        stages = ", ".join(
            f"{time_ms:.1f} ms on {share:.0%}"
            for time_ms, share in zip(row[f"{kind}_ms"], row[f"{kind}_devices"], strict=True)
        )
        lines.append(f"  {kind:8} {row[f'{kind}_per_s']:7.2f}/s   stages: {stages}")
    return "\n".join(lines)


def hybrid_text(row: dict[str, Any]) -> str:
    """A row for people."""
    cap = "no limit" if row["max_memory"] is None else f"{row['max_memory'] / (1 << 20):.0f} MiB"

    def shown(rate: float | None) -> str:
        return "does not fit" if rate is None else f"{rate:10.1f}/s"

    replicas = "+".join(map(str, row.get("replicas", []))) or "-"
    return (
        f"{row['name']:16} {row['devices']} devices, {cap:10}  hybrid {shown(row['hybrid'])} ({replicas}, gap "
        f"{row.get('gap', 0):.1%})  pipeline {shown(row['model'])}  "
        f"data {shown(row['data'])}"
    )


if __name__ == "__main__":
    main()
