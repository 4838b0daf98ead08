"""Merging the stages of a plan into one model."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import onnx

from onnxsplit.errors import PlanError
from onnxsplit.model.protobuf import captured_names
from onnxsplit.model.shapes import value_info
from onnxsplit.model.source import SourceModel, open_model
from onnxsplit.npz import load_npz
from onnxsplit.plan import Plan
from onnxsplit.plan_files import default_files, load_plan
from onnxsplit.stages.extract import CONSTANTS_IR_VERSION, model_like
from onnxsplit.stages.model_file import write_model


def merge(folder: str | Path, out: str | Path) -> Plan:
    """Write one model that computes the same as a plan's stages. It appears as a whole or not at all.

    Copies of an op or a constant in several stages are merged. Narrow borders are full again: without stages between
    which tensors cross, nothing is converted. Inputs that may be left out keep their defaults as
    initializers. External data goes to ``OUT.data`` beside the model.

    Args:
        folder: the plan directory.
        out: the model's file.

    Raises:
        PlanError: the plan is damaged, or the file cannot be written.
        ModelError: a stage is not a usable model.
    """
    folder, out = Path(folder), Path(out)
    plan = load_plan(folder)
    model = merged(folder, plan, (open_model(folder / stage.file).proto for stage in plan.stages))
    add_defaults(model.graph, folder, plan)
    try:
        write_model(SourceModel(path=folder / "plan", proto=model, sha256=""), model, out, {}, by_content=True)
    except OSError as error:
        raise PlanError(f"cannot write {out}: {error.strerror or error}") from error
    return plan


def merged(folder: Path, plan: Plan, parts: Iterable[onnx.ModelProto]) -> onnx.ModelProto:
    """One model that computes the same as the stages of a plan, with external data where the stages have it.

    Inputs that may be left out have no defaults in it.

    Args:
        folder: the plan directory.
        plan: the plan.
        parts: the models of the stages, in the plan's order.

    Raises:
        InputError: the file with a constant that is an output cannot be read.
    """
    model = onnx.ModelProto(ir_version=max(plan.model.ir_version, CONSTANTS_IR_VERSION))
    written: set[str] = set()
    constants: set[str] = set()
    functions: set[tuple[str, str, str]] = set()
    for position, part in enumerate(parts):
        if not position:
            model = model_like(part)
            model.graph.name = part.graph.name
            model.graph.metadata_props.extend(part.graph.metadata_props)
        graph = model.graph
        for function in part.functions:
            key = (function.domain, function.name, function.overload)
            if key not in functions:
                functions.add(key)
                model.functions.append(function)
        for node in part.graph.node:
            if not set(filter(None, node.output)) & written:
                graph.node.append(node)
                written.update(filter(None, node.output))
        for tensor in part.graph.initializer:
            if tensor.name not in constants:
                constants.add(tensor.name)
                graph.initializer.append(tensor)
        for sparse in part.graph.sparse_initializer:
            if sparse.values.name not in constants:
                constants.add(sparse.values.name)
                graph.sparse_initializer.append(sparse)
        known = {annotation.tensor_name for annotation in graph.quantization_annotation}
        graph.quantization_annotation.extend(
            a for a in part.graph.quantization_annotation if a.tensor_name not in known
        )
    graph = model.graph
    for name, origin in plan.passthrough.items():
        if origin.file is not None and name not in constants:
            array = load_npz(folder / origin.file.name)[name]
            graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    if not plan.stages:
        model.opset_import.extend(onnx.helper.make_opsetid(d, v) for d, v in plan.model.opsets.items())
        graph.name = Path(plan.model.name).stem
    if plan.borders is not None:
        _drop_unread(graph, plan.outputs)
    graph.input.extend(value_info(name, plan.tensors[name]) for name in plan.inputs)
    graph.output.extend(value_info(name, plan.tensors[name]) for name in plan.outputs)
    return model


def put_in_order(graph: onnx.GraphProto, outputs: Iterable[str]) -> None:
    """Put the ops of a graph in the order of their first outputs; ops that are not named come last."""
    place = {name: position for position, name in enumerate(outputs)}
    nodes = sorted(graph.node, key=lambda node: place.get(next(filter(None, node.output), ""), len(place)))
    del graph.node[:]
    graph.node.extend(nodes)


def add_defaults(graph: onnx.GraphProto, folder: Path, plan: Plan) -> None:
    """Add the defaults of inputs that may be left out, as initializers."""
    for name, file in default_files(folder, plan).items():
        graph.initializer.append(onnx.numpy_helper.from_array(load_npz(file)[name], name))


def _drop_unread(graph: onnx.GraphProto, outputs: Collection[str]) -> None:
    """Remove the ops that no output needs: the conversions of narrow borders. Ops are in topological order."""
    needed, kept = set(outputs), []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed.update((*node.input, *captured_names(node)))
    nodes = list(reversed(kept))
    del graph.node[:]
    graph.node.extend(nodes)
