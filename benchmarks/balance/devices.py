"""Is a cut planned for different devices faster than an equal one?

Quotas of the kernel's CPU controller (cgroup v1 or v2, as root) limit the nodes to 100 %, 50 % and 25 % of a core;
without it nothing is measured. The pipelines of both cuts take turns.

With --hybrid: predicted throughput of stages and replicas planned for 2, 4 and 8 equal devices.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from onnxsplit.cluster import Cluster, Device
from onnxsplit.errors import PartitionError
from onnxsplit.partitioner import stage_memory
from onnxsplit.planning.examine import examine
from onnxsplit.planning.model_partitioner import model_partitioner
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import write_plan
from runtime import Pipeline

TAKES = "5 min"

SHARES = (1.0, 0.5, 0.25)
SLICE_S = 2.0


def mixed(name: str, model: Path, dims: dict[str, int], slices: int, folder: Path) -> dict[str, Any]:
    """The throughput of the planned cut and of the equal cut on the same shares of a core."""
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
                stack.enter_context(harness.held(node.pid, row[f"{kind}_devices"][node.stage]))
            pipelines[kind] = pipeline
        inputs = dict(subject.inputs)
        contenders = {kind: lambda p=p: harness.rate(p, inputs, SLICE_S) for kind, p in pipelines.items()}
        rates = harness.in_turns(contenders, slices)
    row |= {f"{kind}_per_s": statistics.median(values) for kind, values in rates.items()}
    row["ratio"] = harness.ratio(rates["planned"], rates["equal"]).median
    return row


def hybrid(name: str, model: Path, dims: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The predicted throughput of stages with replicas, of stages alone, and of replicas alone."""
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
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", metavar="NAME|MODEL.onnx")
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--hybrid", action="store_true", help="predict for equal devices instead")
    given = parser.parse_args()
    report = harness.Report(given)
    names = given.names or (["resnet50", "bert", "ocr-recognizer", "table"] if given.hybrid else ["resnet50", "bert"])
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        for name in names:
            model, dims = example_models.named(name, Path(folder))
            if given.hybrid:
                for row in hybrid(name, model, dims):
                    report.row(row, hybrid_text(row))
            else:
                row = mixed(name, model, dims, given.slices, Path(folder))
                report.row(row, mixed_text(row))


def mixed_text(row: dict[str, Any]) -> str:
    """A row as text."""
    lines = [f"{row['model']}: planned over equal {row['ratio']:.2f}"]
    for kind in ("planned", "equal"):
        stages = ", ".join(
            f"{time_ms:.1f} ms on {share:.0%}"
            for time_ms, share in zip(row[f"{kind}_ms"], row[f"{kind}_devices"], strict=True)
        )
        lines.append(f"  {kind:8} {row[f'{kind}_per_s']:7.2f}/s   stages: {stages}")
    return "\n".join(lines)


def hybrid_text(row: dict[str, Any]) -> str:
    """A row as text."""
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
