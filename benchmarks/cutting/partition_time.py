"""How long does `onnxsplit partition` take with defaults, and is that within its bound?

The bound is twelve runs of the whole model in one thread and ten seconds, beside starting Python, and reading and
writing the model once, which is measured with plain ONNX. The models are those of models/zoo.toml, and ResNet-50 and
BERT-base in full size.

With --before, another checkout does the same in turns. *cpu s* is the processor time of all processes, which a busy
machine does not change. The share of the cores that other processes used meanwhile is *others*.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import zoo

from benchmarks import example_models, harness
from onnxsplit.machine_load import cpu_times

TAKES = "12 min"

RUNS, SEARCH_S = 12, 10.0

FULL = ["full-resnet50", "full-bert"]

REWRITE = "import sys, onnx, onnxsplit.planning.planner; onnx.save(onnx.load(sys.argv[1]), sys.argv[2])"


def timed(command: list[str], checkout: Path) -> dict[str, Any]:
    """Run Python with a checkout's packages; return its output, its time and its processor time."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    before, load, begun = _children_s(), cpu_times(), time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    seconds, cpu_s = time.monotonic() - begun, _children_s() - before
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return {"out": done.stdout, "s": seconds, "cpu_s": cpu_s, "others": cpu_times().busy_share_since(load, cpu_s)}


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def partitioned(case: example_models.Named, checkout: Path, options: list[str]) -> dict[str, Any]:
    """Cut a model with the command line of a checkout; return the figures."""
    _, model, dims = case
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        sizes = [word for name, size in dims.items() for word in ("--dim", f"{name}={size}")]
        command = [
            "-P",
            "-m",
            "onnxsplit",
            "partition",
            str(model),
            "-o",
            f"{folder}/m.plan",
            "--json",
            *sizes,
            *options,
        ]
        figures = timed(command, checkout)
    plan = json.loads(figures.pop("out"))["summary"]
    return figures | {"whole_ms": plan["costs"]["whole_time_ns"] / 1e6, "rounds": len(plan["costs"]["rounds"])}


def rewritten_s(case: example_models.Named) -> float:
    """Measure the seconds of starting Python, and reading and writing a model once."""
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        return float(timed(["-c", REWRITE, str(case[1]), f"{folder}/m.onnx"], harness.ROOT)["s"])


def main() -> None:
    """Print a row for each model, then how many were above the bound."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*", default=[*zoo.entries(), *FULL], metavar="NAME|MODEL.onnx")
    parser.add_argument("--before", type=Path, help="another checkout, for a comparison")
    parser.add_argument("--option", nargs="+", default=[], help="options of partition, without their dashes")
    parser.add_argument("--minutes", type=float, default=12.0, help="no model is begun later than this")
    given = parser.parse_args()
    options = [f"--{option}" for option in given.option]
    report = harness.Report(
        given, model="22", whole_ms="9.2f", write_s="7.1f", bound_s="7.1f", s="7.1f", within="6", cpu_s="7.1f",
        rounds="6", others="6.0%", before_s="8.1f", before_cpu_s="12.1f",
    )  # fmt: skip

    def work(case: example_models.Named) -> dict[str, Any]:
        write_s = rewritten_s(case)
        before = partitioned(case, given.before.resolve(), []) if given.before is not None else {}
        figures = partitioned(case, harness.ROOT, options)
        bound_s = RUNS * figures["whole_ms"] / 1e3 + SEARCH_S + write_s
        shown = {"model": case[0], "write_s": write_s, "bound_s": bound_s, **figures}
        within = figures["s"] <= bound_s
        return shown | {"within": within, "before_s": before.get("s"), "before_cpu_s": before.get("cpu_s")}

    found: list[dict[str, Any]] = []
    attempts = harness.Attempts(given.minutes)
    with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        places = given.names, Path(folder)
        sources = example_models.every(*places), example_models.full_recipes(*places)
        for figures in attempts(*sources, work=work):
            found.append(figures)
            report.row(figures)
    report.note(attempts.summary())
    over = [figures["model"] for figures in found if not figures["within"]]
    report.note(f"within the bound: {len(found) - len(over)} of {len(found)}; above it: {', '.join(over) or 'none'}")
    report.note(f"all together: {sum(figures['s'] for figures in found):.0f} s")
    if given.before is not None:
        report.note(f"before: {sum(figures['before_s'] for figures in found):.0f} s")


if __name__ == "__main__":
    main()
