"""Do models in half precision give the same results after a cut?

The trained models of `models/zoo.toml`, or those named, are converted, cut in 1, 2 and 3 stages, and compared with the
whole converted model under plain ONNX Runtime. The ways to convert:

    ort, ort-io        onnxruntime.transformers.float16, without and with keep_io_types
    common, common-io  onnxconverter_common.float16, the same, if it is installed
                       (pip install --no-deps onnxconverter-common)
    bfloat16           weights stored as bfloat16, each followed by a Cast to float32
    float8             weights stored as float8e4m3fn with a scale for each row, each followed by a DequantizeLinear
    int4               weights stored as int4, the same way

A difference is relative to the scale of an output; the largest of all outputs is printed. All models run in plain
sessions with the default options. The stages run one after the other, and once more merged into one model. `verify` is
the result of `onnxsplit verify` and the tolerance it allows. If ONNX Runtime refuses the whole converted model, the row
gives its message.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import zoo
from onnx import TensorProto, helper, numpy_helper

from benchmarks import harness
from onnxsplit.distance import distance
from onnxsplit.errors import OnnxsplitError
from onnxsplit.model.protobuf import all_nodes, nested_graphs
from onnxsplit.npz import load_npz
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import write_plan
from onnxsplit.stages.merge import merge
from onnxsplit.stages.verify import verify

TAKES = "30 min"

LEAST_ELEMENTS = 64  # elements of a weight that is stored in fewer bits
OPSETS = {"bfloat16": 13, "float8": 19, "int4": 21}


def by_onnxruntime(model: onnx.ModelProto, keep: bool) -> onnx.ModelProto:
    """Convert to float16 with ONNX Runtime's converter."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=keep)


def by_onnxconverter_common(model: onnx.ModelProto, keep: bool) -> onnx.ModelProto:
    """Convert to float16 with the converter that most guides name."""
    from onnxconverter_common.float16 import convert_float_to_float16

    return convert_float_to_float16(model, keep_io_types=keep)


def with_narrow_weights(model: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """Store every float32 weight in a narrower type, followed by the op that widens it again; in subgraphs too."""
    present = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if present < OPSETS[kind]:
        model = onnx.version_converter.convert_version(model, OPSETS[kind])
    for graph in (model.graph, *(g for node in all_nodes(model.graph.node) for g in nested_graphs(node))):
        _narrow_weights(graph, kind)
    model.ir_version = max(model.ir_version, 10)
    return model


def _narrow_weights(graph: onnx.GraphProto, kind: str) -> None:
    listed = {value.name for value in graph.input}
    weights = {t.name: t for t in graph.initializer if t.name not in listed}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            weights[node.output[0]] = node.attribute[0].t
    widened: list[onnx.NodeProto] = []
    narrow: list[onnx.TensorProto] = []
    for name, tensor in weights.items():
        many = np.prod(tensor.dims) >= LEAST_ELEMENTS and (kind == "bfloat16" or len(tensor.dims) > 1)
        if tensor.data_type == TensorProto.FLOAT and many:
            stored, op = _narrowed(name, numpy_helper.to_array(tensor), kind)
            narrow += stored
            widened.append(op)
    names = {node.output[0] for node in widened}
    kept = [t for t in graph.initializer if t.name not in names]
    nodes = [node for node in graph.node if not names.intersection(node.output)]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend([*narrow, *kept])
    graph.node.extend([*widened, *nodes])


def _narrowed(name: str, array: Any, kind: str) -> tuple[list[onnx.TensorProto], onnx.NodeProto]:
    """Return the initializers that store a weight, and the op that restores it under its name."""
    stored = f"{name}.narrow"
    if kind == "bfloat16":
        tensor = numpy_helper.from_array(array.astype(ml_dtypes.bfloat16), stored)
        return [tensor], helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT)
    largest = 448.0 if kind == "float8" else 7.0
    rest = tuple(range(1, array.ndim))
    scale = np.abs(array).max(axis=rest).astype(np.float32) / np.float32(largest)
    scale[scale == 0] = 1
    scaled = array / scale.reshape(-1, *(1 for _ in rest))
    tensor = numpy_helper.from_array(
        scaled.astype(ml_dtypes.float8_e4m3fn) if kind == "float8" else np.rint(scaled).astype(ml_dtypes.int4), stored
    )
    op = helper.make_node("DequantizeLinear", [stored, f"{name}.scale"], [name], axis=0)
    return [tensor, numpy_helper.from_array(scale, f"{name}.scale")], op


WAYS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "ort": lambda model: by_onnxruntime(model, False),
    "ort-io": lambda model: by_onnxruntime(model, True),
    "common": lambda model: by_onnxconverter_common(model, False),
    "common-io": lambda model: by_onnxconverter_common(model, True),
    "bfloat16": lambda model: with_narrow_weights(model, "bfloat16"),
    "float8": lambda model: with_narrow_weights(model, "float8"),
    "int4": lambda model: with_narrow_weights(model, "int4"),
}


def ways_here() -> list[str]:
    """Return the ways whose converter is installed."""
    installed = importlib.util.find_spec("onnxconverter_common") is not None
    return [way for way in WAYS if installed or not way.startswith("common")]


def session(path: Path) -> onnxruntime.InferenceSession:
    """Open a plain session with the default options, except that it does not log."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Run a model file and return its outputs by name."""
    opened = session(path)
    names = [value.name for value in opened.get_outputs()]
    return dict(zip(names, opened.run(names, {v.name: values[v.name] for v in opened.get_inputs()}), strict=True))


def rows(model: Path, dims: dict[str, int], stages: list[int], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of stages, or one row with the reason why the model cannot be cut."""
    try:
        session(model)
        subject = examine(model, dims=dims, threads=1)
    except OnnxsplitError as error:
        yield {"stages": "-", "verdict": f"refused: {error}"}
        return
    except Exception as error:  # ONNX Runtime's errors share no base class
        yield {"stages": "-", "verdict": f"ONNX Runtime refuses the whole model: {error}"}
        return
    for count in stages:
        row: dict[str, Any] = {"stages": count}
        try:
            plan = write_plan(subject, folder / "m.plan", CutOptions(stages=count, rounds=0)).plan
            row |= judged(model, folder / "m.plan", folder)
            row["crossing"] = sorted(
                {plan.tensors[cut.tensor].dtype for cut in plan.cuts if cut.tensor in plan.tensors}
            )
        except OnnxsplitError as error:
            row["verdict"] = f"refused: {error}"
        yield row


def judged(model: Path, plan_folder: Path, folder: Path) -> dict[str, Any]:
    """Differences between the whole model, its stages and the merged stages, and what verify says."""
    plan = load_plan(plan_folder)
    given = load_npz(plan_folder / plan.example_inputs.name)
    whole = run(model, given)
    values = dict(given)
    for stage in plan.stages:
        values.update(run(plan_folder / stage.file, values))
    merge(plan_folder, folder / "merged.onnx")
    merged = run(folder / "merged.onnx", given)
    comparisons = verify(plan_folder, model)
    allowed = max(c.tolerance for c in comparisons)
    difference = max(distance(values[name], whole[name]) for name in plan.outputs if name in values)
    return {
        "difference": difference,
        "merged": max(distance(merged[name], whole[name]) for name in plan.outputs),
        "off": max(c.difference for c in comparisons),
        "optimized": max(c.optimized for c in comparisons),
        "moved": max(c.moved for c in comparisons),
        "tolerance": allowed,
        "narrowest": comparisons[0].narrowest,
        "verdict": "good" if all(c.good for c in comparisons) else "DIFFERENT",
    }


def text(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    head = f"{row['model']:16} {row['way']:10} K={row['stages']}  "
    if "difference" not in row:
        return head + " ".join(str(row["verdict"]).split())[:200]
    return (
        f"{head}stages {row['difference']:.1e}  merged {row['merged']:.1e}  verify off {row['off']:.1e}  "
        f"on {row['optimized']:.1e}  optimisation alone {row['moved']:.1e}  tolerance {row['tolerance']:.1e} "
        f"({row['narrowest'] or 'float32'})  crosses as {', '.join(row['crossing']) or '-'}  {row['verdict']}"
    )


def main() -> None:
    """Print a row for each model, way and number of stages."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=ways_here())
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # onnxconverter-common warns of every weight that it rounds
    report = harness.Report(given)
    sources = {Path(n).stem: (Path(n), {}) for n in given.names if Path(n).is_file()}
    for name, entry in zoo.entries().items():
        if not given.names or name in given.names:
            sources[name] = (zoo.fetch(name), entry.get("dims", {}))
    for name, (source, dims) in sources.items():
        for way in given.ways:
            with tempfile.TemporaryDirectory(prefix="onnxsplit-halves-") as scratch:
                folder = Path(scratch)
                try:
                    onnx.save(WAYS[way](onnx.load(source)), folder / "model.onnx")
                    tried = list(rows(folder / "model.onnx", dims, given.stages, folder))
                except Exception as error:  # converters raise errors of any kind
                    tried = [{"stages": "-", "verdict": f"the converter fails: {type(error).__name__}: {error}"}]
            for row in tried:
                row = {"model": name, "way": way, **row}
                report.row(row, text(row))


if __name__ == "__main__":
    main()
