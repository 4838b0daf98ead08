"""The last steps of every export: write the model, name its axes, simplify it, add metadata, check and compare it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx

import onnxsplit
from onnxsplit.decoder.files import TOKENIZER_HASH
from onnxsplit.distance import distance
from onnxsplit.errors import ExportError, MissingDependency, ModelError, one_line
from onnxsplit.export.conversion import Conversion, ExportOptions
from onnxsplit.model.protobuf import captured_names
from onnxsplit.plan_decoder import TOKENIZER
from onnxsplit.session import host_cores, open_session
from onnxsplit.tensors import Array

LARGE_BYTES = 1_900_000_000
"""Weights above this size are written beside the model, since a protobuf is limited to 2 GiB."""

SOURCE, FRAMEWORK, TOOL = "onnxsplit.source", "onnxsplit.framework", "onnxsplit.version"


def finish(
    conversion: Conversion, file: Path, source: str, options: ExportOptions
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Write a model to ``file``, and compare it with the framework.

    Returns:
        For each output, the largest difference to the framework's, relative to its scale; and the inputs on which no
        output depends.

    Raises:
        ExportError: the model is not valid, ONNX Runtime refuses it, or its outputs differ.
        MissingDependency: the model is to be simplified, and onnxsim is not installed.
    """
    options.say("converting")
    conversion.write(file)
    proto = onnx.load(str(file), format="protobuf", load_external_data=False)  # whatever the ending of its name
    _name_axes(proto, conversion.axes)
    if options.simplify:
        options.say("simplifying")
        proto = _simplified(proto)
    metadata = {SOURCE: source, FRAMEWORK: conversion.framework, TOOL: onnxsplit.__version__, **conversion.about}
    if (tokenizer := conversion.files.get(TOKENIZER)) is not None:
        metadata[TOKENIZER_HASH] = hashlib.sha256(tokenizer).hexdigest()
    kept = {entry.key: entry.value for entry in proto.metadata_props} | metadata
    del proto.metadata_props[:]
    for key, value in kept.items():
        proto.metadata_props.add(key=key, value=value)
    file.write_bytes(proto.SerializeToString())
    options.say("checking")
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"the exported model is not valid: {str(error).splitlines()[0]}; nothing was written"
        ) from error
    takes = dict.fromkeys(name for sample in conversion.samples for name in sample)
    return _compared(conversion, file, options), _unread(proto.graph, takes)


def _unread(graph: onnx.GraphProto, takes: Iterable[str]) -> tuple[str, ...]:
    """Inputs of the framework's function, and of the model, from which no path leads to an output."""
    needed = {value.name for value in graph.output}
    for node in reversed(graph.node):  # a valid model has them in order
        if needed.intersection(node.output):
            needed.update(node.input, captured_names(node))
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    return tuple(name for name in dict.fromkeys((*takes, *inputs)) if name not in needed)


def save(proto: onnx.ModelProto, file: Path) -> None:
    """Write a model in memory to a file; its weights are written beside it when it is too large for one file."""
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if weights > LARGE_BYTES:
        onnx.save(proto, str(file), save_as_external_data=True, location=f"{file.name}.data", size_threshold=1024)
    else:
        file.write_bytes(proto.SerializeToString())


def _name_axes(proto: onnx.ModelProto, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give free dimensions the names that the conversion defines."""
    if not axes:
        return
    renamed: dict[str, str] = {}
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, name in axes.get(value.name, {}).items():
            dims = value.type.tensor_type.shape.dim
            if axis < len(dims) and not (dims[axis].HasField("dim_value") and dims[axis].dim_value > 1):
                if dims[axis].dim_param:
                    renamed[dims[axis].dim_param] = name
                dims[axis].Clear()
                dims[axis].dim_param = name
    for value in proto.graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                dim.dim_param = renamed[dim.dim_param]


def _simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model that onnxsim makes of a model."""
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer):
        raise ExportError("a model with external data cannot be simplified; leave out --simplify")
    try:
        import onnxsim
    except ImportError as error:
        raise MissingDependency("--simplify needs onnxsim: pip install 'onnxsplit[simplify]'") from error
    simple: onnx.ModelProto
    simple, good = onnxsim.simplify(proto)
    if not good:
        raise ExportError("the simplified model returns other outputs than the model; leave out --simplify")
    names = [[value.name for value in values] for values in (proto.graph.input, proto.graph.output)]
    if [[value.name for value in values] for values in (simple.graph.input, simple.graph.output)] != names:
        raise ExportError("the simplified model has other inputs or outputs than the model; leave out --simplify")
    return simple


def _compared(conversion: Conversion, file: Path, options: ExportOptions) -> dict[str, float]:
    """The largest difference of each output to the framework's; refuses a model that differs too much."""
    try:
        session = open_session(file, threads=host_cores(), custom_ops=options.libraries)
    except ModelError as error:
        raise ExportError(f"ONNX Runtime refuses the exported model: {error}; nothing was written") from error
    if not options.check:
        return {}
    worst: dict[str, float] = {}
    for sample in conversion.samples:
        options.say("comparing with the framework")
        try:
            actual = session.run({name: sample[name] for name, _ in session.inputs})
        except ModelError as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in sample.items())
            raise ExportError(
                f"the exported model does not run on {shapes}: {error}; nothing was written. Export with --no-check to "
                "inspect it"
            ) from error
        try:
            wanted = conversion.reference(sample)
        except Exception as error:  # frameworks raise errors of any type
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in sample.items())
            raise ExportError(
                f"{conversion.framework} itself does not run on {shapes}: {one_line(error, 300)}; "
                "nothing was written. Export with --no-check to skip the comparison"
            ) from error
        for name, expected in wanted.items():
            worst[name] = max(worst.get(name, 0.0), _difference(actual[name], np.asarray(expected), conversion.jumps))
    far = {name: difference for name, difference in worst.items() if not difference <= conversion.tolerance}
    if far:
        listed = ", ".join(f"{name}: {difference:.1e}" for name, difference in far.items())
        raise ExportError(
            f"the exported model differs from {conversion.framework} by more than {conversion.tolerance:.0e} of the "
            f"scale ({listed}); nothing was written. Export with --no-check to inspect it"
        )
    return worst


def _difference(actual: Array, expected: Array, jumps: float) -> float:
    """The largest difference relative to the scale, without the share of rows that may differ."""
    if actual.dtype.kind in "OUS" or expected.dtype.kind in "OUS":
        return 0.0 if np.mean(actual.astype(str) != expected.reshape(actual.shape).astype(str)) <= jumps else 1.0
    expected = expected.reshape(actual.shape) if expected.size == actual.size else expected
    if not jumps or actual.shape != expected.shape or not actual.ndim:
        return distance(actual, expected)
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-30)
    off = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).reshape(len(actual), -1).max(axis=1) / scale
    kept = np.sort(off)[: max(1, len(off) - int(jumps * len(off)))]
    return float(kept[-1])
