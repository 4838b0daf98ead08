"""How much time and memory does it take to cut models of 4 GB and 12 GB?

Models with external data are cut by analytic costs, in turns with `cp` of the same bytes; peak memory and time are
measured. The models are made here (layers of 64 MiB) and removed again; the folder needs three times their size of free
space.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

from benchmarks import example_models, harness

TAKES = "15 min"


def timed(command: list[str]) -> tuple[float, int]:
    """Run a command, and return its seconds and its peak resident memory in bytes."""
    os.sync()  # so that neither command waits for writes of the other
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed with {process.returncode}")
    return time.monotonic() - begun, usage.ru_maxrss * 1024


def measure(gigabytes: int, place: Path, runs: int) -> dict[str, Any]:
    """Copy and cut in turns, and return the medians of both."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-large-", dir=place) as scratch:
        folder = Path(scratch)
        model = example_models.large(folder, gigabytes)
        copies: list[float] = []
        cuts: list[float] = []
        peaks: list[int] = []
        for _ in range(runs):
            seconds, _ = timed(["cp", str(folder / "weights.bin"), str(folder / "copy.bin")])
            copies.append(seconds)
            (folder / "copy.bin").unlink()
            plan = str(folder / "large.plan")
            command = [sys.executable, "-m", "onnxsplit", "partition", str(model), "-o", plan, "--costs", "analytic"]
            seconds, peak = timed(command)
            cuts.append(seconds)
            peaks.append(peak)
            shutil.rmtree(plan)
    cp_s, cut_s = statistics.median(copies), statistics.median(cuts)
    return {
        "gigabytes": gigabytes,
        "cp_s": cp_s,
        "partition_s": cut_s,
        "ratio": cut_s / cp_s,
        "peak_mib": max(peaks) / 2**20,
    }


def main() -> None:
    """Print a row for each size."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--gigabytes", nargs="+", type=int, default=[4, 12])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="folder for the models")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    report = harness.Report(given, gigabytes="9", cp_s="6.1f", partition_s="11.1f", ratio="6.2f", peak_mib="8.0f")
    for gigabytes in given.gigabytes:
        report.row(measure(gigabytes, given.folder, given.runs))


if __name__ == "__main__":
    main()
