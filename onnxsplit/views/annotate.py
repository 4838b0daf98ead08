"""The source model with the plan written into it, for tools that draw models or place them on devices.

- Netron shows the metadata of an op: ``onnxsplit.stage`` and ``onnxsplit.time_ns``.
- Google's Model Explorer groups ops by the metadata ``namespace`` and colours them by overlays: JSON files beside the
  model.
- ONNX Runtime reads its layer annotations from the metadata ``layer_ann``.
- ONNX's own multi-device fields (IR version 11) are ``configuration`` of the model and ``pipeline_stage`` of an op.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx

from onnxsplit.errors import PartitionError
from onnxsplit.model.graph_io import restored
from onnxsplit.model.multi_device import FIRST_IR_VERSION, check_multi_device
from onnxsplit.planning.result import PlanningResult
from onnxsplit.stages.model_file import write_model

CONFIGURATION = "onnxsplit"
"""The name of the device configuration that is written into the model."""

_GRADIENT = [{"stop": 0, "bgColor": "#e8f1fb"}, {"stop": 0.5, "bgColor": "#f7c873"}, {"stop": 1, "bgColor": "#d1495b"}]


def annotate(result: PlanningResult, out: str | Path) -> tuple[Path, ...]:
    """Write the annotated model, its external data, and one overlay each for time and memory.

    Args:
        result: the plan and the model that it was made from.
        out: the file of the annotated model.

    Returns:
        The files: ``OUT``, ``OUT.time.json``, ``OUT.memory.json``, and ``OUT.data`` where the source has external data.

    Raises:
        PartitionError: a file cannot be written.
    """
    out = Path(out)
    model = annotated(result)
    problems = check_multi_device(model)
    assert not problems, problems
    try:
        texts = {f"{kind}.json": json.dumps(values, indent=1) for kind, values in overlays(result, model).items()}
        return write_model(result.subject.graph.source, model, out, texts)
    except OSError as error:
        raise PartitionError(f"cannot write {out}: {error.strerror or error}") from error


def annotated(result: PlanningResult) -> onnx.ModelProto:
    """A copy of the source model in which every op has a name, a stage and a time."""
    plan, graph = result.plan, result.subject.graph
    model = restored(graph.source)
    model.ir_version = max(model.ir_version, FIRST_IR_VERSION)
    _name_ops(model)
    kept = [entry for entry in model.configuration if entry.name != CONFIGURATION]
    del model.configuration[:]
    model.configuration.extend(kept)
    devices = [device for stage in plan.stages for device in stage.devices or (f"stage {stage.index}",)]
    model.configuration.add(name=CONFIGURATION, num_devices=max(1, len(devices)), device=devices or ["none"])
    stage_of = result.stage_of_ops()
    by_output = {graph.ops[op].outputs[0]: op for op in stage_of if graph.ops[op].outputs}
    for node in model.graph.node:
        op = next((by_output[name] for name in node.output if name in by_output), None)
        if op is None:
            continue
        stage = stage_of[op]
        others = [entry for entry in node.device_configurations if entry.configuration_id != CONFIGURATION]
        del node.device_configurations[:]
        node.device_configurations.extend(others)
        node.device_configurations.add(configuration_id=CONFIGURATION, pipeline_stage=stage)
        scope = [part for part in node.name.split("/")[:-1] if part]
        _set_metadata(
            node,
            {
                "layer_ann": f"stage{stage}",
                "namespace": "/".join([f"stage {stage}", *scope]),
                "onnxsplit.stage": str(stage),
                "onnxsplit.time_ns": str(result.op_ns[op]),
            },
        )
    return model


def overlays(result: PlanningResult, model: onnx.ModelProto) -> dict[str, dict[str, object]]:
    """Model Explorer's node data: for each op of the annotated model, its milliseconds and the bytes that it writes."""
    graph, shapes = result.subject.graph, result.subject.shapes
    by_output = {op.outputs[0]: op for op in graph.ops if op.outputs}
    times, sizes = {}, {}
    for node in model.graph.node:
        op = next((by_output[name] for name in node.output if name in by_output), None)
        if op is not None:
            times[node.name] = {"value": round(result.op_ns[op.index] / 1e6, 6)}
            sizes[node.name] = {"value": sum(shapes.bytes(name) for name in op.outputs)}
    name = model.graph.name or "main_graph"
    return {
        kind: {name: {"results": results, "gradient": _GRADIENT}}
        for kind, results in (("time", times), ("memory", sizes))
    }


def _name_ops(model: onnx.ModelProto) -> None:
    """Give every op a unique name; unique names stay."""
    counts = Counter(node.name for node in model.graph.node)
    taken = set(counts)
    for node in model.graph.node:
        if node.name and counts[node.name] == 1:
            continue
        stem = node.name or f"{node.op_type}:{next((name for name in node.output if name), '')}"
        name, number = stem, 1
        while name in taken:
            name, number = f"{stem}#{number}", number + 1
        node.name = name
        taken.add(name)


def _set_metadata(node: onnx.NodeProto, values: Mapping[str, str]) -> None:
    kept = [(entry.key, entry.value) for entry in node.metadata_props if entry.key not in values]
    del node.metadata_props[:]
    for key, value in (*kept, *values.items()):
        node.metadata_props.add(key=key, value=value)
