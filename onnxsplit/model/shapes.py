"""Types and shapes of every tensor, with symbolic dimensions or with sizes bound to them.

Shapes come from ONNX's own inference on a copy of the model without weights, so the model may have any size. Inference
starts from the declared inputs only: shapes that the model declares elsewhere are not trusted, since some are wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx.inliner
import onnx.shape_inference

from onnxsplit.errors import InputError
from onnxsplit.model.external_data import external_range, open_external
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.protobuf import all_nodes, function_key, functions_of, nested_graphs, tensor_bytes
from onnxsplit.model.shape_rules import use_stand_ins
from onnxsplit.plan import Shape, TensorSpec
from onnxsplit.tensors import ONNX_TYPE_NUMBER, TRAVELLING_TYPES, size_bytes, type_name

_KEPT_BYTES = 64 * 1024  # stored tensors up to this size are kept for inference, because some are shapes
_KEPT_OUTSIDE_BYTES = 1024  # the same, for tensors in other files


@dataclass(frozen=True)
class Shapes:
    """Types and shapes of a graph's tensors, as far as they are known.

    Attributes:
        specs: type and symbolic shape of each tensor with a known element type.
        sizes: shape of each tensor at the bound dimensions, where it is known.
    """

    specs: Mapping[str, TensorSpec]
    sizes: Mapping[str, tuple[int, ...]]

    def travels(self, name: str) -> bool:
        """Whether a tensor can be sent from one stage to another."""
        spec = self.specs.get(name)
        return spec is not None and spec.dtype in TRAVELLING_TYPES

    def bytes(self, name: str) -> int:
        """Size of a tensor in bytes at the bound dimensions; 0 when its shape is unknown."""
        spec, size = self.specs.get(name), self.sizes.get(name)
        return size_bytes(spec.dtype, size) if spec is not None and size is not None else 0

    def observed(self, sizes: Mapping[str, tuple[int, ...]], types: Mapping[str, str]) -> Shapes:
        """These shapes, corrected by the shapes of a run and completed by the types that a session reports.

        A known type stays. A dimension that the run contradicts becomes ``"?"``; a rank that it contradicts becomes the
        rank of the run.

        Args:
            sizes: shapes of tensors in the run.
            types: ONNX names of the tensors' types.
        """
        specs = dict(self.specs)
        for name, dtype in types.items():
            if name not in specs:
                specs[name] = TensorSpec(dtype=dtype, shape=("?",) * len(sizes[name]) if name in sizes else None)
        for name, size in sizes.items():
            spec = specs.get(name)
            if spec is not None and spec.shape is not None:
                specs[name] = TensorSpec(dtype=spec.dtype, shape=_reconciled(spec.shape, size))
        return replace(self, specs=specs, sizes={**self.sizes, **sizes})


def _reconciled(shape: Shape, size: tuple[int, ...]) -> Shape:
    """A symbolic shape without the dimensions that an observed shape contradicts."""
    if len(shape) != len(size):
        return ("?",) * len(size)
    return tuple("?" if isinstance(d, int) and d != n else d for d, n in zip(shape, size, strict=True))


def input_specs(graph: OpGraph) -> dict[str, TensorSpec]:
    """Types and shapes of the model's inputs, as the model declares them.

    Raises:
        InputError: an input is not a tensor, or has a type that cannot be sent to a stage.
    """
    specs = {}
    for value in graph.source.proto.graph.input:
        if value.name not in graph.inputs:
            continue
        spec = spec_of(value)
        if spec is None or spec.dtype not in TRAVELLING_TYPES:
            kind = value.type.WhichOneof("value") or "no type"
            kind_name = spec.dtype if spec is not None else kind.removesuffix("_type")
            raise InputError(
                f"input {value.name!r} is a {kind_name}, which cannot be sent to a stage; only tensors can"
            )
        specs[value.name] = spec
    return specs


def infer_shapes(
    graph: OpGraph, sizes: Mapping[str, tuple[int, ...]], known: Mapping[str, TensorSpec] | None = None
) -> Shapes:
    """Infer types and shapes of all tensors.

    Args:
        graph: the model.
        sizes: shapes of the inputs at the bound dimensions.
        known: types and ranks of tensors that inference cannot find itself, but can continue from.
    """
    specs = symbolic_specs(graph, known)
    bound = _infer(graph, sizes, known or {})
    fixed = {
        name: tuple(dim for dim in spec.shape if isinstance(dim, int))
        for name, spec in bound.items()
        if spec.shape is not None and all(isinstance(dim, int) for dim in spec.shape)
    }
    return Shapes(specs=specs, sizes={**fixed, **sizes})


def symbolic_specs(graph: OpGraph, known: Mapping[str, TensorSpec] | None = None) -> dict[str, TensorSpec]:
    """Infer types and shapes of all tensors, with symbolic dimensions; ``known`` as for :func:`infer_shapes`."""
    names = {d for value in graph.source.proto.graph.input for d in (spec_of(value) or _NOTHING).shape or ()}
    symbolic = _infer(graph, None, known or {})
    specs = {
        name: TensorSpec(dtype=spec.dtype, shape=_known_names(spec.shape, names)) for name, spec in symbolic.items()
    }
    for value in graph.source.proto.graph.output:
        inferred, declared = specs.get(value.name), spec_of(value)
        if inferred is not None and declared is not None and value.name not in graph.readers:
            specs[value.name] = TensorSpec(dtype=inferred.dtype, shape=_named(inferred.shape, declared.shape, names))
    return specs


def specs_for(graph: OpGraph, shapes: Mapping[str, Shape]) -> dict[str, TensorSpec]:
    """Infer types and shapes of all tensors from other symbolic shapes of inputs than the model declares."""
    return _infer(graph, shapes, {})


def declared_types(graph: OpGraph) -> dict[str, onnx.TypeProto]:
    """Types of the model's outputs, tensors or not: as declared, else as ONNX's inference finds them."""
    outputs = graph.source.proto.graph.output
    types = {value.name: value.type for value in outputs if value.type.WhichOneof("value") is not None}
    if any(name not in types for name in graph.outputs):
        types = {value.name: value.type for value in _inferred(_skeleton(graph, None)).graph.output} | types
    return types


_NOTHING = TensorSpec(dtype="", shape=None)


def _known_names(shape: Shape | None, names: Iterable[int | str]) -> Shape | None:
    """A shape without the names that inference made up: these mean nothing to a caller and may clash between stages."""
    return None if shape is None else tuple(d if isinstance(d, int) or d in names else "?" for d in shape)


def _named(inferred: Shape | None, declared: Shape | None, names: Iterable[int | str]) -> Shape | None:
    """A shape in which the model's own names replace dimensions that inference does not know."""
    if inferred is None or declared is None or len(inferred) != len(declared):
        return inferred
    return tuple(d if i == "?" and d in names else i for i, d in zip(inferred, declared, strict=True))


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec | None:
    """The declared type and shape of a value; None when it is not a tensor or has no element type."""
    if value.type.WhichOneof("value") != "tensor_type":
        return None
    tensor = value.type.tensor_type
    dtype = type_name(tensor.elem_type)
    if dtype is None:
        return None
    return TensorSpec(dtype=dtype, shape=_declared(tensor.shape) if tensor.HasField("shape") else None)


def _declared(shape: onnx.TensorShapeProto) -> Shape:
    """A shape as the protobuf declares it; ``"?"`` for a dimension with neither size nor name."""
    return tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param or "?" for dim in shape.dim
    )


def value_info(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    """A tensor's name, type and shape as ONNX's protobuf."""
    shape = None if spec.shape is None else [None if dim == "?" else dim for dim in spec.shape]
    return onnx.helper.make_tensor_value_info(name, ONNX_TYPE_NUMBER[spec.dtype], shape)


def _infer(graph: OpGraph, sizes: Mapping[str, Shape] | None, known: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Types and shapes of every tensor of the main graph that inference gives an element type."""
    model = _skeleton(graph, sizes)
    use_stand_ins(model)
    model.graph.value_info.extend(value_info(name, spec) for name, spec in known.items())
    inferred = _inferred(model).graph
    declared = graph.source.proto.graph
    specs: dict[str, TensorSpec] = {}
    for value in (*declared.value_info, *declared.output):
        spec = spec_of(value)
        if spec is not None:
            # A declared shape is trusted only where no op relies on it: only the caller sees it.
            trusted = value.name in graph.outputs and value.name not in graph.readers
            specs[value.name] = spec if trusted else TensorSpec(dtype=spec.dtype, shape=None)
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        spec = spec_of(value)
        if spec is not None and (spec.shape is not None or value.name not in specs):
            specs[value.name] = spec
    for tensor in declared.initializer:
        dtype = type_name(tensor.data_type)
        if dtype is not None:
            specs[tensor.name] = TensorSpec(dtype=dtype, shape=tuple(tensor.dims))
    return specs


def annotated(graph: OpGraph, sizes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A copy of the model with every shape that inference finds, also in subgraphs at any depth.

    It has no large weights, its functions are inlined, and its ops are the live ones in topological order.

    Args:
        graph: the model.
        sizes: shapes of the inputs.
    """
    model = _skeleton(graph, sizes)
    if model.functions:
        _write_defaults(model)
        model = onnx.inliner.inline_local_functions(model)
    for node in all_nodes(model.graph.node):
        for body in nested_graphs(node):
            _forget_shapes(body)
    return _inferred(model)


def _write_defaults(model: onnx.ModelProto) -> None:
    """Add missing attributes with their defaults to calls of functions, because the inliner drops these defaults."""
    functions = functions_of(model)
    for node in all_nodes((*model.graph.node, *(inner for function in model.functions for inner in function.node))):
        function = functions.get(function_key(node))
        given = {attribute.name for attribute in node.attribute}
        for attribute in function.attribute_proto if function is not None else ():
            if attribute.name not in given:
                node.attribute.add().CopyFrom(attribute)


def _forget_shapes(body: onnx.GraphProto) -> None:
    """Remove the shapes that a subgraph declares, because a run may contradict them; types stay."""
    del body.value_info[:]
    for value in (*body.input, *body.output):
        if value.type.WhichOneof("value") == "tensor_type":
            value.type.tensor_type.ClearField("shape")


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes that ONNX's inference adds; unchanged when inference fails."""
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:  # shapes then stay unknown until they are observed in a run
        return model


def _skeleton(graph: OpGraph, sizes: Mapping[str, Shape] | None) -> onnx.ModelProto:
    """A copy of the model without the data of large tensors, and without declared shapes of tensors that ops write."""
    source = graph.source.proto
    model = onnx.ModelProto(ir_version=source.ir_version)
    model.opset_import.extend(source.opset_import)
    model.functions.extend(source.functions)
    model.graph.name = source.graph.name
    for value in source.graph.input:
        added = model.graph.input.add()
        added.CopyFrom(value)
        if sizes is not None and value.name in sizes:
            elem_type = value.type.tensor_type.elem_type
            added.CopyFrom(onnx.helper.make_tensor_value_info(value.name, elem_type, sizes[value.name]))
    for value in source.graph.output:
        if value.name not in graph.producer:  # inference would drop the shape of that input or initializer
            continue
        added = model.graph.output.add()
        added.CopyFrom(value)
        if added.type.WhichOneof("value") == "tensor_type":
            added.type.tensor_type.ClearField("shape")
    for tensor in source.graph.initializer:
        added_tensor = model.graph.initializer.add()
        if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor_bytes(tensor) <= _KEPT_OUTSIDE_BYTES:
            _with_data(added_tensor, tensor, graph.source.place)
        else:
            _without_data(added_tensor, tensor)
    model.graph.sparse_initializer.extend(source.graph.sparse_initializer)
    for op in graph.ops:
        _copy_node(model.graph.node.add(), op.node)
    return model


def _copy_node(target: onnx.NodeProto, node: onnx.NodeProto) -> None:
    """Copy an op without the data of large tensors in its attributes."""
    large = [a for a in node.attribute if a.type == onnx.AttributeProto.TENSOR and tensor_bytes(a.t) > _KEPT_BYTES]
    if not large and not any(True for _ in nested_graphs(node)):
        target.CopyFrom(node)
        return
    bare = onnx.NodeProto(
        name=node.name, op_type=node.op_type, domain=node.domain, input=node.input, output=node.output
    )
    target.CopyFrom(bare)
    for attribute in node.attribute:
        added = target.attribute.add()
        if attribute in large:
            added.name, added.type = attribute.name, attribute.type
            _without_data(added.t, attribute.t)
        else:
            added.CopyFrom(attribute)


def _with_data(target: onnx.TensorProto, tensor: onnx.TensorProto, model: Path) -> None:
    """Copy a small tensor with its external data."""
    file, offset, length = external_range(model, tensor)
    with open_external(file) as stream:
        stream.seek(offset)
        content = stream.read(length)
    target.name, target.data_type, target.raw_data = tensor.name, tensor.data_type, content
    target.dims.extend(tensor.dims)


def _without_data(target: onnx.TensorProto, tensor: onnx.TensorProto) -> None:
    """Copy a tensor, without its data when that is large or external."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor_bytes(tensor) <= _KEPT_BYTES:
        target.CopyFrom(tensor)
        return
    target.name, target.data_type = tensor.name, tensor.data_type
    target.dims.extend(tensor.dims)
    target.data_location = onnx.TensorProto.EXTERNAL
    target.external_data.add(key="location", value="absent")
