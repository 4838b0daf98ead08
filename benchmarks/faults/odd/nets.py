"""The models of chaos runs, each with its plan and a plain ONNX Runtime session as the reference.

chain       a proven batch axis: a request of 64 rows runs as 64 parts
dag         branches and joins in five stages, several outputs; an input and a constant among the outputs
strings     string tensors from end to end
positions   the shape of one output depends on the data
longest     a batch whose output is as long as its longest row; its plan claims a batch axis, so that parts come
            back that cannot be joined
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnxsplit.plan import Plan
from onnxsplit.plan_files import load_plan
from onnxsplit.planning.planner import partition

WIDTH = 32
FRAMES = 12

Inputs = dict[str, Any]
Make = Callable[[np.random.Generator, int], Inputs]


@dataclass(frozen=True)
class Net:
    """One model under test.

    Attributes:
        name: name of the model.
        plan_folder: folder of the plan.
        plan: the plan.
        make: makes inputs with a number of rows.
        micro_batch: rows of a part; 0 if the plan has no batch axis.
        session: plain ONNX Runtime on the whole model, with the tensors between stages as additional outputs.
    """

    name: str
    plan_folder: Path
    plan: Plan
    make: Make
    micro_batch: int
    session: Any

    @property
    def inner(self) -> list[str]:
        """Names of the tensors that stages compute and that are not outputs of the model."""
        return [name for name in self.plan.producers() if name not in self.plan.outputs]

    def answer(self, inputs: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, Any] | None:
        """Run plain ONNX Runtime; return None if it cannot run these inputs."""
        names = [value.name for value in self.session.get_inputs()]
        try:
            found = self.session.run(list(outputs), {name: inputs[name] for name in names})
        except Exception:  # ONNX Runtime's errors share no base class
            return None
        return dict(zip(outputs, found, strict=True))


def build(folder: Path, only: Sequence[str] = (), *, measured: bool = False) -> list[Net]:
    """Write the models and their plans.

    Args:
        folder: folder to write to.
        only: names of the nets to build; all if empty.
        measured: whether the batch axis of the chain is proven by running it, instead of written into its plan.
    """
    wanted = [name for name in _NETS if not only or name in only]
    return [_NETS[name](folder, measured) for name in wanted]


def _net(
    name: str,
    folder: Path,
    proto: onnx.ModelProto,
    make: Make,
    *,
    stages: int,
    micro_batch: int = 0,
    claims: Sequence[str] = (),
    measured: bool = False,
) -> Net:
    onnx.checker.check_model(proto)
    file, plan_folder = folder / f"{name}.onnx", folder / f"{name}.plan"
    file.write_bytes(proto.SerializeToString())
    costs = "measured" if measured else "analytic"
    partition(file, stages=stages, out=plan_folder, costs=costs)
    if claims and not measured:
        _claim_batch_axis(plan_folder, claims)
    plan = load_plan(plan_folder)
    return Net(name, plan_folder, plan, make, micro_batch, _session(proto, plan))


def _claim_batch_axis(plan_folder: Path, constant: Sequence[str]) -> None:
    """Claim in the plan that the first axis of every tensor except the ``constant`` ones is the batch."""
    file = plan_folder / "plan.json"
    plan = json.loads(file.read_text())
    for name, tensor in plan["tensors"].items():
        tensor["batch_axis"] = None if name in constant else 0
    file.write_text(json.dumps(plan, indent=2))


def _session(proto: onnx.ModelProto, plan: Plan) -> Any:
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    known = {value.name for value in whole.graph.output}
    for name in plan.producers():
        if name not in known:
            whole.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    inferred = onnx.shape_inference.infer_shapes(whole)
    return onnxruntime.InferenceSession(inferred.SerializeToString(), options, ["CPUExecutionProvider"])


def _model(ops: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()) -> Any:
    graph = helper.make_graph(list(ops), "g", list(inputs), list(outputs), list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _value(name: str, shape: Sequence[Any], kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _weight(name: str, *shape: int) -> Any:
    source = np.random.default_rng(sum(map(ord, name)))
    return numpy_helper.from_array((source.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32), name)


def _floats(*names: str) -> Make:
    return lambda source, rows: {n: source.standard_normal((rows, WIDTH)).astype(np.float32) for n in names}


def _chain(folder: Path, measured: bool) -> Net:
    ops, weights, last = [], [], "x"
    for step in range(6):
        out = "y" if step == 5 else f"t{step}"
        weights.append(_weight(f"w{step}", WIDTH, WIDTH))
        ops += [
            helper.make_node("MatMul", [last, f"w{step}"], [f"m{step}"]),
            helper.make_node("Tanh", [f"m{step}"], [out]),
        ]
        last = out
    proto = _model(ops, [_value("x", ["n", WIDTH])], [_value("y", ["n", WIDTH])], weights)
    return _net("chain", folder, proto, _floats("x"), stages=3, micro_batch=1, claims=["-"], measured=measured)


def _dag(folder: Path, _: bool) -> Net:
    ops = [
        helper.make_node("MatMul", ["x", "a"], ["xa"]),
        helper.make_node("Relu", ["xa"], ["trunk"]),
        helper.make_node("MatMul", ["trunk", "b"], ["bl"]),
        helper.make_node("Sigmoid", ["bl"], ["left"]),
        helper.make_node("MatMul", ["trunk", "c"], ["cr"]),
        helper.make_node("Tanh", ["cr"], ["right"]),
        helper.make_node("Add", ["left", "right"], ["joined"]),
        helper.make_node("MatMul", ["joined", "d"], ["jd"]),
        helper.make_node("Add", ["jd", "z"], ["y"]),
        helper.make_node("Neg", ["left"], ["side"]),
        helper.make_node("Add", ["z", "z"], ["doubled"]),
    ]
    outputs = [_value(name, ["n", WIDTH]) for name in ("y", "side", "doubled", "x")]
    outputs.append(_value("a", [WIDTH, WIDTH]))
    weights = [_weight(name, WIDTH, WIDTH) for name in "abcd"]
    proto = _model(ops, [_value("x", ["n", WIDTH]), _value("z", ["n", WIDTH])], outputs, weights)
    return _net("dag", folder, proto, _floats("x", "z"), stages=5, micro_batch=4, claims=["a", "b", "c", "d"])


def _strings(folder: Path, _: bool) -> Net:
    ops = [
        helper.make_node("Identity", ["s"], ["passed"], name="first"),
        helper.make_node("Identity", ["passed"], ["same"], name="second"),
        helper.make_node("StringConcat", ["same", "passed"], ["twice"], name="third"),
    ]
    values = [_value(name, ["n"], TensorProto.STRING) for name in ("s", "same", "twice")]
    proto = helper.make_model(
        helper.make_graph(ops, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )

    def make(source: np.random.Generator, rows: int) -> Inputs:
        return {"s": np.array([f"{source.integers(1 << 60):x} \u00fc \u6587" for _ in range(rows)], object)}

    return _net("strings", folder, proto, make, stages=2)


def _positions(folder: Path, _: bool) -> Net:
    ops = [
        helper.make_node("MatMul", ["x", "a"], ["xa"]),
        helper.make_node("Relu", ["xa"], ["kept"]),
        helper.make_node("NonZero", ["kept"], ["where"]),
        helper.make_node("Cast", ["where"], ["places"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["places"], ["sum"], keepdims=0),
        helper.make_node("MatMul", ["kept", "b"], ["kb"]),
        helper.make_node("Tanh", ["kb"], ["level"]),
        helper.make_node("Mul", ["level", "sum"], ["scaled"]),
    ]
    outputs = [_value("places", [2, "k"]), _value("scaled", ["n", WIDTH])]
    weights = [_weight("a", WIDTH, WIDTH), _weight("b", WIDTH, WIDTH)]
    proto = _model(ops, [_value("x", ["n", WIDTH])], outputs, weights)
    return _net("positions", folder, proto, _floats("x"), stages=3)


def _longest(folder: Path, _: bool) -> Net:
    """Frames beyond the longest row of the batch are cut off, as speech models do."""
    indices = [numpy_helper.from_array(np.array([i], np.int64), f"index{i}") for i in (0, 1)]
    ops = [
        helper.make_node("ReduceMax", ["lengths"], ["most"], keepdims=1),
        helper.make_node("Slice", ["frames", "index0", "most", "index1"], ["cut"]),
        helper.make_node("MatMul", ["cut", "u"], ["cu"]),
        helper.make_node("Tanh", ["cu"], ["inside"]),
        helper.make_node("MatMul", ["inside", "v"], ["iv"]),
        helper.make_node("Sigmoid", ["iv"], ["spoken"]),
    ]
    inputs = [_value("frames", ["n", "time", 8]), _value("lengths", ["n"], TensorProto.INT64)]
    weights = [_weight("u", 8, 8), _weight("v", 8, 8), *indices]
    proto = _model(ops, inputs, [_value("spoken", ["n", "longest", 8])], weights)

    def make(source: np.random.Generator, rows: int) -> Inputs:
        return {
            "frames": source.standard_normal((rows, FRAMES, 8)).astype(np.float32),
            "lengths": source.integers(1, FRAMES + 1, rows),
        }

    return _net("longest", folder, proto, make, stages=2, micro_batch=2, claims=["most"])


_NETS: dict[str, Callable[[Path, bool], Net]] = {
    "chain": _chain,
    "dag": _dag,
    "strings": _strings,
    "positions": _positions,
    "longest": _longest,
}
NAMES = tuple(_NETS)
"""Of all nets."""
