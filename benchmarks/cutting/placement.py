"""Placement workloads of Tarnawski et al. (NeurIPS 2020) under the paper's cost rule: the value found and its proof.

    python benchmarks/cutting/placement.py FILE.json ... [--seconds 60] [--json]

A FILE holds ``nodes`` (times on an accelerator and on a CPU, bytes), ``edges`` (the cost of moving a node's output
between accelerator and host), and how many devices there are. An accelerator's load is its compute, and every tensor
that enters or leaves it, once; a CPU's load is its compute. The value of a plan is the largest load.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import networkx as nx
from environment import environment_line

from onnxsplit.cluster import Link
from onnxsplit.partitioner import NEVER, DeviceKind, Effort, Problem, Transfer, Weight, line_up, search

UNIT = 1_000_000
"""The files' unit of time, in what the partitioner takes for nanoseconds."""

PUBLISHED = {"bert24": (17.790, 0.02), "resnet50": (33.775, 0.15), "gnmt": (32.911, 16.0)}
"""Exact contiguous optima and the seconds the paper's dynamic programming takes, where they are known."""


def load(path: Path) -> Problem:
    """A workload as a problem; nodes of one colour class, and cycles that they close, are one atom."""
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
        Transfer(atom_of[source], found, round(costs[source] * UNIT))
        for source, atoms in sorted(readers.items())
        if (found := tuple(sorted(atoms - {atom_of[source]})))
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
    """A row a workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(environment_line())
        print(f"{'workload':28} {'atoms':>5} {'value':>9} {'lower bound':>11} {'gap':>7} {'seconds':>8}  published")
    for path in given.files:
        begun = time.monotonic()
        problem = load(path)
        found = search(problem, line_up(problem, None), Effort(seconds=given.seconds))
        row = {
            "workload": path.stem,
            "value": found.score.value / UNIT,
            "lower_bound": found.bound / UNIT,
            "gap": found.gap,
            "seconds": time.monotonic() - begun,
        }
        if given.json:
            print(json.dumps(row), flush=True)
            continue
        known = PUBLISHED.get(path.stem.removesuffix("_inference"))
        print(
            f"{path.stem:28} {problem.atoms:5} {row['value']:9.3f} {row['lower_bound']:11.3f} {row['gap']:7.2%} "
            f"{row['seconds']:8.2f}  {f'{known[0]:.3f} in {known[1]:g} s' if known else 'not known'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
