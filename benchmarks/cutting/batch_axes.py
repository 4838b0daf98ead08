"""Does plain ONNX Runtime agree with the batch axes that `partition` claims?

The models are the trained ones of `models/zoo.toml`, the recipes, the models of export/exporters.py (those whose
frameworks are installed), and nets whose rows affect each other (`tests/support/deceivers.py`), or those named.

The check is independent of the proof. It runs the whole model in one session on its own batches and on parts of them,
with other random numbers, scales and sizes than the proof used. A claim is WRONG if an output of a part differs from
the same rows of the whole batch's output by more than the tolerance, relative to the row's scale.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import deceivers
import frameworks
import numpy as np
import onnx
import zoo

from benchmarks import harness
from benchmarks.example_models import Named
from onnxsplit.errors import OnnxsplitError
from onnxsplit.export import export
from onnxsplit.model.example_inputs import table_size
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import write_plan
from onnxsplit.session import Session, open_session

TAKES = "10 min"

RECIPES: dict[str, dict[str, Any]] = {
    "resnet50": {"width": 16, "size": 64},
    "bert": {"layers": 2, "width": 64, "heads": 4, "vocabulary": 300},
    "gpt2": {"layers": 2, "width": 64, "heads": 4, "vocabulary": 300},
    "llama": {"layers": 2},
    "inception": {"width": 16, "size": 64},
    "multitask": {"width": 16, "size": 64},
}
_TRIALS = 12
_TOLERANCE = 1e-3
_NARROW = 5e-2  # for models with half-precision numbers


def models(names: list[str], folder: Path) -> Iterator[Named]:
    """Yield the name, file and sizes of every model that was asked for."""
    wanted = [name for name in names if not Path(name).is_file()]
    yield from ((Path(name).stem, Path(name), {}) for name in names if Path(name).is_file())
    for name, entry in zoo.entries().items():
        if not names or name in wanted:
            yield name, zoo.fetch(name), entry.get("dims", {})
    for net in deceivers.DECEIVERS + deceivers.HONEST:
        if not names or net.__name__ in wanted:
            onnx.save(net(), folder / f"{net.__name__}.onnx")
            yield net.__name__, folder / f"{net.__name__}.onnx", {"batch": 2}
    if importlib.util.find_spec("torch") is not None:
        for name, parameters in RECIPES.items():
            if not names or f"recipe-{name}" in wanted:
                export(str(harness.ROOT / "models" / f"{name}.py"), folder / f"{name}.onnx", parameters=parameters)
                yield f"recipe-{name}", folder / f"{name}.onnx", {}
    yield from _exported(names, wanted, folder)


def _exported(names: list[str], wanted: list[str], folder: Path) -> Iterator[Named]:
    for number, model in enumerate(frameworks.models()):
        missing = any(importlib.util.find_spec(name) is None for name in model.needs)
        if missing or (names and model.name not in wanted):
            continue
        (folder / f"made{number}").mkdir()
        try:
            source = model.make(folder / f"made{number}")
            done = export(source, folder / f"export{number}.onnx", **model.options)
        except OnnxsplitError:
            continue  # export/exporters.py prints the reason
        for one in done:
            yield f"{model.name}: {one.path.stem}" if len(done) > 1 else model.name, one.path, model.dims


def judged(path: Path, axes: dict[str, int], example: dict[str, Any], limits: dict[str, int | None]) -> str:
    """Check a claim: ``holds in N of M``, or where it is wrong."""
    session = open_session(path, threads=1, level="basic")
    narrow = any(kind in onnx.load(path, load_external_data=False).SerializeToString() for kind in (b"float16",))
    inputs = {name for name, _ in session.inputs}
    random = np.random.default_rng(12345)
    ran = 0
    for number in range(_TRIALS):
        count = int(random.choice([2, 3, 4, 6, 7]))
        batch = {
            name: _drawn(name, array, axes[name], count, limits.get(name), number, random) if name in axes else array
            for name, array in example.items()
            if name in inputs
        }
        at = int(random.integers(1, count))
        try:
            whole = session.run(batch)
            first, second = (_part(session, batch, axes, cut) for cut in (slice(0, at), slice(at, count)))
        except OnnxsplitError:
            continue  # the model does not accept such numbers
        ran += 1
        for name, array in whole.items():
            if name not in axes:
                return f"WRONG: the output {name} has no axis"
            joined = np.concatenate([first[name], second[name]], axis=axes[name])
            if not _alike(joined, array, axes[name], _NARROW if narrow else _TOLERANCE):
                return f"WRONG: {name} differs, batch {number} of {count} rows"
    return f"holds in {ran} of {_TRIALS}"


def _part(session: Session, batch: dict[str, Any], axes: dict[str, int], cut: slice) -> dict[str, Any]:
    return session.run({n: a[(slice(None),) * axes[n] + (cut,)] if n in axes else a for n, a in batch.items()})


def _drawn(name: str, array: Any, axis: int, count: int, limit: int | None, number: int, random: Any) -> Any:
    shape = list(array.shape)
    shape[axis] = count
    kind = array.dtype.kind
    if kind in "iu":
        top = limit or max(2, int(array.max(initial=0)) + 1)
        low = 1 if "len" in name.lower() else 0
        made = random.integers(min(low, top - 1), top, size=shape)
        if "mask" in name.lower():
            made = np.sort(made, axis=-1)[..., ::-1]
            made[..., :1] = 1
        return made.astype(array.dtype)
    if kind == "b":
        return random.random(shape) < 0.7
    if kind in "OU":
        return np.resize(array, shape)
    scales = 10.0 ** random.uniform(-2, 2.5, size=[count if place == axis else 1 for place in range(len(shape))])
    return (random.standard_normal(shape) * (scales if number % 2 else 1.0)).astype(array.dtype)


def _alike(joined: Any, expected: Any, axis: int, tolerance: float) -> bool:
    if joined.shape != expected.shape:
        return False
    if expected.dtype.kind not in "fV":
        return bool(np.mean(joined == expected) > 0.999)
    one, other = (np.moveaxis(a.astype(np.float64), axis, 0).reshape(a.shape[axis], -1) for a in (joined, expected))
    if not np.array_equal(np.isfinite(one), np.isfinite(other)):
        return False
    one, other = np.nan_to_num(one, posinf=0, neginf=0), np.nan_to_num(other, posinf=0, neginf=0)
    scale = np.maximum(np.abs(other).max(axis=1, initial=0), 0.05 * np.abs(other).max(initial=0))
    return bool((np.abs(one - other).max(axis=1, initial=0) <= tolerance * scale + 1e-12).all())


def main() -> None:
    """Print a row for each model."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    report = harness.Report(given, model="30", claim="20", trials="6", judge="20")
    with tempfile.TemporaryDirectory(prefix="onnxsplit-batch-") as scratch:
        for name, path, dims in models(given.names, Path(scratch)):
            row: dict[str, Any] = {"model": name}
            try:
                row |= measure(path, dims, Path(scratch) / "m.plan")
            except OnnxsplitError as error:
                row["claim"] = f"no plan: {str(error)[:120]}"
            report.row(row)


def measure(path: Path, dims: dict[str, int], target: Path) -> dict[str, Any]:
    """The row of one model."""
    named = {
        d.dim_param
        for value in onnx.load(path, load_external_data=False).graph.input
        for d in value.type.tensor_type.shape.dim
    }
    dims = {name: size for name, size in dims.items() if name in named or "." in name}
    subject = examine(path, dims=dims, threads=1)
    plan = write_plan(subject, target, CutOptions(stages=1, rounds=0)).plan
    names = (*plan.inputs, *plan.outputs)
    axes = {name: axis for name in names if (axis := plan.tensors[name].batch_axis) is not None}
    claim = plan.batch
    if not axes:
        return {"claim": f"none: {claim.why_not if claim is not None else 'analytic costs'}"}
    limits = {name: table_size(subject.graph, name) for name in plan.inputs}
    return {
        "claim": ", ".join(f"{name} {axis}" for name, axis in axes.items()),
        "trials": claim.trials if claim is not None else None,
        "judge": judged(path, axes, dict(subject.inputs), limits),
    }


if __name__ == "__main__":
    main()
