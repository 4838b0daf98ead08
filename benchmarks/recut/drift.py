"""Does a pipeline of sleeping stages change its plan when a device gets slower, and what do callers see of it?

A row of 12 ops is cut for 2, 3 or 6 devices, each on a host of its own. Each op sleeps 20 ms on a device of full speed,
so the stages do not compete for cores. Under a closed loop of two requests for each stage, one device falls to 0.5, 0.7
or 0.3 of its speed, and `rebalance="auto"` does the rest. The time in which the new plan loads is compared with the
drifted time before it, and so are the 10 s around the swap. ``planned`` is the rate that the new plan promises. The
times in seconds and what the pipeline says of the change are in the JSON. The exit status is 1 if a request was lost or
answered wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
from sleeping import Devices, SleepingLauncher

from benchmarks import harness
from benchmarks.recut.episode import episode
from benchmarks.recut.observed import ClosedLoop, History
from onnxsplit.plan_files import load_plan
from runtime import Pipeline

TAKES = "12 min"


def measure(stages: int, speed: float, given: argparse.Namespace) -> dict[str, Any]:
    """Run one case; returns its row."""
    names = [f"d{number}" for number in range(stages)]

    def inputs(number: int) -> dict[str, Any]:
        return {"t0": np.full((1, 64), number, np.float32)}

    def is_right(number: int, outputs: Any) -> bool:
        return bool((outputs[f"t{given.ops}"] == (number if given.ops % 2 == 0 else -number)).all())

    with tempfile.TemporaryDirectory(prefix="drift-") as scratch:
        folder = Path(scratch)
        (folder / "speeds").mkdir()
        devices = Devices(folder / "speeds", names)
        plan = devices.plan(folder, given.ops)
        launcher = SleepingLauncher(load_plan(plan), devices, given.op_ms / 1e3)
        with (
            Pipeline.launch(plan, launcher=launcher, rebalance="auto") as pipeline,
            History(pipeline) as history,
            ClosedLoop(pipeline, 2 * stages, inputs, is_right) as loop,
        ):
            found = episode(pipeline, loop, history, lambda: devices.set(names[0], speed), given.seconds)
            ops = [stage.ops for stage in pipeline.plan.stages]
    row = {"stages": stages, "speed": speed, **found.row, "ops": ops}
    return row | {"answered": loop.sent - loop.lost, "lost": loop.lost, "wrong": loop.wrong, "errors": loop.errors}


def main() -> None:
    """Print a row for each case; exit with 1 if a request was lost or answered wrong."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--stages", nargs="+", type=int, default=[3, 2, 6])
    parser.add_argument("--speeds", nargs="+", type=float, default=[0.5, 0.7, 0.3])
    parser.add_argument("--ops", type=int, default=12)
    parser.add_argument("--op-ms", type=float, default=20.0, help="time of an op on a device of full speed")
    parser.add_argument("--seconds", type=float, default=12.0, help="time that is measured before and after the change")
    given = parser.parse_args()
    support = str(harness.ROOT / "tests" / "support")
    os.environ["PYTHONPATH"] = os.pathsep.join([support, os.environ["PYTHONPATH"]])  # nodes import `sleeping`
    report = harness.Report(
        given,
        stages="6", speed="5.2f", before="6.2f", drifted="7.2f", loading="7.2f", after="6.2f", planned="7.2f",
        swap_s="6.1f", gain="5.2f", of_planned="10.2f", while_loading="13.2f", p99_ratio="9.2f", longest_ratio="13.2f",
        answered="8", lost="4", wrong="5",
    )  # fmt: skip
    failed = 0
    for stages in given.stages:
        for speed in given.speeds:
            row = measure(stages, speed, given)
            report.row(row)
            failed += row["lost"] + row["wrong"]
            if "after" not in row:
                report.note(f"no change: {row['why']}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
