"""How close do pipelines of short stages come to their ceiling, and what processor time does a request take?

The models are chains of products whose halves take about 2, 1 and 0.3 ms, or those named, cut in two. The ceiling is
the stage files running at once in two processes with no communication. Contenders take turns in slices; ratios are
computed slice by slice, and ranges are 95 %, by bootstrap. Processor times are in µs per request, from the scheduler's
count of each thread, and include the session. With --before, the code of another checkout takes turns, too.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import harness
from benchmarks.example_models import CHAINS, named_plan
from benchmarks.peers.started import PeerProcess
from onnxsplit.plan_files import load_plan
from onnxsplit.session import quiet_environment
from runtime import bench

TAKES = "3 min"

SLICE_S = 0.5


@contextmanager
def pipeline_of(checkout: Path, plan: Path) -> Iterator[PeerProcess]:
    """Run a pipeline with the code of a checkout."""
    command = [sys.executable, str(Path(__file__).with_name("pipeline_slices.py")), str(plan)]
    with tempfile.TemporaryFile() as errors:
        started = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=quiet_environment() | {"PYTHONPATH": str(checkout)},
            cwd=os.sep,
        )
        try:
            yield PeerProcess(started, errors)
        finally:
            harness.ended(started, 60)
            assert started.stdout is not None
            started.stdout.close()


def measure(plan: Path, checkouts: dict[str, Path], slices: int) -> dict[str, list]:
    """Return what each contender said in its slices: the rate, and the processor time of each process."""
    loaded, inputs = load_plan(plan), harness.example(plan)
    with ExitStack() as stack:
        stages = bench._stage_workers(stack, plan, loaded, inputs, 1, (1,) * len(loaded.stages), ())
        contenders: dict[str, Callable[[], list]] = {"ceiling": lambda: [bench._ceiling(stages, SLICE_S)]}
        for name, checkout in checkouts.items():
            peer = stack.enter_context(pipeline_of(checkout, plan))
            contenders[name] = lambda peer=peer: peer.ask(SLICE_S)
        return harness.in_turns(contenders, slices)


def main() -> None:
    """Print a row for each model and each code."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=list(CHAINS), metavar="NAME|MODEL.onnx")
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout of this project")
    given = parser.parse_args()
    checkouts = {"now": Path(__file__).parents[2]}
    if given.before is not None:
        checkouts["before"] = given.before.resolve()
    report = harness.Report(
        given, model="14", stage_ms="8.2f", code="6", per_s="8.0f", over_ceiling="22", caller="7.0f", nodes="16"
    )
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        for name in given.names:
            said = measure(named_plan(name, Path(scratch)), checkouts, given.slices)
            ceiling = [rate for (rate,) in said["ceiling"]]
            for code in checkouts:
                rates, callers, *nodes = zip(*said[code], strict=True)
                row = {
                    "model": name,
                    "stage_ms": 1e3 / statistics.median(ceiling),
                    "code": code,
                    "per_s": statistics.median(rates),
                    "over_ceiling": str(harness.ratio(rates, ceiling)),
                    "caller": statistics.median(callers),
                    "nodes": " ".join(f"{statistics.median(times):.0f}" for times in nodes),
                }
                report.row(row)


if __name__ == "__main__":
    main()
