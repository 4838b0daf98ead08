"""Is a plan that is made beside busy processes the same as one that is made on an idle machine?

Each model is cut with defaults: on the machine as it is, beside two busy loops for each two cores, and on the machine
as it is again. The last plan shows what the machine does by itself. A bottleneck is *inside* if it differs from the
first plan's by no more than the interval that the plan states, and *inside both* if it does by no more than the
intervals of both plans together. *Same cut* compares the tensors that cross.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from onnxsplit.plan import Plan
from onnxsplit.planning.planner import partition
from onnxsplit.session import host_cores

TAKES = "12 min"


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run this many processes that compute all the time."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def compared(first: Plan, other: Plan) -> dict[str, Any]:
    """Compare a plan with the first one."""
    apart = other.prediction.bottleneck_ns / first.prediction.bottleneck_ns - 1
    stated, firsts = other.costs.interval or 0.0, first.costs.interval or 0.0
    return {
        "same_cut": cut_of(first) == cut_of(other),
        "ms": other.prediction.bottleneck_ns / 1e6,
        "interval": stated,
        "off": apart,
        "inside": abs(apart) <= stated,
        "inside_both": abs(apart) <= stated + firsts,
        "used": other.costs.disturbed,
        "pays": other.verdict is not None and other.verdict.cut_pays,
    }


def cut_of(plan: Plan) -> set[tuple[str, int, tuple[int, ...]]]:
    """The tensors that cross, with their stages."""
    return {(cut.tensor, cut.from_stage, cut.to_stages) for cut in plan.cuts}


def main() -> None:
    """Print a row for each model and machine, then the shares."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", metavar="NAME|MODEL.onnx")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--loops", type=int, default=2 * max(1, host_cores() // 2), help="how many busy loops")
    parser.add_argument("--minutes", type=float, default=12.0, help="no model is begun later than this")
    given = parser.parse_args()
    report = harness.Report(
        given, model="22", machine="11", same_cut="8", ms="10.3f", interval="8.1%", off="7.1%", inside="6",
        inside_both="11", used="5.0%", pays="5", seconds="7.1f",
    )  # fmt: skip

    def work(case: example_models.Named) -> list[dict[str, Any]]:
        name, model, dims = case
        rows, first = [], None
        with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
            for machine, loops in (("as it is", 0), ("busy", given.loops), ("as it is", 0)):
                with busy_loops(loops):
                    begun = time.monotonic()
                    plan = partition(model, stages=given.stages, dims=dims, out=Path(folder) / "m.plan")
                    seconds = time.monotonic() - begun
                first = first or plan
                figures = compared(first, plan)
                if plan is first:
                    figures |= dict.fromkeys(("same_cut", "off", "inside", "inside_both"))
                rows.append({"model": name, "machine": machine, **figures, "seconds": seconds})
        return rows

    found: list[list[dict[str, Any]]] = []
    attempts = harness.Attempts(given.minutes)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as models:
        places = given.names, Path(models)
        for rows in attempts(example_models.every(*places), example_models.forests(*places), work=work):
            found.append(rows)
            for figures in rows:
                report.row(figures)
    report.note(attempts.summary())
    for number, machine in ((1, "busy"), (2, "as it is again")):
        counts = {what: sum(rows[number][what] for rows in found) for what in ("same_cut", "inside", "inside_both")}
        counts["same_verdict"] = sum(rows[number]["pays"] == rows[0]["pays"] for rows in found)
        shown = ", ".join(f"{what.replace('_', ' ')} {count} of {len(found)}" for what, count in counts.items())
        report.note(f"{machine}: {shown}")


if __name__ == "__main__":
    main()
