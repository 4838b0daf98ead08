"""How good cuts are, and how long they take to find: value, lower bound, gap.

    python benchmarks/cutting/gaps.py [NAME|MODEL.onnx ...] [--stages 2 4 8 16] [--synthetic] [--json]

Every model of the generality benchmark and the recipes in full size, by their measured costs, each stage on a device
of its own. With --synthetic: graphs of 1,000, 5,000 and 20,000 ops with random costs at K = 8 instead: chains whose
blocks have branches, U-nets (skips over ever longer distances), dense blocks (every op reads all before it in its
block).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

from environment import benchmark, environment_line

from onnxsplit.export import export
from onnxsplit.partitioner import DeviceKind, Effort, Problem, SearchResult, Transfer, line_up, lower_bound, search
from onnxsplit.plan import CALLER
from onnxsplit.planning.subject import examine
from onnxsplit.planning.target import alike

RECIPES = ("resnet50", "bert", "gpt2", "inception", "multitask")
SIZES = (1_000, 5_000, 20_000)


def models(names: list[str], folder: Path) -> Iterator[tuple[str, Path, dict[str, int]]]:
    """Those of the generality benchmark, and the recipes in full size."""
    generality = benchmark("cutting/generality")
    yield from generality.models(names, folder)
    for name in RECIPES:
        if not names or name in names:
            export(str(ROOT / "models" / f"{name}.py"), folder / f"{name}-full.onnx")
            yield f"full-{name}", folder / f"{name}-full.onnx", {}


def problem(times: list[int], readers: dict[int, list[int]], sizes: list[int], devices: int) -> Problem:
    """Atoms with these times in nanoseconds, and a tensor each to these readers."""
    flows = [Transfer(CALLER, (0,), 600_000)]
    for atom, size in enumerate(sizes):
        found = tuple(sorted(set(readers.get(atom, []))))
        flows.append(Transfer(atom, found, size, not found))
    return Problem((DeviceKind(tuple(times)),), (0,) * devices, tuple(flows))


def synthetic(shape: str, count: int, devices: int) -> Problem:
    """A graph of so many ops: ``chain``, ``unet`` or ``dense``."""
    chance = random.Random(count)
    times = [int(chance.lognormvariate(12, 1)) for _ in range(count)]  # about 0.16 ms in the median
    sizes = [int(chance.lognormvariate(12, 1)) for _ in range(count)]
    readers: dict[int, list[int]] = {}
    if shape == "unet":
        for atom in range(count - 1):
            readers.setdefault(atom, []).append(atom + 1)
        for atom in range(0, count // 2, 12):
            readers[atom].append(count - 1 - atom)
    elif shape == "dense":
        for first in range(0, count, 20):
            for atom in range(first, min(first + 20, count)):
                readers[atom] = list(range(atom + 1, min(first + 21, count)))
    else:
        first = 0
        while first < count - 1:
            width, length = chance.randint(1, 4), chance.randint(1, 6)
            last = min(count - 1, first + width * length + 1)
            for branch in range(width):
                path = [a for a in range(first + 1 + branch * length, first + 1 + (branch + 1) * length) if a < last]
                for one, other in zip([first, *path], [*path, last], strict=True):
                    readers.setdefault(one, []).append(other)
            first = last
    return problem(times, readers, sizes, devices)


def row(name: str, stages: int, found: SearchResult, seconds: float, **more: Any) -> dict[str, Any]:
    """What is printed."""
    figures = {"value_ms": found.score.value / 1e6, "lower_bound_ms": found.bound / 1e6, "gap": found.gap}
    return {"model": name, "stages": stages, **figures, "seconds": seconds, **more}


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row a model and number of stages."""
    if given.synthetic:
        for shape in ("chain", "unet", "dense"):
            for count in SIZES:
                made = synthetic(shape, count, 8)
                begun = time.monotonic()
                found = search(made, line_up(made, 8), Effort(seconds=given.seconds))
                yield row(f"{shape}-{count}", 8, found, time.monotonic() - begun, atoms=count)
        return
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        for name, model, dims in models(given.names, Path(folder)):
            subject = examine(model, dims=dims, threads=1)
            for stages in given.stages:
                if stages > len(subject.atoms.ops):
                    continue
                made = subject.problem(subject.costs.time_ns, alike(stages))
                begun = time.monotonic()
                found = search(made, line_up(made, stages), Effort(seconds=given.seconds))
                seconds = time.monotonic() - begun
                ops = subject.as_ops().problem(subject.costs.time_ns, alike(stages))
                op_bound = min(found.bound, lower_bound(ops, line_up(ops, stages))) / 1e6
                yield row(name, stages, found, seconds, atoms=made.atoms, op_bound_ms=op_bound)


def main() -> None:
    """Print the table, and the gaps in short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of one search")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(environment_line())
        print(
            f"{'model':22} {'atoms':>6} {'K':>3} {'bottleneck':>12} {'no cut below':>13} "
            f"{'op bound':>10} {'gap':>8} {'s':>6}"
        )
    gaps = []
    for found in rows(given):
        gaps.append(found["gap"])
        if given.json:
            print(json.dumps(found), flush=True)
            continue
        op_bound = f"{found['op_bound_ms']:10.3f}" if "op_bound_ms" in found else " " * 10
        print(
            f"{found['model']:22} {found['atoms']:6} {found['stages']:3} {found['value_ms']:9.3f} ms "
            f"{found['lower_bound_ms']:10.3f} ms {op_bound} {found['gap']:8.2%} {found['seconds']:6.1f}",
            flush=True,
        )
    if gaps and not given.json:
        over = sum(gap > 0.01 for gap in gaps)
        print(
            f"{len(gaps)} rows; gap: median {statistics.median(gaps):.2%}, largest {max(gaps):.2%}, above 1 %: {over}"
        )


if __name__ == "__main__":
    main()
