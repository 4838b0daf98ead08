"""Can the kinds of models that users have be cut, and are the results of their stages right?

The models are those of `kinds_made.py`, or those that are named. Inputs are `MODEL.npz` or `MODEL.*.npz` beside a
model, or random. The stages run in processes. They are also merged into one model, which runs, too.

The reference is plain ONNX Runtime on the whole model, without optimisation and with it. A difference is relative to
the scale of an output, and taken to the nearer of the two references. Up to 1e-3 is allowed (1e-2 for models with
float16, 5e-2 for bfloat16 or float8), or twice the effect of optimisation alone. Integers and text must be equal. If
onnx's checker accepts the model, it must accept every stage and the merged model, too.

Each model is first cut without any option. If that fails, it is cut with the options that may help: example inputs,
custom ops, only the outputs that are tensors, inputs that have a default. Each attempt is a row. Options that the
installed version does not know are left out, so that an older version can be tested, too.
"""

from __future__ import annotations

import inspect
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
import onnx
import onnxruntime

import onnxsplit
from benchmarks import harness
from benchmarks.cutting import kinds_made
from onnxsplit.errors import OnnxsplitError
from onnxsplit.planning.options import CutOptions
from onnxsplit.stages.merge import merge
from runtime import Pipeline

TAKES = "5 min"

EXTENSIONS = "onnxruntime-extensions"
LEVELS = onnxruntime.GraphOptimizationLevel
KNOWN = {*inspect.signature(onnxsplit.partition).parameters, *(option.name for option in fields(CutOptions))}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Way:
    """The options of one attempt."""

    words: str
    cut: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Subject:
    """A model, its inputs, and the outputs of plain ONNX Runtime for them.

    Attributes:
        path: the file.
        proto: the model without external data.
        feeds: inputs by the name of their file; ``random`` when they were made up.
        wanted: for each of them, the outputs without optimisation and with it.
    """

    path: Path
    proto: onnx.ModelProto
    feeds: dict[str, Arrays]
    wanted: dict[str, tuple[Arrays, Arrays]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Subject:
        """Read a file and its inputs, and run the reference."""
        made = cls(path, onnx.load(path, load_external_data=False), {})
        plain = made.session(path, LEVELS.ORT_DISABLE_ALL)
        files = sorted(path.parent.glob(f"{path.name}*.npz"))
        made.feeds = {file.name: dict(np.load(file)) for file in files} or {"random": random_inputs(plain)}
        optimised = made.session(path, LEVELS.ORT_ENABLE_ALL)
        made.wanted = {name: (run(plain, feed), run(optimised, feed)) for name, feed in made.feeds.items()}
        return made

    @property
    def is_custom(self) -> bool:
        """Whether the model has ops of onnxruntime-extensions."""
        return any(one.domain == "ai.onnx.contrib" for one in self.proto.opset_import)

    @property
    def other_outputs(self) -> list[str]:
        """The names of outputs that are not tensors."""
        return [value.name for value in self.proto.graph.output if not value.type.HasField("tensor_type")]

    @property
    def tolerance(self) -> float:
        """The tolerance for the narrowest float type among the weights."""
        kinds = {tensor.data_type for tensor in self.proto.graph.initializer}
        narrow = {
            onnx.TensorProto.BFLOAT16,
            *(getattr(onnx.TensorProto, k) for k in dir(onnx.TensorProto) if "FLOAT8" in k),
        }
        return 5e-2 if kinds & narrow else 1e-2 if onnx.TensorProto.FLOAT16 in kinds else 1e-3

    def session(self, path: Path, level: Any) -> onnxruntime.InferenceSession:
        """Open a plain session of ONNX Runtime."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level, options.intra_op_num_threads = level, 1
        options.log_severity_level = 3
        if self.is_custom:
            import onnxruntime_extensions

            options.register_custom_ops_library(onnxruntime_extensions.get_library_path())
        return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def ways(self) -> Iterator[Way]:
        """The options to try, one set after the other, until the cut is good."""
        yield Way("as it is")
        graph = self.proto.graph
        constants = {tensor.name for tensor in graph.initializer}
        given = next(iter(self.feeds.values()))
        examples = {"inputs": {name: array for name, array in given.items() if name not in constants}}
        kept = [name for name in given if name in constants]
        tensors = [value.name for value in graph.output if value.name not in self.other_outputs]
        if self.is_custom and "custom_ops" in KNOWN:
            yield Way("with custom ops", {"custom_ops": [EXTENSIONS]}, {"custom_ops": [EXTENSIONS]})
        if "random" not in self.feeds:
            yield Way("with inputs", examples)
        if self.other_outputs and "outputs" in KNOWN:
            yield Way("tensor outputs", {"outputs": tensors})
        if kept and "keep_inputs" in KNOWN:
            yield Way("kept inputs", {"keep_inputs": kept})

    def difference(self, feed: str, outputs: Mapping[str, Any]) -> tuple[float, float]:
        """The distance of outputs to the references, and the distance between the references."""
        off, on = self.wanted[feed]
        names = [name for name in off if name not in self.other_outputs]
        to_off, to_on = (max(distance(outputs[name], wanted[name]) for name in names) for wanted in (off, on))
        return min(to_off, to_on), max(distance(on[name], off[name]) for name in names)


def random_inputs(session: onnxruntime.InferenceSession) -> Arrays:
    """Make random inputs of small sizes; dimensions of one name have one size."""
    random, sizes, inputs = np.random.default_rng(0), dict[str, int](), {}
    kinds = {"float": "float32", "double": "float64"}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) else sizes.setdefault(str(d), 3 + len(sizes)) for d in value.shape]
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        if kind == "string":
            inputs[value.name] = random.integers(0, 10, shape).astype(str).astype(object)
        elif "float" in kind or kind == "double":
            inputs[value.name] = random.standard_normal(shape).astype(kinds.get(kind, kind))
        else:
            inputs[value.name] = random.integers(0, 2, shape).astype(kind)
    return inputs


def run(session: onnxruntime.InferenceSession, feed: Arrays) -> Arrays:
    """Outputs by name."""
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def distance(array: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference relative to the scale; infinite if shape, type, text or integers differ."""
    if array.shape != wanted.shape or (array.dtype != wanted.dtype and wanted.dtype.kind not in "OUS"):
        return float("inf")
    if wanted.dtype.kind not in "fV":
        return 0.0 if np.array_equal(array.astype(wanted.dtype), wanted) else float("inf")
    left, right = array.astype(np.float64), wanted.astype(np.float64)
    if not np.array_equal(np.isfinite(left), np.isfinite(right)):
        return float("inf")
    left, right = left[np.isfinite(right)], right[np.isfinite(right)]
    return float(np.abs(left - right).max(initial=0.0) / (np.abs(right).max(initial=0.0) or 1.0))


def attempt(subject: Subject, way: Way, stages: int, folder: Path) -> dict[str, Any]:
    """Cut once, run the stages in processes, merge and run that."""
    row: dict[str, Any] = {"way": way.words, "stages": stages}
    plan = folder / "m.plan"
    try:
        onnxsplit.partition(subject.path, stages=stages, out=plan, **way.cut)
        row["partition"] = "good"
    except OnnxsplitError as error:
        return row | {"partition": str(error), "verdict": "refused"}
    except Exception as error:
        return row | {"partition": f"{type(error).__name__}: {error}", "verdict": "CRASHED"}
    merged = folder / "merged.onnx"

    def by_stages() -> dict[str, Any]:
        with Pipeline.launch(plan, **way.run) as pipeline:
            return {name: pipeline.run(feed, timeout=120) for name, feed in subject.feeds.items()}

    def by_merge() -> dict[str, Any]:
        merge(plan, merged)
        session = subject.session(merged, LEVELS.ORT_ENABLE_ALL)
        return {name: run(session, feed) for name, feed in subject.feeds.items()}

    for how, answers in (("run", by_stages), ("merge", by_merge)):
        row[how] = judged(subject, answers)
    row["checker"] = checked(subject.path, [*sorted(plan.glob("stage*.onnx")), merged])
    row["moved"] = max(subject.difference(name, wanted[0])[1] for name, wanted in subject.wanted.items())
    least = max(subject.tolerance, 2 * row["moved"])
    figures = [row["run"], row["merge"]]
    if any(isinstance(figure, float) and figure > least for figure in figures):
        row["verdict"] = "WRONG"
    else:
        good = row["checker"] == "good" and all(isinstance(figure, float) for figure in figures)
        row["verdict"] = "good" if good else "FAILED"
    return row


def checked(model: Path, files: list[Path]) -> str:
    """The errors of onnx's checker for the written files, if it accepts the source model."""
    for path in (model, *files):
        try:
            onnx.checker.check_model(str(path))
        except Exception as error:  # the checker and protobuf raise errors of their own
            return "good" if path == model else f"{path.name}: {error}"
    return "good"


def judged(subject: Subject, answers: Any) -> float | str:
    """The largest difference among all inputs, or the reason why there are no answers."""
    try:
        return max(subject.difference(name, outputs)[0] for name, outputs in answers().items())
    except Exception as error:  # of onnxsplit, ONNX Runtime or the checker
        return f"{type(error).__name__}: {error}"


def rows(path: Path, stages: int, scratch: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each set of options that is tried."""
    try:
        subject = Subject.of(path)
    except Exception as error:  # any error of ONNX Runtime or onnx
        yield {"stages": stages, "way": "", "partition": "", "verdict": f"does not run whole: {error}"}
        return
    for way in subject.ways():
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            row = attempt(subject, way, stages, Path(folder))
        if subject.other_outputs:
            row["not compared"] = subject.other_outputs
        yield row
        if row["verdict"] in ("good", "WRONG"):  # no option excuses a wrong answer
            return


def models(names: list[str], folder: Path) -> Iterator[tuple[str, Path | None]]:
    """Yield the name and file of each model; the file is None if it needs a package that is not installed."""
    for given in map(Path, names):
        for path in sorted(given.rglob("*.onnx")) if given.is_dir() else [given]:
            yield str(path.relative_to(given)) if given.is_dir() else path.name, path
    if not names:
        for make in kinds_made.CLASSES:
            yield make.__name__, make(folder)


def shown(value: float | str) -> str:
    """Format a cell: a difference, or the beginning of a message without the paths that ONNX Runtime puts before it."""
    if isinstance(value, float):
        return f"{value:.1e}"
    return re.sub(r"Load model from \S+ failed:", "", " ".join(value.split()))[:240]


def text(row: Mapping[str, Any]) -> str:
    """A row as a line of text."""
    head = f"{row['model']:34} K={row['stages']}  {row['way']:15} {shown(row['verdict']):8}"
    told = [f"{how}: {shown(row[how])}" for how in ("run", "merge") if how in row]
    if row["partition"] not in ("good", ""):
        told.append(shown(row["partition"]))
    if row.get("checker", "good") != "good":
        told.append(f"checker: {shown(row['checker'])}")
    if "not compared" in row:
        told.append(f"not tensors, not compared: {', '.join(row['not compared'])}")
    return "  ".join([head, *told])


def main() -> None:
    """Print a row for each model, number of stages and attempt."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("models", nargs="*", metavar="MODEL.onnx|FOLDER")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 3])
    given = parser.parse_args()
    report = harness.Report(given)
    first, last = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="onnxsplit-classes-") as scratch:
        for name, path in models(given.models, Path(scratch)):
            for stages in given.stages if path is not None else ():
                tries = []
                for row in rows(path, stages, Path(scratch)):
                    tries.append({"model": name, **row})
                    report.row(tries[-1], text(tries[-1]))
                first[tries[0]["verdict"].partition(":")[0]] += 1
                last[tries[-1]["verdict"].partition(":")[0]] += 1
            if path is None:
                report.note(f"{name:34} a package that it needs is not installed")
    for words, counted in (("As they are", first), ("With options", last)):
        report.note(f"{words}: " + ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common()))


if __name__ == "__main__":
    main()
