"""Throughput of a cut beside its ceiling and what a user could pick instead.

    python benchmarks/throughput/run.py [NAME|MODEL.onnx ...] [--stages 2] [--slices 20] [--json]

Without names: ResNet-50 and BERT-base (exported here, which needs the extra torch) and the OCR recogniser (fetched).
The ceiling is the stage files running at once in separate processes with no communication; "whole-model processes"
is what a user with memory to spare would run. Contenders take turns in slices of half a second; ratios are taken
slice by slice; intervals are 95 %, by bootstrap.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

import msgspec
import zoo
from environment import environment, environment_line

from onnxsplit.errors import OnnxsplitError
from onnxsplit.export import export
from onnxsplit.planner import partition
from runtime.bench import Report, bench

DEFAULT = ["resnet50", "bert", "ocr-recognizer"]


def model_of(name: str, folder: Path) -> tuple[Path, dict[str, int]]:
    """The file of a recipe, of a model of the zoo, or the file named; and sizes for its free dimensions."""
    if Path(name).is_file():
        return Path(name), {}
    if name in zoo.entries():
        return zoo.fetch(name), zoo.entries()[name].get("dims", {})
    out = folder / f"{name}.onnx"
    export(str(ROOT / "models" / f"{name}.py"), out)
    return out, {}


def main() -> None:
    """Print a table a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=DEFAULT)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(environment_line())
    with tempfile.TemporaryDirectory(prefix="onnxsplit-benchmark-") as scratch:
        for name in given.names:
            try:
                model, dims = model_of(name, Path(scratch))
                plan = Path(scratch) / "model.plan"
                partition(model, stages=given.stages, out=plan, dims=dims)
                report = bench(plan, model=model, slices=given.slices)
            except (OnnxsplitError, zoo.FetchError) as error:
                print(
                    json.dumps({"model": name, "skipped": str(error)}) if given.json else f"\n{name}: skipped: {error}"
                )
                continue
            if given.json:
                found = {"model": name, "environment": environment(), "report": msgspec.to_builtins(report)}
                print(json.dumps(found), flush=True)
            else:
                print(text(name, report), flush=True)


def text(name: str, report: Report) -> str:
    """A report for people."""
    lines = [f"\n{name}", f"  {'':45} {'per second':>22}   pipeline over it"]
    lines += [
        f"  {row.name:45} {row.per_s:8.2f} ({row.low:.2f}-{row.high:.2f})   "
        f"{row.ratio:.3f} ({row.ratio_low:.3f}-{row.ratio_high:.3f})"
        for row in report.rows
    ]
    lines.append(
        f"  one request: {report.latency_p50_ns / 1e6:.2f} ms median; "
        f"its stages alone, in turn: {report.stages_ns / 1e6:.2f} ms"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
