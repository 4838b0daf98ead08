"""The Ray launcher: start-up, placement, throughput beside the local launcher, and a host killed under load.

    python benchmarks/hosts/ray_launcher.py [MODEL] [--slices 10] [--kills 3] [--json]

A cluster of four hosts, which are processes of this one (``ray.cluster_utils.Cluster``), with Ray's own time to notice
a dead host. Tensors go the same way with both launchers; they take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

import numpy as np
from environment import benchmark, environment_line

from onnxsplit.npz import load_npz
from onnxsplit.plan_files import example_file, load_plan
from onnxsplit.planning.planner import partition
from onnxsplit.session import open_session
from runtime import Pipeline
from runtime.launch.ray import RayLauncher

HOSTS = 4
SLICE_S = 1.0
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20, "memory": 3 << 30}


def cluster() -> Any:
    """A head that runs nothing, and four hosts."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "node_name": "head", "include_dashboard": False, "object_store_memory": 80 << 20}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.hosts = {f"h{n}": made.add_node(wait=False, node_name=f"h{n}", **NODE) for n in range(HOSTS)}
    made.wait_for_nodes()
    return made


def throughput(plan: Path, inputs: dict[str, Any], slices: int) -> dict[str, Any]:
    """Both launchers in turn, each alone for its slice."""
    rate = benchmark("balance/devices").rate
    begun = time.monotonic()
    with Pipeline.launch(plan, threads=1) as local:
        local_s = time.monotonic() - begun
        begun = time.monotonic()
        with Pipeline.launch(plan, launcher=RayLauncher(load_plan(plan)), threads=1) as ray:
            ray_s = time.monotonic() - begun
            hosts = [node.host for node in ray.nodes]
            rates = [(rate(ray, inputs, SLICE_S), rate(local, inputs, SLICE_S)) for _ in range(slices + 1)][1:]
    ratios = [one / other for one, other in rates]
    return {
        "start_local_s": local_s,
        "start_ray_s": ray_s,
        "hosts": hosts,
        "ray_per_s": statistics.median(one for one, _ in rates),
        "local_per_s": statistics.median(other for _, other in rates),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def kills(plan: Path, model: Path, inputs: dict[str, Any], made: Any, times: int) -> list[dict[str, Any]]:
    """A host that has a node is killed under load; another comes to the cluster afterwards."""
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
                found = pending.pop(0).result(120)
                row["longest_s"] = max(row["longest_s"], time.monotonic() - asked)
                row["answered"] += 1
                row["wrong"] += any(
                    not np.allclose(found[name], array, rtol=0, atol=1e-4 * np.abs(array).max())
                    for name, array in wanted.items()
                )
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="ocr-recognizer")
    parser.add_argument("--slices", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
        model, dims = benchmark("data_path/throughput").model_of(given.model, Path(scratch))
        plan = Path(scratch) / "m.plan"
        partition(model, stages=2, out=plan, dims=dims)
        inputs = load_npz(example_file(plan, load_plan(plan)))
        begun = time.monotonic()
        made = cluster()
        found: dict[str, Any] = {"model": given.model, "cluster_s": time.monotonic() - begun}
        os.environ["RAY_ADDRESS"] = made.address
        try:
            found |= throughput(plan, inputs, given.slices)
            found["kills"] = kills(plan, model, inputs, made, given.kills)
        finally:
            made.shutdown()
    if given.json:
        print(json.dumps(found))
        return
    print(environment_line())
    print(f"\n{given.model}, two stages; the cluster itself was up after {found['cluster_s']:.1f} s")
    print(f"ready: local {found['start_local_s']:.2f} s, Ray {found['start_ray_s']:.2f} s on {found['hosts']}")
    print(
        f"requests a second: Ray {found['ray_per_s']:.1f}, local {found['local_per_s']:.1f}, "
        f"ratio {found['ratio']:.3f} ({found['least']:.3f}-{found['most']:.3f})"
    )
    for row in found["kills"]:
        print(
            f"{row['killed']} killed: {row['answered']} answered, {row['wrong']} wrong, "
            f"longest wait {row['longest_s']:.1f} s, healed in {row['healed_s']:.1f} s on {row['now']}"
        )


if __name__ == "__main__":
    main()
