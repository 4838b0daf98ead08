"""Every model at K = 2, 3, 4, 8: what `verify` says, or why it is refused; and how long cutting took.

    python benchmarks/cutting/generality.py [NAME|MODEL.onnx ...] [--stages 2 3 4 8] [--json]

Without names: the trained models of `models/zoo.toml`, the nine light graphs that the onnx package carries (their
weights made random, since as they are all outputs are equal and a wrong cut would pass), and the recipes (small).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

import numpy as np
import onnx
import zoo
from environment import environment_line

from onnxsplit.errors import OnnxsplitError
from onnxsplit.export import export
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import write_plan
from onnxsplit.planning.subject import examine
from onnxsplit.stages.verify import verify

RECIPES: dict[str, dict[str, Any]] = {
    "resnet50": {"width": 16, "size": 64},
    "bert": {"layers": 4, "width": 128, "heads": 4, "vocabulary": 1000},
    "gpt2": {"layers": 4, "width": 128, "heads": 4, "vocabulary": 1000},
    "inception": {"width": 16, "size": 64},
    "multitask": {"width": 16, "size": 64},
}


def light_models(folder: Path) -> Iterator[tuple[str, Path, dict[str, int]]]:
    """The light graphs of the onnx package, each constant-filled weight replaced by a random initializer."""
    for source in sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx")):
        model = onnx.load(source)
        random = np.random.default_rng(0)
        shapes = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        kept = []
        for node in model.graph.node:
            if node.op_type == "ConstantOfShape" and node.input[0] in shapes:
                size = tuple(int(n) for n in shapes[node.input[0]])
                values = (random.random(size, dtype=np.float32) - 0.4) / float(max(1, np.prod(size[1:]))) ** 0.5
                model.graph.initializer.append(
                    onnx.numpy_helper.from_array(np.abs(values) if len(size) == 1 else values, node.output[0])
                )
            else:
                kept.append(node)
        del model.graph.node[:]
        model.graph.node.extend(kept)
        path = folder / source.name
        onnx.save(model, path)
        yield source.stem, path, {}


def models(names: list[str], folder: Path) -> Iterator[tuple[str, Path, dict[str, int]]]:
    """Name, file and sizes of every model asked for."""
    for name in names:
        if Path(name).is_file():
            yield Path(name).stem, Path(name), {}
    for name, entry in zoo.entries().items():
        if not names or name in names:
            yield name, zoo.fetch(name), entry.get("dims", {})
    if not names or "light" in names:
        yield from light_models(folder)
    for name, parameters in RECIPES.items():
        if not names or f"recipe-{name}" in names:
            export(str(ROOT / "models" / f"{name}.py"), folder / f"{name}.onnx", parameters=parameters)
            yield f"recipe-{name}", folder / f"{name}.onnx", {}


def main() -> None:
    """Print a row a model and K."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not given.json:
        print(environment_line())
    with tempfile.TemporaryDirectory(prefix="onnxsplit-generality-") as scratch:
        for name, model, dims in models(given.names, Path(scratch)):
            begun = time.monotonic()
            subject = examine(model, dims=dims, threads=1)
            examined = time.monotonic() - begun
            for stages in given.stages:
                row: dict[str, Any] = {"model": name, "ops": len(subject.graph.ops), "stages": stages}
                begun = time.monotonic()
                try:
                    plan = Path(scratch) / "m.plan"
                    write_plan(subject, plan, CutOptions(stages=stages, rounds=0))
                    row |= {"cut_s": time.monotonic() - begun, "examine_s": examined}
                    found = verify(plan, model)
                    row["verdict"] = "good" if all(c.good for c in found) else "WRONG"
                    row["repeatable"] = all(c.repeatable for c in found)
                    row["exact"] = all(c.exact for c in found)
                    for figure in ("difference", "optimized", "moved"):
                        row[figure] = max(getattr(c, figure) for c in found)
                except OnnxsplitError as error:
                    row["verdict"] = f"refused: {error}"
                print(json.dumps(row) if given.json else text(row), flush=True)


def text(row: dict[str, Any]) -> str:
    """A row for people."""
    head = f"{row['model']:22} {row['ops']:5} ops  K={row['stages']}  "
    if "exact" not in row:
        return head + row["verdict"][:160]
    off = "bit-equal" if row["exact"] else f"{row['difference']:.1e}"
    return (
        f"{head}{row['verdict']}  off: {off:9}  on: {row['optimized']:.1e}  optimisation alone: {row['moved']:.1e}  "
        f"examined in {row['examine_s']:.1f} s, cut and written in {row['cut_s']:.2f} s"
    )


if __name__ == "__main__":
    main()
