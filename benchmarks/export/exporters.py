"""Models of all frameworks: exported, compared with the framework, cut in two, compared with the whole.

    python benchmarks/export/exporters.py [WORD ...] [--json]        only models with one of the words in their name

Frameworks that are not installed are rows that say so; `make test-export` makes an environment with all of them. Each
model is small and made here (tests/support/frameworks.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support"), str(ROOT)]
os.environ["PYTHONPATH"] = str(ROOT)

import frameworks
import onnx
from environment import environment_line

from onnxsplit.errors import OnnxsplitError, PartitionError
from onnxsplit.export import export
from onnxsplit.planning.planner import partition
from onnxsplit.stages.verify import verify


def measure(model: frameworks.Model, folder: Path) -> dict[str, Any]:
    """A row."""
    row: dict[str, Any] = {"model": model.name}
    missing = [name for name in model.needs if find_spec(name) is None]
    if missing:
        return row | {"result": f"not installed: {', '.join(missing)}"}
    (folder / "made").mkdir()
    source = model.make(folder / "made")
    begun = time.monotonic()
    try:
        done = export(source, folder / "out.onnx", **model.options)
    except OnnxsplitError as error:
        return row | {"result": str(error)[:200]}
    row["seconds"] = time.monotonic() - begun
    row["framework"] = done[0].framework
    row["difference"] = max(max(one.differences.values()) for one in done)
    cuts = []
    for number, one in enumerate(done):
        proto = onnx.load(one.path)
        named = {d.dim_param for value in proto.graph.input for d in value.type.tensor_type.shape.dim}
        dims = {name: size for name, size in model.dims.items() if name in named}
        plan = folder / f"{number}.plan"
        try:
            partition(one.path, stages=2, out=plan, costs="analytic", dims=dims)
        except PartitionError as error:
            cuts.append("one op" if "form 1 parts" in str(error) else str(error)[:100])
            continue
        found = list(verify(plan, one.path))
        worst = max(comparison.difference for comparison in found)
        cuts.append(f"{worst:.1e}" + ("" if all(comparison.good for comparison in found) else " DIFFERENT"))
    return row | {"result": "exported", "cut": ", ".join(cuts)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(environment_line())
        print("\n| model | framework | export, s | to the framework | cut in two, to the whole |")
        print("| --- | --- | --- | --- | --- |")
    for model in frameworks.models():
        if given.words and not any(word.lower() in model.name.lower() for word in given.words):
            continue
        with tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
            row = measure(model, Path(folder))
        if given.json:
            print(json.dumps(row), flush=True)
        elif row["result"] == "exported":
            figures = f"{row['seconds']:.1f} | {row['difference']:.1e} | {row['cut']}"
            print(f"| {row['model']} | {row['framework']} | {figures} |", flush=True)
        else:
            print(f"| {row['model']} | | | {row['result']} | |", flush=True)


if __name__ == "__main__":
    main()
