"""The least around a state: tokens, their vectors and scores, to which a test adds the ops that it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import build
import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxsplit.decoder.claim import DecoderClaim, NoDecoder
from onnxsplit.decoder.find import find_decoder
from onnxsplit.decoder.override import Override
from onnxsplit.model.graph import build_graph
from onnxsplit.model.in_memory import open_any
from onnxsplit.model.shapes import infer_shapes

VOCABULARY, WIDTH = 11, 8
INT64, FLOAT, INT32 = TensorProto.INT64, TensorProto.FLOAT, TensorProto.INT32
CACHE = ["batch", 1, "past", WIDTH]
GROWN = ["batch", 1, "total", WIDTH]

op = helper.make_node


def decoder_around(
    nodes: Sequence[onnx.NodeProto],
    pasts: Mapping[str, Sequence[int | str] | None],
    presents: Mapping[str, Sequence[int | str] | None],
    *,
    more: Sequence[onnx.ValueInfoProto] = (),
    constants: Mapping[str, object] | None = None,
    microsoft: bool = False,
    opset: int = 23,
    tokens: str = "input_ids",
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model that reads tokens, adds the given ops, and writes scores.

    The ops can read ``x``, the vectors of the tokens [batch, new, 8], and ``k``, the same as one head, [batch, 1, new,
    8]. The scores do not depend on the states, so such a model is for looking at and not for running.

    Args:
        nodes: the ops.
        pasts: shapes of further inputs.
        presents: shapes of further outputs.
        more: further inputs of other types.
        constants: integer constants.
        microsoft: whether ops of com.microsoft are used.
        opset: of ONNX.
        tokens: name of the input with the tokens.
        functions: model-local functions, of the domain ``mine``.
    """
    table = np.random.default_rng(0).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    weights = [build.constant("embed", table), build.constant("head", table.T.copy()), build.constant("one", [1])]
    weights += [build.constant(name, np.asarray(array, np.int64)) for name, array in (constants or {}).items()]
    all_nodes = [
        op("Gather", ["embed", tokens], ["x"]),
        op("Unsqueeze", ["x", "one"], ["k"]),
        *nodes,
        op("MatMul", ["x", "head"], ["logits"]),
    ]
    inputs = [build.value(tokens, ["batch", "new"], INT64), *(build.value(n, s) for n, s in pasts.items()), *more]
    outputs = [build.value("logits", ["batch", "new", VOCABULARY]), *(build.value(n, s) for n, s in presents.items())]
    opsets = {"": opset} | ({"com.microsoft": 1} if microsoft else {}) | ({"mine": 1} if functions else {})
    return build.model(all_nodes, inputs, outputs, weights, opsets=opsets, functions=functions, ir_version=10)


def found(
    model: onnx.ModelProto, folder: Path | None = None, override: Override | None = None
) -> DecoderClaim | NoDecoder:
    """What the detection says of a model."""
    graph = build_graph(open_any(model))
    return find_decoder(graph, infer_shapes(graph, {}).specs, folder=folder, override=override)


def claimed(model: onnx.ModelProto, folder: Path | None = None, override: Override | None = None) -> DecoderClaim:
    """The claim of a model that is a decoder."""
    claim = found(model, folder, override)
    assert isinstance(claim, DecoderClaim), claim
    return claim


def refusal(model: onnx.ModelProto, folder: Path | None = None, override: Override | None = None) -> str:
    """Why a model is not treated as a decoder."""
    claim = found(model, folder, override)
    assert isinstance(claim, NoDecoder), claim
    return claim.reason
