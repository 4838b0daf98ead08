"""How close are cuts to the published optima of placement workloads?

The workloads of Tarnawski et al. (NeurIPS 2020) are cut under the paper's cost rule; each row has the value found and
its lower bound. A FILE holds ``nodes`` (times on an accelerator and on a CPU, bytes), ``edges`` (the cost of moving a
node's output between accelerator and host), and the number of devices. The load of an accelerator is its compute,
and every tensor that enters or leaves it, once; the load of a CPU is its compute. The value of a plan is the largest
load.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import networkx as nx

from benchmarks import harness
from onnxsplit.cluster import Link
from onnxsplit.partitioner import NEVER, DeviceKind, Effort, Problem, Transfer, Weight, line_up, search

TAKES = "1 min per file"

UNIT = 1_000_000
"""The files' unit of time, in what the partitioner takes for nanoseconds."""

PUBLISHED = {"bert24": (17.790, 0.02), "resnet50": (33.775, 0.15), "gnmt": (32.911, 16.0)}
"""Exact contiguous optima and the seconds the paper's dynamic programming takes, where they are known."""


def load(path: Path) -> Problem:
    """Read a workload as a problem; the nodes of a colour class and of the cycles that it closes are one atom."""
    content = json.loads(path.read_text())
    nodes = {node["id"]: node for node in content["nodes"]}
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    together: dict[Any, int] = {}
    for node in nodes.values():
        first = together.setdefault(node.get("colorClass", ("alone", node["id"])), node["id"])
        graph.add_edges_from([(first, node["id"]), (node["id"], first)])
    graph.add_edges_from((edge["sourceId"], edge["destId"]) for edge in content["edges"])
    graph.remove_edges_from(nx.selfloop_edges(graph))
    condensed = nx.condensation(graph)
    order = list(nx.lexicographical_topological_sort(condensed, key=lambda c: min(condensed.nodes[c]["members"])))
    atom_of = {node: atom for atom, part in enumerate(order) for node in condensed.nodes[part]["members"]}
    fast, slow, held = [0] * len(order), [0] * len(order), [0] * len(order)
    for name, node in nodes.items():
        atom = atom_of[name]
        held[atom] += round(node.get("size", 0))
        slow[atom] += round(node["cpuLatency"] * UNIT)
        fast[atom] = min(NEVER, fast[atom] + (round(node["fpgaLatency"] * UNIT) if node["supportedOnFpga"] else NEVER))
    costs: dict[int, float] = {}
    readers: dict[int, set[int]] = {}
    for edge in content["edges"]:
        source = edge["sourceId"]
        costs[source] = max(costs.get(source, 0.0), edge["cost"])
        readers.setdefault(source, set()).add(atom_of[edge["destId"]])
    transfers = [
        Transfer(atom_of[source], targets, round(costs[source] * UNIT))
        for source, atoms in sorted(readers.items())
        if (targets := tuple(sorted(atoms - {atom_of[source]})))
    ]
    accelerators, cpus = content["maxFPGAs"], content["maxCPUs"]
    limit = content.get("maxSizePerFPGA")
    return Problem(
        kinds=(DeviceKind(tuple(fast), None if limit is None else int(limit)), DeviceKind(tuple(slow), pays=False)),
        devices=(0,) * accelerators + (1,) * cpus,
        transfers=tuple(transfers),
        weights=tuple(Weight(size, (atom,)) for atom, size in enumerate(held) if size),
        link=Link(latency_ns=0, bytes_per_s=1_000_000_000),
        send_once=True,
    )


def main() -> None:
    """Print a row for each workload."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of one search")
    given = parser.parse_args()
    report = harness.Report(
        given, workload="28", atoms="5", value="9.3f", lower_bound="11.3f", gap="7.2%", seconds="8.2f",
        published="9.3f", published_seconds="17g",
    )  # fmt: skip
    for path in given.files:
        begun = time.monotonic()
        problem = load(path)
        result = search(problem, line_up(problem, None), Effort(seconds=given.seconds))
        known = PUBLISHED.get(path.stem.removesuffix("_inference"), (None, None))
        report.row(
            {
                "workload": path.stem,
                "atoms": problem.atoms,
                "value": result.score.value / UNIT,
                "lower_bound": result.bound / UNIT,
                "gap": result.gap,
                "seconds": time.monotonic() - begun,
                "published": known[0],
                "published_seconds": known[1],
            }
        )


if __name__ == "__main__":
    main()
