"""Models that ONNX Runtime's optimiser saved.

Such a model has initializers with names that the optimiser would create again when it optimises the model, or a stage
of it, once more. ONNX Runtime then refuses the model ("Attempt to replace the existing tensor"). Renaming the
initializers prevents that. Inputs, outputs and tensors that ops write keep their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import onnx

from onnxsplit.model.protobuf import defined_names, nested_graphs

_OWN_DOMAINS = frozenset(["com.microsoft.nchwc", "com.microsoft.experimental"])
"""Domains that a model saved by the optimiser always imports, and that no exporter imports."""

_MADE = re.compile(r"_token_\d+|_new_shape$|^gemm_(in|out)put_shape")
_SUFFIX = ".kept"


def is_ort_optimised(proto: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime's optimiser saved a model, even if another tool changed it afterwards."""
    if any(entry.domain in _OWN_DOMAINS for entry in proto.opset_import):
        return True
    return any(_MADE.search(tensor.name) for tensor in proto.graph.initializer)


def rename_initializers(proto: onnx.ModelProto) -> None:
    """Give the initializers of a saved model names that the optimiser does not create.

    Initializers that are also inputs or outputs keep their names, and so do those that were renamed before.
    """
    graph = proto.graph
    kept = {value.name for value in (*graph.input, *graph.output)}
    taken = {*kept, *(tensor.name for tensor in graph.initializer), *_inner_names(graph)}
    names: dict[str, str] = {}
    for tensor in graph.initializer:
        if tensor.name in kept or tensor.name.endswith(_SUFFIX):
            continue
        stem, number = tensor.name, 1
        while f"{stem}{_SUFFIX}" in taken:
            number += 1
            stem = f"{tensor.name}.{number}"
        names[tensor.name] = f"{stem}{_SUFFIX}"
        taken.add(names[tensor.name])
        tensor.name = names[tensor.name]
    _rename_reads(graph.node, names)
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    for annotation in graph.quantization_annotation:
        annotation.tensor_name = names.get(annotation.tensor_name, annotation.tensor_name)
        for entry in annotation.quant_parameter_tensor_names:
            entry.value = names.get(entry.value, entry.value)


def _inner_names(graph: onnx.GraphProto) -> set[str]:
    """Every name that ops and subgraphs define, at any depth."""
    names: set[str] = set()
    for node in graph.node:
        names.update(node.output)
        for body in nested_graphs(node):
            names |= defined_names(body) | _inner_names(body)
    return names


def _rename_reads(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> None:
    """Rename the tensors that ops and subgraphs read; a name that a subgraph defines hides the outer one."""
    for node in nodes:
        for position, name in enumerate(node.input):
            if name in names:
                node.input[position] = names[name]
        for body in nested_graphs(node):
            own = defined_names(body)
            visible = {name: new for name, new in names.items() if name not in own}
            _rename_reads(body.node, visible)
            for value in body.output:
                value.name = visible.get(value.name, value.name)
