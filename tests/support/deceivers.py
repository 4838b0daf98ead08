"""Small nets in which the rows of a batch affect each other, each in another way, and nets that only look like them.

A net takes ``x`` [batch, 8] (and others where it says so) and gives ``y``. For most inputs each output row depends on
one input row: the effect across rows shows only for some numbers, some sizes, or some ways of splitting.
"""

from __future__ import annotations

from collections.abc import Callable

import build
import numpy as np
import onnx
from onnx import TensorProto, helper

Net = Callable[[], onnx.ModelProto]

WIDTH = 8


def _net(nodes, *, inputs=(), shape=("batch", WIDTH), weights=(), kind=TensorProto.FLOAT, ends=True) -> onnx.ModelProto:
    """x -> Tanh(x W) = h -> nodes -> z -> Tanh(z) = y; the nodes read h (or x) and write z."""
    source = np.random.default_rng(3)
    weight = build.constant("w", (source.standard_normal((WIDTH, WIDTH)) / 3).astype(np.float32))
    ops = [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Tanh", ["xw"], ["h"]), *nodes]
    ops += [helper.make_node("Tanh", ["z"], ["y"])] if ends else [helper.make_node("Identity", ["z"], ["y"])]
    return build.model(
        ops,
        [build.value("x", ["batch", WIDTH]), *inputs],
        [build.value("y", None if shape is None else list(shape), kind)],
        [weight, *weights],
    )


def _op(op: str, reads: str, writes: str, **attributes) -> onnx.NodeProto:
    return helper.make_node(op, reads.split(), writes.split(), **attributes)


def _numbers(name: str, *items: int) -> onnx.TensorProto:
    return build.constant(name, np.array(items, np.int64))


def _scalar(name: str, number: float) -> onnx.TensorProto:
    return build.constant(name, np.array(number, np.float32))


def scaled_by_the_largest_number() -> onnx.ModelProto:
    """Pictures of 0 to 255 are scaled down; the test looks at the whole batch, and does nothing below 1."""
    return _net(
        [_op("ReduceMax", "x", "m", keepdims=0), _op("Max", "m one", "d"), _op("Div", "x d", "z")],
        weights=[_scalar("one", 1.0)],
    )


def cut_at_the_longest_row() -> onnx.ModelProto:
    """Speech models trim to the longest row; lengths are an input."""
    return _net(
        [
            _op("ReduceMax", "lengths", "top", keepdims=1),
            _op("Slice", "h zero top one", "z"),
        ],
        inputs=[build.value("lengths", ["batch"], TensorProto.INT64)],
        shape=None,
        weights=[_numbers("zero", 0), _numbers("one", 1)],
    )


def masked_by_the_longest_row() -> onnx.ModelProto:
    """A mask is made of the positions below the largest length of the batch."""
    return _net(
        [
            _op("ReduceMax", "lengths", "top", keepdims=0),
            _op("Less", "places top", "keep"),
            _op("Where", "keep h zero", "z"),
        ],
        inputs=[build.value("lengths", ["batch"], TensorProto.INT64)],
        weights=[build.constant("places", np.arange(WIDTH)), _scalar("zero", 0.0)],
    )


def sorted_over_the_batch() -> onnx.ModelProto:
    """Each column is sorted over the rows."""
    return _net(
        [
            _op("Shape", "h", "rows", start=0, end=1),
            _op("TopK", "h rows", "z i", axis=0),
        ]
    )


def normalised_by_the_batch() -> onnx.ModelProto:
    """Mean and variance of every column, as batch normalisation takes them in training."""
    return _net(
        [
            _op("ReduceMean", "h axis", "m", keepdims=1),
            _op("Sub", "h m", "c"),
            _op("Mul", "c c", "q"),
            _op("ReduceMean", "q axis", "v", keepdims=1),
            _op("Add", "v tiny", "p"),
            _op("Sqrt", "p", "s"),
            _op("Div", "c s", "z"),
        ],
        weights=[_numbers("axis", 0), _scalar("tiny", 1e-3)],
    )


def best_row_of_all() -> onnx.ModelProto:
    """The index of the best row, scaled to be tiny, is added to every row."""
    return _net(
        [
            _op("ArgMax", "h", "i", axis=0, keepdims=1),
            _op("Cast", "i", "f", to=TensorProto.FLOAT),
            _op("Mul", "f small", "g"),
            _op("Add", "h g", "z"),
        ],
        weights=[_scalar("small", 1e-2)],
    )


def added_up_over_rows() -> onnx.ModelProto:
    """Every row is the sum of itself and the rows before it."""
    return _net([_op("CumSum", "h axis", "z")], weights=[build.constant("axis", np.array(0, np.int64))])


def scaled_by_the_number_of_rows() -> onnx.ModelProto:
    """The number of rows is a factor, as in a loss that was left in."""
    return _net(
        [
            _op("Shape", "h", "rows", start=0, end=1),
            _op("Cast", "rows", "f", to=TensorProto.FLOAT),
            _op("Div", "h f", "z"),
        ]
    )


def other_branch_for_large_batches() -> onnx.ModelProto:
    """Batches of more than four rows take another branch."""
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["h"], [f"{name}_out"])], name, [], [build.value(f"{name}_out", ["batch", WIDTH])]
        )
        for name, op in (("then_branch", "Neg"), ("else_branch", "Identity"))
    }
    return _net(
        [
            _op("Shape", "h", "rows", start=0, end=1),
            _op("Greater", "rows four", "large"),
            _op("Squeeze", "large", "test"),
            _op("If", "test", "z", **branches),
        ],
        weights=[_numbers("four", 4)],
    )


def loop_that_carries_a_row_to_the_next() -> onnx.ModelProto:
    """A Loop over rows: each is mixed with the state that the row before it left."""
    body = helper.make_graph(
        [
            _op("Gather", "h turn", "row", axis=0),
            _op("Mul", "state half", "faded"),
            _op("Add", "row faded", "next"),
            _op("Identity", "next", "out"),
            _op("Identity", "go_on", "go_on_out"),
        ],
        "body",
        [
            build.value("turn", [], TensorProto.INT64),
            build.value("go_on", [], TensorProto.BOOL),
            build.value("state", [WIDTH]),
        ],
        [build.value("go_on_out", [], TensorProto.BOOL), build.value("next", [WIDTH]), build.value("out", [WIDTH])],
    )
    return _net(
        [
            _op("Shape", "h", "rows", start=0, end=1),
            _op("Squeeze", "rows", "count"),
            helper.make_node("Loop", ["count", "", "start"], ["last", "z"], body=body),
        ],
        weights=[build.constant("start", np.zeros(WIDTH, np.float32)), _scalar("half", 0.5)],
    )


def quantised_by_the_range_of_the_batch() -> onnx.ModelProto:
    """Dynamic quantisation: scale and zero point are those of the whole batch."""
    return _net(
        [
            _op("DynamicQuantizeLinear", "h", "q s p"),
            _op("DequantizeLinear", "q s p", "z"),
        ]
    )


def random_noise() -> onnx.ModelProto:
    """Noise of the tensor's shape, with a seed: a row's noise depends on its index."""
    return _net(
        [
            _op("RandomNormalLike", "h", "r", seed=7.0),
            _op("Add", "h r", "z"),
        ]
    )


def attention_between_rows() -> onnx.ModelProto:
    """Rows attend to each other: the batch is taken for a sequence."""
    return _net(
        [
            _op("Transpose", "h", "t", perm=[1, 0]),
            _op("MatMul", "h t", "scores"),
            _op("Softmax", "scores", "p", axis=-1),
            _op("MatMul", "p h", "z"),
        ]
    )


def grouped_in_twos() -> onnx.ModelProto:
    """Two rows make a pair, and the pair's mean is subtracted: single rows do not run, and pairs look independent."""
    return _net(
        [
            _op("Reshape", "h pairs", "g"),
            _op("ReduceMean", "g axis", "m", keepdims=1),
            _op("Sub", "g m", "c"),
            _op("Reshape", "c flat", "z"),
        ],
        weights=[_numbers("pairs", -1, 2, WIDTH), _numbers("axis", 1), _numbers("flat", -1, WIDTH)],
    )


def row_numbers() -> onnx.ModelProto:
    """A table of positions is looked up by the row's index in the batch."""
    return _net(
        [
            _op("Shape", "h", "rows", start=0, end=1),
            _op("Squeeze", "rows", "count"),
            _op("Range", "zero count one", "places"),
            _op("Gather", "table places", "p", axis=0),
            _op("Add", "h p", "z"),
        ],
        weights=[
            build.constant("table", (np.random.default_rng(5).standard_normal((64, WIDTH)) / 9).astype(np.float32)),
            build.constant("zero", np.array(0, np.int64)),
            build.constant("one", np.array(1, np.int64)),
        ],
    )


def neighbours_in_a_convolution() -> onnx.ModelProto:
    """The batch becomes the width of a picture, and a convolution looks at neighbours."""
    kernel = np.array([0.1, 1.0, 0.1], np.float32).reshape(1, 1, 3, 1)
    return _net(
        [
            _op("Unsqueeze", "h axes", "u"),
            _op("Conv", "u kernel", "c", pads=[1, 0, 1, 0], kernel_shape=[3, 1]),
            _op("Squeeze", "c axes", "z"),
        ],
        weights=[_numbers("axes", 0, 1), build.constant("kernel", kernel)],
    )


def interleaved_heads() -> onnx.ModelProto:
    """Heads before rows: [batch, 2, 4] -> [2, batch, 4] -> [2 batch, 4] -> back as if rows came first."""
    return _net(
        [
            _op("Reshape", "h split", "s"),
            _op("Transpose", "s", "t", perm=[1, 0, 2]),
            _op("Reshape", "t flat", "z"),
        ],
        weights=[_numbers("split", -1, 2, 4), _numbers("flat", -1, WIDTH)],
    )


def function_whose_axis_is_a_default() -> onnx.ModelProto:
    """A function normalises over the rows by the default of its attribute, which the call leaves out."""
    inner = helper.make_node("LpNormalization", ["a"], ["b"])
    inner.attribute.append(onnx.AttributeProto(name="axis", type=onnx.AttributeProto.INT, ref_attr_name="axis"))
    imports = [helper.make_opsetid("", build.OPSET)]
    function = helper.make_function(
        "own", "Normalise", ["a"], ["b"], [inner], imports, attribute_protos=[helper.make_attribute("axis", 0)]
    )
    proto = _net([helper.make_node("Normalise", ["h"], ["z"], domain="own")])
    proto.functions.append(function)
    proto.opset_import.append(helper.make_opsetid("own", 1))
    return proto


def branch_chosen_by_an_overflow() -> onnx.ModelProto:
    """200 + 100 is 44 in eight bits, and then the rows are reduced."""
    mixing = helper.make_graph(
        [helper.make_node("ReduceMax", ["h"], ["m"], keepdims=1), helper.make_node("Sub", ["h", "m"], ["then_out"])],
        "then",
        [],
        [build.value("then_out", ["batch", WIDTH])],
    )
    plain = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["else_out"])], "else", [], [build.value("else_out", ["batch", WIDTH])]
    )
    return _net(
        [
            _op("Add", "two one", "sum"),
            _op("Equal", "sum wrapped", "test"),
            helper.make_node("If", ["test"], ["z"], then_branch=mixing, else_branch=plain),
        ],
        weights=[
            build.constant(name, np.array(number, np.uint8))
            for name, number in (("two", 200), ("one", 100), ("wrapped", 44))
        ],
    )


def looked_up_by_the_number_of_the_row() -> onnx.ModelProto:
    """How exporters read a mask: mask[arange(batch)[:, None], places], with shapes learned from a maximum."""
    return _net(
        [
            _op("Shape", "h", "size", start=0, end=1),
            _op("Squeeze", "size", "count"),
            _op("Range", "first count step", "numbers"),
            _op("Unsqueeze", "numbers one", "column"),
            _op("Max", "column places", "both"),
            _op("Shape", "both", "shape"),
            _op("Expand", "column shape", "n"),
            _op("Expand", "places shape", "p"),
            _op("Unsqueeze", "n end", "n1"),
            _op("Unsqueeze", "p end", "p1"),
            _op("Concat", "n1 p1", "index", axis=-1),
            _op("GatherND", "h index", "z"),
        ],
        weights=[
            build.constant("first", np.array(0, np.int64)),
            build.constant("step", np.array(1, np.int64)),
            _numbers("one", 1),
            _numbers("end", -1),
            build.constant("places", np.array([[3, 1, 0, 2, 5, 4, 7, 6]])),
        ],
    )


def numbers_of_other_rows() -> onnx.ModelProto:
    """The same, with one added to the number of the row, modulo the batch: each row reads the next one."""
    proto = looked_up_by_the_number_of_the_row()
    for node in proto.graph.node:
        if node.op_type == "Unsqueeze" and node.output[0] == "column":
            node.input[0] = "next"
    place = next(i for i, node in enumerate(proto.graph.node) if node.output[0] == "column")
    proto.graph.node.insert(place, _op("Mod", "moved count", "next"))
    proto.graph.node.insert(place, _op("Add", "numbers step", "moved"))
    return proto


DECEIVERS: tuple[Net, ...] = (
    numbers_of_other_rows,
    function_whose_axis_is_a_default,
    branch_chosen_by_an_overflow,
    scaled_by_the_largest_number,
    cut_at_the_longest_row,
    masked_by_the_longest_row,
    sorted_over_the_batch,
    normalised_by_the_batch,
    best_row_of_all,
    added_up_over_rows,
    scaled_by_the_number_of_rows,
    other_branch_for_large_batches,
    loop_that_carries_a_row_to_the_next,
    quantised_by_the_range_of_the_batch,
    random_noise,
    attention_between_rows,
    grouped_in_twos,
    row_numbers,
    neighbours_in_a_convolution,
    interleaved_heads,
)
"""No axis may be claimed of any of these."""


def shape_of_the_rows_kept() -> onnx.ModelProto:
    """A reshape to a shape that the model computes from the number of rows."""
    return _net(
        [
            _op("Shape", "h", "s"),
            _op("Gather", "s first", "rows", axis=0),
            _op("Unsqueeze", "rows zero", "r"),
            _op("Concat", "r split", "to", axis=0),
            _op("Reshape", "h to", "heads"),
            _op("Transpose", "heads", "t", perm=[0, 2, 1]),
            _op("Softmax", "t", "p", axis=-1),
            _op("Reshape", "p back", "z"),
        ],
        weights=[
            build.constant("first", np.array(0, np.int64)),
            _numbers("zero", 0),
            _numbers("split", 2, 4),
            _numbers("back", 0, WIDTH),
        ],
    )


def token_for_every_row() -> onnx.ModelProto:
    """A learned token is expanded to the batch and put before each row's own."""
    return _net(
        [
            _op("Unsqueeze", "h one", "u"),
            _op("Shape", "h", "rows", start=0, end=1),
            _op("Concat", "rows rest", "to", axis=0),
            _op("Expand", "token to", "tokens"),
            _op("Concat", "tokens u", "both", axis=1),
            _op("ReduceSum", "both one", "z", keepdims=0),
        ],
        weights=[
            _numbers("one", 1),
            _numbers("rest", 1, WIDTH),
            build.constant("token", np.full((1, 1, WIDTH), 0.25, np.float32)),
        ],
    )


def two_halves_of_each_row() -> onnx.ModelProto:
    """Rows are regrouped as [2 batch, 4] and back: two entries belong to each row."""
    return _net(
        [
            _op("Reshape", "h flat", "f"),
            _op("LpNormalization", "f", "n", axis=-1),
            _op("Reshape", "n back", "z"),
        ],
        weights=[_numbers("flat", -1, 4), _numbers("back", -1, WIDTH)],
    )


def branch_chosen_by_a_shape() -> onnx.ModelProto:
    """Exporters of squeeze() ask whether an axis has one entry, and pad by numbers that they compute."""
    squeezed = helper.make_graph(
        [helper.make_node("Squeeze", ["u", "one"], ["then_out"])], "then", [], [build.value("then_out", None)]
    )
    kept = helper.make_graph(
        [helper.make_node("Identity", ["u"], ["else_out"])], "else", [], [build.value("else_out", None)]
    )
    return _net(
        [
            _op("Unsqueeze", "h one", "u"),
            _op("Shape", "u", "size", start=1, end=2),
            _op("Equal", "size one", "single"),
            helper.make_node("If", ["single"], ["s"], then_branch=squeezed, else_branch=kept),
            _op("Sub", "size size", "none"),
            _op("Concat", "none size none none", "pads", axis=0),
            _op("Pad", "s pads", "p"),
            _op("Slice", "p zero eight one", "z"),
        ],
        weights=[_numbers("one", 1), _numbers("zero", 0), _numbers("eight", WIDTH)],
    )


HONEST: tuple[Net, ...] = (
    looked_up_by_the_number_of_the_row,
    shape_of_the_rows_kept,
    token_for_every_row,
    two_halves_of_each_row,
    branch_chosen_by_a_shape,
)
"""Nets whose rows do not know each other, though they compute with shapes."""
