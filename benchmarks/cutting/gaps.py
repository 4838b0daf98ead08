"""How good are the cuts, and how long do they take to find?

Each row has the value of a cut (its slowest stage), the lower bound on any cut, and the gap between them. The models
are those of cutting/generality.py and the recipes in full size, by their measured costs, each stage on a device of its
own.

With --synthetic: graphs of 1,000, 5,000 and 20,000 ops with random costs in eight stages. They are chains whose blocks
have branches, U-nets (skips over ever longer distances), and dense blocks (every op reads all ops before it in its
block).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from onnxsplit.export import export
from onnxsplit.partitioner import DeviceKind, Effort, Problem, SearchResult, Transfer, line_up, lower_bound, search
from onnxsplit.plan import CALLER
from onnxsplit.planning.examine import examine
from onnxsplit.planning.target import alike

TAKES = "10 min"

SIZES = (1_000, 5_000, 20_000)


def models(names: list[str], folder: Path) -> Iterator[example_models.Named]:
    """The models that all cuts are tried on, and the recipes in full size."""
    yield from example_models.every(names, folder)
    for name in example_models.RECIPES:
        if not names or name in names:
            export(str(harness.ROOT / "models" / f"{name}.py"), folder / f"{name}-full.onnx")
            yield f"full-{name}", folder / f"{name}-full.onnx", {}


def problem(times: list[int], readers: dict[int, list[int]], sizes: list[int], devices: int) -> Problem:
    """Make a problem of atoms with the given times in nanoseconds, tensor sizes and readers of each tensor."""
    transfers = [Transfer(CALLER, (0,), 600_000)]
    for atom, size in enumerate(sizes):
        targets = tuple(sorted(set(readers.get(atom, []))))
        transfers.append(Transfer(atom, targets, size, not targets))
    return Problem((DeviceKind(tuple(times)),), (0,) * devices, tuple(transfers))


def synthetic(shape: str, count: int, devices: int) -> Problem:
    """Make a random problem of ``count`` atoms in the shape ``chain``, ``unet`` or ``dense``."""
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


def row(name: str, stages: int, result: SearchResult, seconds: float, **more: Any) -> dict[str, Any]:
    """Return the figures of one search."""
    figures = {"value_ms": result.score.value / 1e6, "lower_bound_ms": result.bound / 1e6, "gap": result.gap}
    return {"model": name, "stages": stages, **figures, "seconds": seconds, **more}


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each model and number of stages."""
    if given.synthetic:
        for shape in ("chain", "unet", "dense"):
            for count in SIZES:
                made = synthetic(shape, count, 8)
                begun = time.monotonic()
                result = search(made, line_up(made, 8), Effort(seconds=given.seconds))
                yield row(f"{shape}-{count}", 8, result, time.monotonic() - begun, atoms=count)
        return
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        for name, model, dims in models(given.names, Path(folder)):
            subject = examine(model, dims=dims, threads=1)
            for stages in given.stages:
                if stages > len(subject.atoms.ops):
                    continue
                made = subject.problem(subject.costs.time_ns, alike(stages))
                begun = time.monotonic()
                result = search(made, line_up(made, stages), Effort(seconds=given.seconds))
                seconds = time.monotonic() - begun
                ops = subject.as_ops().problem(subject.costs.time_ns, alike(stages))
                op_bound = min(result.bound, lower_bound(ops, line_up(ops, stages))) / 1e6
                yield row(name, stages, result, seconds, atoms=made.atoms, op_bound_ms=op_bound)


def main() -> None:
    """Print the table, then the median and the largest gap."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", metavar="NAME|MODEL.onnx")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of one search")
    parser.add_argument("--synthetic", action="store_true", help="random graphs instead of models")
    given = parser.parse_args()
    report = harness.Report(
        given, model="22", atoms="6", stages="6", value_ms="10.3f", lower_bound_ms="14.3f", op_bound_ms="11.3f",
        gap="7.2%", seconds="7.1f",
    )  # fmt: skip
    gaps = []
    for figures in rows(given):
        gaps.append(figures["gap"])
        report.row(figures)
    if gaps:
        over = sum(gap > 0.01 for gap in gaps)
        report.note(
            f"{len(gaps)} rows; gap: median {statistics.median(gaps):.2%}, largest {max(gaps):.2%}, above 1 %: {over}"
        )


if __name__ == "__main__":
    main()
