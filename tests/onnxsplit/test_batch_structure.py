"""The structural part of a batch claim, compared with ONNX Runtime on random nets, and its arithmetic."""

from __future__ import annotations

import random

import build
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnxsplit.model.graph import build_graph
from onnxsplit.model.shapes import input_specs
from onnxsplit.model.source import open_model
from onnxsplit.stages.batch.claim import Structure, candidates
from onnxsplit.stages.batch.linear import Linear, Undecided, linear

ROWS, MIDDLE, LAST = 3, 4, 6
STEPS = [
    "unary", "binary", "transpose", "reshape", "sized", "reduce", "softmax", "matmul",
    "concat", "slice", "gather", "expand", "squeeze", "unsqueeze", "cumsum", "sort",
    "flatten", "norm", "gemmlike", "pad", "split", "argless", "tile",
]  # fmt: skip


class _Net:
    """A random net over tensors that begin as x [batch, 4, 6]; a step that does not run is undone."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.shapes = {"x": (ROWS, MIDDLE, LAST)}

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        """Return the model without unused ops: ONNX Runtime runs them, too, and fails if one of them does."""
        wanted, nodes = set(outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                nodes.insert(0, node)
        return build.model(
            nodes,
            [build.value("x", ["batch", MIDDLE, LAST])],
            [build.value(name, None) for name in outputs],
            self.weights,
        )

    def grow(self, steps: int) -> None:
        for number in range(steps):
            name = f"t{number}"
            before = len(self.nodes), len(self.weights)
            self._step(name)
            try:
                [found] = run(self.model([name]), {"x": np.ones((ROWS, MIDDLE, LAST), np.float32)})
            except Exception:  # any error of ONNX Runtime means that the step is not possible
                found = None
            if found is None or found.size == 0 or found.size > 5000 or found.dtype != np.float32:
                del self.nodes[before[0] :], self.weights[before[1] :]
                continue
            self.shapes[name] = found.shape

    def _numbers(self, *items: int) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(build.constant(name, np.array(items, np.int64)))
        return name

    def _op(self, op: str, reads: list[str], writes: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, reads, writes.split(), **attributes))
        return writes.split()[0]

    def _step(self, name: str) -> None:
        choose, draw = self.random.choice, self.random.randrange
        one, other = (choose(list(self.shapes)[-4:]) for _ in range(2))
        shape = self.shapes[one]
        rank = len(shape)
        axis = draw(rank) if rank else 0
        match choose(STEPS):
            case "unary":
                self._op(choose(["Tanh", "Relu", "Sigmoid", "Neg"]), [one], name)
            case "binary":
                self._op(choose(["Add", "Mul", "Max", "Sub"]), [one, other], name)
            case "transpose":
                self._op("Transpose", [one], name, perm=self.random.sample(range(rank), rank))
            case "reshape":
                wanted = choose([[0, -1], [-1, 2], [-1, 6], [0, 2, -1], [-1, 3], [3, -1], [2, -1], [0, 0, 2, -1], [-1]])
                self._op("Reshape", [one, self._numbers(*wanted)], name)
            case "sized":
                part = self._op("Shape", [one], f"{name}s", start=axis, end=axis + 1)
                rest = self._numbers(*choose([[-1], [2, -1], [-1, 3], [-1, 4]]))
                to = [part, rest] if self.random.random() < 0.7 else [rest, part]
                self._op("Reshape", [one, self._op("Concat", to, f"{name}c", axis=0)], name)
            case "reduce":
                self._op(choose(["ReduceMean", "ReduceMax"]), [one, self._numbers(axis)], name, keepdims=draw(2))
            case "softmax":
                self._op("Softmax", [one], name, axis=axis)
            case "matmul":
                self._op("MatMul", [one, other], name)
            case "concat":
                self._op("Concat", [one, other], name, axis=axis)
            case "slice":
                ends = choose([1, 2, 10**9, -1])
                self._op("Slice", [one, self._numbers(draw(2)), self._numbers(ends), self._numbers(axis)], name)
            case "gather":
                self._op("Gather", [one, self._numbers(*choose([[0], [1, 0], [0, 0, 1]]))], name, axis=axis)
            case "expand":
                part = self._op("Shape", [one], f"{name}s")
                weight = f"c{len(self.weights)}"
                self.weights.append(build.constant(weight, np.full([1] * rank, 0.5, np.float32)))
                self._op("Expand", [weight, part], name)
            case "squeeze":
                self._op("Squeeze", [one, self._numbers(axis)] if draw(2) else [one], name)
            case "unsqueeze":
                self._op("Unsqueeze", [one, self._numbers(draw(rank + 1))], name)
            case "cumsum":
                where = f"c{len(self.weights)}"
                self.weights.append(build.constant(where, np.array(axis, np.int64)))
                self._op("CumSum", [one, where], name)
            case "sort":
                self._op("TopK", [one, self._numbers(choose([1, 2]))], f"{name} {name}i", axis=axis)
            case "flatten":
                self._op("Flatten", [one], name, axis=draw(rank + 1))
            case "norm":
                self._op("LpNormalization", [one], name, axis=axis)
            case "gemmlike":
                turned = self._op("Transpose", [other], f"{name}t", perm=list(reversed(range(len(self.shapes[other])))))
                self._op("MatMul", [one, turned], name)
            case "pad":
                pads = [0] * (2 * rank)
                pads[draw(2 * rank)] = draw(2)
                self._op("Pad", [one, self._numbers(*pads)], name)
            case "split":
                self._op("Split", [one], f"{name} {name}b", axis=axis, num_outputs=2)
            case "argless":
                self._op("ReduceMean", [one], name, keepdims=1)
            case "tile":
                repeats = [1] * rank
                repeats[axis] = choose([1, 2])
                self._op("Tile", [one, self._numbers(*repeats)], name)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options).run(None, inputs)


def separable(model: onnx.ModelProto, axis: int, out: int) -> bool:
    """Return whether ONNX Runtime gives equal rows of one output for a few batches and their parts."""
    source = np.random.default_rng(1)
    for count, at in ((2, 1), (5, 2), (4, 2), (6, 1)):
        shape = [MIDDLE if place == 1 else LAST if place == 2 else count for place in range(3)]
        x = (source.standard_normal(shape) * 3).astype(np.float32)
        try:
            [whole] = run(model, {"x": x})
            parts = [run(model, {"x": part})[0] for part in (x[:at], x[at:])]
        except Exception:  # a batch that the model does not accept
            return False
        joined = np.concatenate(parts, axis=out) if parts[0].ndim > out else np.zeros(0)
        if joined.shape != whole.shape or whole.shape[out] != count or not np.allclose(joined, whole, atol=1e-4):
            return False
    return axis == 0


@pytest.mark.parametrize("block", range(8))
def test_what_the_structure_claims_of_random_nets_onnx_runtime_confirms(tmp_path, block):
    claimed = 0
    for seed in range(block * 40, block * 40 + 40):
        net = _Net(seed)
        net.grow(9)
        name = list(net.shapes)[-1]
        if name == "x":
            continue
        proto = net.model([name])
        graph = build_graph(open_model(build.save(proto, tmp_path)))
        structure = Structure(graph, {"x": (ROWS, MIDDLE, LAST)}, net.shapes)
        [first, *_] = candidates(input_specs(graph))
        claim = structure.claim(first)
        if not claim.why_not:
            claimed += 1
            assert separable(proto, 0, claim.axes[name]), (seed, onnx.printer.to_text(proto))
    assert claimed >= 3


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Linear(2, 1) + 3, None, (2, 4)),
        (5 - Linear(1), None, (-1, 5)),
        (Linear(2) * 3, None, (6, 0)),
        (Linear(6, 12) // 3, None, (2, 4)),
    ],
)
def test_numbers_of_rows_add_up(one, other, expected):
    assert (one.per_row, one.fixed) == expected


def test_a_number_that_no_longer_depends_on_the_rows_is_a_plain_one():
    assert Linear(2, 3) - Linear(2) == 3
    assert Linear(8, 4) // Linear(2, 1) == 4
    assert linear(0, 7) == 7


@pytest.mark.parametrize(
    "question",
    [
        lambda: Linear(1) > 4,
        lambda: Linear(1) == 4,
        lambda: Linear(3) // 2,
        lambda: Linear(1) * Linear(1),
        lambda: Linear(2) < Linear(1, 1),
        lambda: bool(Linear(1, -1)),
    ],
)
def test_a_question_whose_answer_depends_on_the_number_of_rows_is_not_answered(question):
    with pytest.raises(Undecided):
        question()


def test_comparisons_that_hold_for_every_number_of_rows_are_answered():
    assert Linear(1) != -1
    assert Linear(2) > Linear(1)
    assert Linear(1, 1) > 1
    assert Linear(1) == Linear(1)
    assert Linear(3) != 0


def test_a_body_that_shadows_an_outer_name_does_not_read_the_outer_tensor(tmp_path):
    """The branch gives a sum over all rows the name of an outer tensor."""
    branch = helper.make_graph(
        [helper.make_node("ReduceMean", ["x"], ["h"], keepdims=1), helper.make_node("Add", ["x", "h"], ["out"])],
        "branch",
        [],
        [build.value("out", None)],
    )
    plain = helper.make_graph([helper.make_node("Identity", ["x"], ["same"])], "plain", [], [build.value("same", None)])
    proto = build.model(
        [
            helper.make_node("Relu", ["x"], ["h"]),
            helper.make_node("If", ["flag"], ["z"], then_branch=branch, else_branch=plain),
            helper.make_node("Add", ["z", "h"], ["y"]),
        ],
        [build.value("x", ["batch", MIDDLE]), build.value("flag", [], TensorProto.BOOL)],
        [build.value("y", ["batch", MIDDLE])],
    )
    graph = build_graph(open_model(build.save(proto, tmp_path)))
    claim = Structure(graph, {"x": (ROWS, MIDDLE), "flag": ()}, {}).claim({"x": 0})

    assert claim.axes == {}
    assert "it reduces over all axes" in claim.why_not
