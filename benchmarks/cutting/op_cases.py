"""Do all of ONNX's own op cases survive being planned, cut and run?

Every generated case of `onnx.backend.test` is loaded, planned as one stage, extracted, run, and compared bit for bit
with the whole model. Cases of two or more ops that can be cut are also run as two stages. Cases that ONNX Runtime
itself refuses or cannot run are counted separately; every other failure is listed.
"""

from __future__ import annotations

import collections
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("", "models", "tests/support")]

import numpy as np
import onnx
import onnx.backend.test.loader as loader

from benchmarks import harness
from onnxsplit.distance import distance
from onnxsplit.errors import ModelError, OnnxsplitError
from onnxsplit.planning.examine import examine
from onnxsplit.planning.options import CutOptions
from onnxsplit.planning.planner import write_plan
from onnxsplit.session import open_session
from onnxsplit.stages.verify import run_stages

TAKES = "5 min"


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays are equal bit for bit, strings by value."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return bool(np.array_equal(left, right)) if left.dtype == object else left.tobytes() == right.tobytes()


def array_of(value: Any) -> Any:
    """Convert the value of a case to an array, if it is a tensor."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return value if isinstance(value, list) or value is None else np.asarray(value)


def worst(names: list[str], outputs: dict[str, Any], whole: Any) -> float:
    """The largest distance among these outputs."""
    return max(distance(outputs[name], whole[name]) for name in names)


def judge(case: Any, folder: Path) -> dict[int, str]:
    """Return ``equal`` or the failure, by number of stages; 0 stands for a failure before any cut."""
    model = folder / "model.onnx"
    model.write_bytes(case.model.SerializeToString())
    arrays = case.data_sets[0][0]
    inputs = {v.name: array_of(a) for v, a in zip(case.model.graph.input, arrays, strict=False)}
    tensors = all(isinstance(a, np.ndarray) for a in inputs.values())
    try:
        session = open_session(model, threads=1, level="disabled")
        whole = session.run(inputs) if tensors else None
    except Exception as error:
        try:
            examine(model, costs="analytic", inputs=inputs if tensors else None)
        except ModelError:
            pass
        except OnnxsplitError as refusal:
            return {1: f"refused: {str(refusal)[:160]}"}
        return {0: f"ONNX Runtime: {str(error)[:90]}"}
    verdicts: dict[int, str] = {}
    try:
        subject = examine(model, costs="analytic", inputs=inputs if tensors else None)
        for stages in (1, 2):
            if stages == 1 or len(subject.atoms.ops) >= stages:
                plan = write_plan(
                    subject, folder / "m.plan", CutOptions(stages=min(stages, len(subject.atoms.ops)) or None)
                ).plan
                outputs = run_stages(folder / "m.plan", plan, inputs, threads=1, level="disabled")
                unlike = [name for name in plan.outputs if whole is None or not same(outputs[name], whole[name])]
                again = session.run(inputs) if unlike and whole is not None else whole
                random = [name for name in unlike if again is not None and not same(again[name], whole[name])]
                verdicts[stages] = (
                    "random"
                    if random
                    else f"DIFFERENT: {worst(unlike, outputs, whole):.1e} of the scale"
                    if unlike
                    else "equal"
                )
    except OnnxsplitError as error:
        kind = "refused" if not isinstance(error, ModelError) else "FAILED"
        verdicts[max(verdicts, default=0) + 1] = f"{kind}: {str(error)[:160]}"
    except Exception as error:
        verdicts[max(verdicts, default=0) + 1] = f"CRASHED: {type(error).__name__}: {str(error)[:160]}"
    return verdicts


def main() -> None:
    """Print the counts and the failures."""
    parser = harness.parser(__doc__, TAKES)
    parser.add_argument("--filter", default="", help="only cases whose names contain this")
    given = parser.parse_args()
    report = harness.Report(given)
    warnings.simplefilter("ignore")
    begun = time.monotonic()
    cases = [case for case in loader.load_model_tests(kind="node") if given.filter in case.name]
    counts: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    misses = []
    with tempfile.TemporaryDirectory(prefix="onnxsplit-backend-") as folder:
        for case in cases:
            for stages, verdict in judge(case, Path(folder)).items():
                counts[stages][verdict.split(":")[0]] += 1
                if stages and verdict != "equal":
                    misses.append((stages, case.name, verdict))
    text = [f"{len(cases)} cases in {time.monotonic() - begun:.0f} s"]
    for stages, counted in sorted(counts.items()):
        head = "cannot run whole" if stages == 0 else f"{stages} stages"
        text.append(f"{head}: " + ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common()))
    text += [f"  {stages} stages  {name}: {verdict}" for stages, name, verdict in misses]
    report.row({"cases": len(cases), "counts": counts, "misses": misses}, "\n".join(text))


if __name__ == "__main__":
    main()
