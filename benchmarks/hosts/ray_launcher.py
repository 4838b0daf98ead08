"""How does the Ray launcher compare with the local one, and what happens when a host is killed?

Start-up, placement and throughput are compared with the local launcher; then hosts are killed under load. The cluster's
four hosts are processes of this one (``ray.cluster_utils.Cluster``), with Ray's default time to notice a dead host.
Tensors take the same path with both launchers, which take turns.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from onnxsplit.plan_files import load_plan
from onnxsplit.session import open_session
from runtime import Pipeline
from runtime.launch.ray import RayLauncher

TAKES = "5 min"

HOSTS = 4
SLICE_S = 1.0
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "memory": 3 << 30}


def cluster() -> Any:
    """Start a head that runs nothing, and four hosts."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "node_name": "head", "include_dashboard": False, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.hosts = {f"h{n}": made.add_node(wait=False, node_name=f"h{n}", **NODE) for n in range(HOSTS)}
    made.wait_for_nodes()
    return made


def throughput(plan: Path, inputs: dict[str, Any], slices: int) -> dict[str, Any]:
    """Measure both launchers in turns, each alone for its slice."""
    begun = time.monotonic()
    with Pipeline.launch(plan, threads=1) as local:
        local_s = time.monotonic() - begun
        begun = time.monotonic()
        with Pipeline.launch(plan, launcher=RayLauncher(load_plan(plan)), threads=1) as ray:
            ray_s = time.monotonic() - begun
            hosts = [node.host for node in ray.nodes]
            contenders = {
                "ray": lambda: harness.rate(ray, inputs, SLICE_S),
                "local": lambda: harness.rate(local, inputs, SLICE_S),
            }
            rates = harness.in_turns(contenders, slices)
    return {
        "start_local_s": local_s,
        "start_ray_s": ray_s,
        "hosts": hosts,
        "ray_per_s": statistics.median(rates["ray"]),
        "local_per_s": statistics.median(rates["local"]),
        "ratio": str(harness.ratio(rates["ray"], rates["local"])),
    }


def kills(plan: Path, model: Path, inputs: dict[str, Any], made: Any, times: int) -> list[dict[str, Any]]:
    """Kill hosts that have a node under load; after each, another host joins the cluster."""
    wanted = open_session(model, threads=1).run(inputs)
    rows = []
    launcher = RayLauncher(load_plan(plan), placement="strict-spread")
    with Pipeline.launch(plan, launcher=launcher, threads=1) as pipeline:
        for number in range(times):
            lost = pipeline.nodes[number % len(pipeline.nodes)].host
            row = {"killed": lost, "answered": 0, "wrong": 0, "longest_s": 0.0}
            pending = [pipeline.submit(inputs) for _ in range(4)]
            before = len(pipeline.incidents)
            begun = time.monotonic()
            made.remove_node(made.hosts.pop(lost), allow_graceful=False)
            while len(pipeline.incidents) == before or not all(node.state == "ready" for node in pipeline.nodes):
                asked = time.monotonic()
                outputs = pending.pop(0).result(120)
                row["longest_s"] = max(row["longest_s"], time.monotonic() - asked)
                row["answered"] += 1
                row["wrong"] += not harness.right(outputs, wanted)
                pending.append(pipeline.submit(inputs))
            row["healed_s"] = time.monotonic() - begun
            row["answered"] += sum(1 for future in pending if future.result(120))
            row["now"] = [node.host for node in pipeline.nodes]
            rows.append(row)
            name = f"h{HOSTS + number}"
            made.hosts[name] = made.add_node(node_name=name, **NODE)
    return rows


def main() -> None:
    """Print the tables."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("model", nargs="?", default="ocr-recognizer", metavar="NAME|MODEL.onnx")
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3, help="number of hosts to kill, one after the other")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        plan = example_models.named_plan(given.model, Path(scratch))
        model, _ = example_models.named(given.model, Path(scratch))
        inputs = harness.example(plan)
        begun = time.monotonic()
        made = cluster()
        figures: dict[str, Any] = {"model": given.model, "cluster_s": time.monotonic() - begun}
        os.environ["RAY_ADDRESS"] = made.address
        try:
            figures |= throughput(plan, inputs, given.slices)
            killed = kills(plan, model, inputs, made, given.kills)
        finally:
            made.shutdown()
    report = harness.Report(given)
    report.figures(figures)
    for row in killed:
        report.row(
            row,
            f"{row['killed']} killed: {row['answered']} answered, {row['wrong']} wrong, "
            f"longest wait {row['longest_s']:.1f} s, healed in {row['healed_s']:.1f} s on {row['now']}",
        )


if __name__ == "__main__":
    main()
