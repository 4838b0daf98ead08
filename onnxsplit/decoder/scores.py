"""The output with the scores, and the number of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxsplit.decoder.constants import Constants
from onnxsplit.decoder.names import words
from onnxsplit.decoder.op_slots import attribute
from onnxsplit.decoder.override import Override
from onnxsplit.decoder.reasons import NotClaimed, listed
from onnxsplit.model.graph import Op, OpGraph
from onnxsplit.plan import TensorSpec

_NAMES = frozenset({"logits", "logit", "scores"})
_FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})
_SAME_WIDTH = frozenset(
    {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Where", "Clip"}
    | {"Add", "Sub", "Mul", "Div", "Tanh", "Softmax", "LogSoftmax"}
)
_MOST_STEPS = 24
_WEIGHTS = {  # position of the weights among the inputs of ops that multiply by a matrix
    "MatMul": 1, "Gemm": 1, "FusedMatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3, "DynamicQuantizeMatMul": 1,
    "MatMulIntegerToFloat": 1, "FusedGemm": 1,
}  # fmt: skip


def scores_output(
    names: Sequence[str],
    specs: Mapping[str, TensorSpec],
    graph: OpGraph,
    *,
    expected: Sequence[int | None],
    common: Mapping[str, str],
    override: Override,
) -> tuple[str, int]:
    """The output with the scores and the number of scores.

    Args:
        names: the outputs that are not states.
        specs: types and shapes of the outputs.
        graph: the model.
        expected: numbers of tokens as the embedding table and files beside the model give them; None for no answer.
        common: common names of outputs, from a file beside the model.
        override: the user's decisions.

    Raises:
        NotClaimed: no output, or several, may be it, or the number of scores is not known.
    """
    constants = Constants(graph)
    floats = [name for name in names if name not in specs or specs[name].dtype in _FLOATS]
    widths = {name: _width(name, specs, graph, constants) for name in floats}
    known = [size for size in expected if size is not None]
    named = [name for name in floats if not _NAMES.isdisjoint(words(common.get(name, name)))]
    exact = [name for name in named if words(common.get(name, name)) == ("logits",)]
    if override.scores is not None:
        found = [override.scores]
    elif named:
        found = exact if len(exact) == 1 else named
    else:
        found = [name for name in floats if widths[name] in known and _rank(name, specs) in (2, 3, None)]
    if len(found) != 1:
        many = (
            f"several outputs may be the scores: {listed(found)}"
            if found
            else (f"none of the outputs {listed(names) or '(there are none besides the caches)'} looks like scores")
        )
        raise NotClaimed(f"{many}; give scores = NAME in --decoder FILE.toml")
    scores = found[0]
    if _rank(scores, specs) not in (2, 3, None):
        raise NotClaimed(f"the scores {scores!r} have {_rank(scores, specs)} axes; 2 or 3 are needed")
    width = override.vocabulary or widths.get(scores) or next(reversed(known), None)
    if width is None:
        raise NotClaimed(f"the number of scores in {scores!r} is not known; give vocabulary = N in --decoder FILE.toml")
    return scores, width


def _rank(name: str, specs: Mapping[str, TensorSpec]) -> int | None:
    shape = specs[name].shape if name in specs else None
    return None if shape is None else len(shape)


def _width(name: str, specs: Mapping[str, TensorSpec], graph: OpGraph, constants: Constants) -> int | None:
    """The size of the last axis of a tensor: as declared, or as the weights that make it have."""
    for _ in range(_MOST_STEPS):
        spec = specs.get(name)
        if spec is not None and spec.shape and isinstance(spec.shape[-1], int):
            return spec.shape[-1]
        index = graph.producer.get(name)
        if index is None:
            return None
        op = graph.ops[index]
        if op.op_type not in _SAME_WIDTH:
            return _columns(op, specs, constants)
        name = next((one for one in op.node.input if one in graph.producer), "")
    return None


def _columns(op: Op, specs: Mapping[str, TensorSpec], constants: Constants) -> int | None:
    """The number of columns that an op with weights makes."""
    if op.op_type == "MatMulNBits":
        return attribute(op, "N", 0) or None
    place = _WEIGHTS.get(op.op_type)
    if place is None or place >= len(op.node.input):
        return None
    weights = op.node.input[place]
    shape = constants.shape(weights) or (specs[weights].shape if weights in specs else None)
    if not shape or len(shape) < 2:
        return None
    size = shape[-2 if attribute(op, "transB", 0) else -1]
    return size if isinstance(size, int) else None
