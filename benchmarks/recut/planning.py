"""How long does planning anew take, and what does it take from a pipeline that serves?

The first device of each plan is taken to be at half of its speed, and the model is planned anew in a process of its
own, as a pipeline does it. Models with a size in GiB have external data; they are made here and removed again, and the
folder needs three times their size of free space. Then a pipeline of two stages serves at its full rate, in turns with
and without such processes at the lowest priority (nice 19), one after another. ``share`` is what planning once per
minute, as often as a pipeline does it at most, takes of the rate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition
from runtime import Pipeline

TAKES = "15 min"

_EVERY_S = 60.0  # a pipeline plans anew at most so often
_PROGRAM = """
import json, sys
import onnxsplit
plan, out, speeds = sys.argv[1:]
made = onnxsplit.replan(plan, out=out, speeds=json.loads(speeds))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
said = {"gain": made.gain, "peak_mib": int(status["VmHWM"].split()[0]) / 1024}
print(json.dumps(said | {f"{name}_s": seconds for name, seconds in made.seconds.items()}))
"""


@dataclass(frozen=True)
class Planned:
    """What a process that plans anew took: its wall and processor time, and what it says itself."""

    wall_s: float
    processor_s: float
    said: dict[str, float]


def planned_anew(plan: Path, out: Path, *, niceness: int = 0) -> Planned:
    """Plan a model anew for a first device of half speed, in a process of its own."""
    first = load_plan(plan).stages[0]
    names = first.devices or tuple(map(str, first.device_numbers))
    command = ["nice", "-n", str(niceness), sys.executable, "-P", "-c", _PROGRAM]
    begun = time.monotonic()
    process = subprocess.Popen(
        [*command, str(plan), str(out), json.dumps(dict.fromkeys(names, 0.5))], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as said:
        text = said.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"planning {plan} anew failed with {process.returncode}")
    return Planned(
        wall_s=time.monotonic() - begun,
        processor_s=usage.ru_utime + usage.ru_stime,
        said=json.loads(text),
    )


def planning(name: str, model: Path, folder: Path, stages: int, runs: int, **options: Any) -> dict[str, Any]:
    """Plan a model anew some times; returns the medians."""
    plan, out = folder / f"{name}-{stages}.plan", folder / "new.plan"
    partition(model, out=plan, stages=stages, **options)
    made = [planned_anew(plan, out) for _ in range(runs)]
    said = {key: statistics.median(one.said[key] for one in made) for key in made[0].said}
    return {
        "model": name,
        "stages": stages,
        "wall_s": statistics.median(one.wall_s for one in made),
        "processor_s": statistics.median(one.processor_s for one in made),
        **said,
    }


@contextmanager
def planning_beside(plan: Path, out: Path, took: list[float]) -> Iterator[None]:
    """Plan a model anew at the lowest priority, again and again; adds the seconds that each planning took."""
    ended = threading.Event()

    def plan_again() -> None:
        while not ended.is_set():
            took.append(planned_anew(plan, out, niceness=19).wall_s)

    thread = threading.Thread(target=plan_again)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def beside(name: str, plan: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Compare the rate of a pipeline while a model is planned anew with its rate alone."""
    inputs, took = harness.example(plan), list[float]()
    with Pipeline.launch(plan, threads=1) as pipeline:

        def alone() -> float:
            return harness.rate(pipeline, inputs, given.slice)

        def with_planning() -> float:
            with planning_beside(plan, folder / "new.plan", took):
                return harness.rate(pipeline, inputs, given.slice)

        rates = harness.in_turns({"alone": alone, "planning": with_planning}, given.slices)
    ratio = harness.ratio(rates["planning"], rates["alone"])
    return {
        "model": name,
        "per_s": statistics.median(rates["alone"]),
        "while_planning_per_s": statistics.median(rates["planning"]),
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "planning_s": statistics.median(took),
        "share": max(0.0, 1 - ratio.median) * min(1.0, statistics.median(took) / _EVERY_S),
    }


def main() -> None:
    """Print a row for each model and number of stages, then the rate of each pipeline."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=["resnet50", "bert"], metavar="NAME|MODEL.onnx")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--gigabytes", nargs="*", type=int, default=[4])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--slices", type=int, default=10, help="0 leaves out the rates")
    parser.add_argument("--slice", type=float, default=4.0, help="seconds")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="folder for models and plans")
    given = parser.parse_args()
    columns = {"wall_s": "6.2f", "processor_s": "11.2f", "peak_mib": "8.0f"}
    columns |= {"reading_s": "9.2f", "search_s": "8.2f", "writing_s": "9.2f", "gain": "5.2f"}
    report = harness.Report(given, model="10", stages="6", **columns)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-planning-", dir=given.folder) as scratch:
        folder = Path(scratch)
        for name in given.names:
            model, dims = example_models.named(name, folder)
            for stages in given.stages:
                report.row(planning(Path(name).stem, model, folder, stages, given.runs, dims=dims))
        for name in given.names if given.slices else ():
            row = beside(Path(name).stem, folder / f"{Path(name).stem}-{given.stages[0]}.plan", folder, given)
            report.row(row, beside_text(row))
        for gigabytes in given.gigabytes:
            with tempfile.TemporaryDirectory(prefix="large-", dir=folder) as place:
                model = example_models.large(Path(place), gigabytes)
                report.row(
                    planning(f"{gigabytes} GiB", model, Path(place), given.stages[0], given.runs, costs="analytic")
                )


def beside_text(row: dict[str, Any]) -> str:
    """The rate of a pipeline as text."""
    return (
        f"{row['model']}: {row['per_s']:.2f}/s alone, {row['while_planning_per_s']:.2f}/s while it is planned anew; "
        f"ratio {row['ratio']:.3f} ({row['low']:.3f}-{row['high']:.3f}), {row['planning_s']:.1f} s a planning, share "
        f"{row['share']:.2%}"
    )


if __name__ == "__main__":
    main()
