"""How good are the cuts, and how long do they take to find?

Each row has the value of a cut (its slowest stage), the lower bound on any cut, and the gap between them. The models
are those of cutting/generality.py and the recipes in full size, by their measured costs, each stage on a device of its
own.

With --plans: the same figures of whole plans with defaults, whose stages were run and whose costs were corrected. They
have the interval of the costs, too, and how busy the machine was. A gap below the interval is as good as none. By
default the models are those of models/zoo.toml, in 2, 3 and 4 stages.

With --synthetic: graphs of 1,000, 5,000 and 20,000 ops with random costs in eight stages. They are chains whose blocks
have branches, U-nets (skips over ever longer distances), and dense blocks (every op reads all ops before it in its
block).
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import zoo

from benchmarks import example_models, harness
from onnxsplit.partitioner import DeviceKind, Effort, Problem, SearchResult, Transfer, line_up, lower_bound, search
from onnxsplit.plan import CALLER
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import examine_for, write_plan
from onnxsplit.planning.target import alike

TAKES = "10 min"

SIZES = (1_000, 5_000, 20_000)


def models(names: list[str], folder: Path) -> Iterator[example_models.Named]:
    """The models that all cuts are tried on, and the recipes in full size."""
    yield from example_models.every(names, folder)
    yield from example_models.full_recipes(names, folder)


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


def random_graphs(seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each random graph."""
    for shape in ("chain", "unet", "dense"):
        for count in SIZES:
            made = synthetic(shape, count, 8)
            begun = time.monotonic()
            result = search(made, line_up(made, 8), Effort(seconds=seconds))
            yield row(f"{shape}-{count}", 8, result, time.monotonic() - begun, atoms=count)


def searches(case: example_models.Named, stages: list[int], limit_s: float) -> list[dict[str, Any]]:
    """Search by the costs of the whole model; return a row for each number of stages."""
    name, model, dims = case
    subject, found = examine(model, dims=dims, threads=1), []
    for count in stages:
        if count > len(subject.atoms.ops):
            continue
        made = subject.problem(subject.costs.time_ns, alike(count))
        begun = time.monotonic()
        result = search(made, line_up(made, count), Effort(seconds=limit_s))
        seconds = time.monotonic() - begun
        ops = subject.as_ops().problem(subject.costs.time_ns, alike(count))
        op_bound = min(result.bound, lower_bound(ops, line_up(ops, count))) / 1e6
        found.append(row(name, count, result, seconds, atoms=made.atoms, op_bound_ms=op_bound))
    return found


def plans(case: example_models.Named, stages: list[int], _: float) -> list[dict[str, Any]]:
    """Make whole plans with defaults; return a row for each number of stages."""
    name, model, dims = case
    found = []
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        subject = examine_for(model, CutOptions(stages=max(stages)), dims=dims)
        for count in stages:
            if count > len(subject.atoms.ops):
                continue
            begun = time.monotonic()
            plan = write_plan(subject, Path(folder) / "m.plan", CutOptions(stages=count)).plan
            predicted = plan.prediction
            figures = {
                "model": name,
                "stages": count,
                "atoms": len(subject.atoms.ops),
                "value_ms": predicted.bottleneck_ns / 1e6,
                "lower_bound_ms": predicted.lower_bound_ns / 1e6,
                "op_bound_ms": predicted.op_lower_bound_ns / 1e6,
                "gap": predicted.gap,
                "interval": plan.costs.interval,
                "busy": plan.costs.disturbed,
                "rounds": len(plan.costs.rounds),
                "seconds": time.monotonic() - begun,
            }
            found.append(figures)
    return found


def main() -> None:
    """Print the table, then the median and the largest gap."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", metavar="NAME|MODEL.onnx")
    parser.add_argument("--stages", nargs="+", type=int, help="default: 2 4 8 16; with --plans 2 3 4")
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of one search, without --plans")
    parser.add_argument("--minutes", type=float, default=12.0, help="no model is begun later than this")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--synthetic", action="store_true", help="random graphs instead of models")
    kind.add_argument("--plans", action="store_true", help="whole plans instead of searches")
    given = parser.parse_args()
    columns = {"model": "22", "atoms": "6", "stages": "6", "value_ms": "10.3f", "lower_bound_ms": "14.3f"}
    columns |= {"op_bound_ms": "11.3f", "gap": "7.2%"}
    columns |= {"interval": "8.1%", "busy": "5.0%", "rounds": "6"} if given.plans else {}
    report = harness.Report(given, **columns, seconds="7.1f")
    attempts, found = harness.Attempts(given.minutes), []
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        work = plans if given.plans else searches
        stages = given.stages or ([2, 3, 4] if given.plans else [2, 4, 8, 16])
        names = given.names or (list(zoo.entries()) if given.plans else [])
        made = attempts(models(names, Path(folder)), work=lambda case: work(case, stages, given.seconds))
        for rows in [random_graphs(given.seconds)] if given.synthetic else made:
            for figures in rows:
                found.append(figures)
                report.row(figures)
    if not given.synthetic:
        report.note(attempts.summary())
    if found:
        gaps = [figures["gap"] for figures in found]
        over = sum(gap > 0.01 for gap in gaps)
        text = (
            f"{len(gaps)} rows; gap: median {statistics.median(gaps):.2%}, largest {max(gaps):.2%}, above 1 %: {over}"
        )
        if given.plans:
            beyond = sum(figures["gap"] > max(0.01, figures["interval"] or 0.0) for figures in found)
            intervals = [figures["interval"] or 0.0 for figures in found]
            text += f", above 1 % and the interval: {beyond}; interval: median {statistics.median(intervals):.1%}"
        report.note(f"{text}; longest {max(figures['seconds'] for figures in found):.1f} s")


if __name__ == "__main__":
    main()
