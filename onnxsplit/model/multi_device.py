"""Checks of ONNX's multi-device fields (IR 11), which onnx's own checker does not make.

A model may have *configurations* (named sets of devices). Each op may say how it takes part in one: its pipeline stage,
and how its tensors are sharded. These fields are hints, but a tool that follows them needs them to be consistent.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

FIRST_IR_VERSION = 11
"""IR version that introduced these fields."""


def check_multi_device(model: onnx.ModelProto) -> list[str]:
    """Describe every violation in a model's multi-device fields; the list is empty when there is none."""
    return [*_check_configurations(model), *_check_ops(model), *_check_stages(model)]


def _check_configurations(model: onnx.ModelProto) -> Iterator[str]:
    names = [configuration.name for configuration in model.configuration]
    if names and model.ir_version < FIRST_IR_VERSION:
        yield f"the model has IR version {model.ir_version}; device configurations need {FIRST_IR_VERSION} or newer"
    for name in sorted(set(names)):
        if not name:
            yield "a device configuration has no name"
        elif names.count(name) > 1:
            yield f"the device configuration {name!r} occurs {names.count(name)} times"
    for configuration in model.configuration:
        if configuration.num_devices < 1:
            yield f"the device configuration {configuration.name!r} has {configuration.num_devices} devices"
        elif configuration.device and len(configuration.device) != configuration.num_devices:
            yield (
                f"the device configuration {configuration.name!r} names {len(configuration.device)} devices "
                f"but declares {configuration.num_devices}"
            )


def _check_ops(model: onnx.ModelProto) -> Iterator[str]:
    devices = {configuration.name: configuration.num_devices for configuration in model.configuration}
    for position, node in enumerate(model.graph.node):
        where = f"op {node.name or position!r}"
        seen = set()
        for entry in node.device_configurations:
            name = entry.configuration_id
            if name not in devices:
                yield f"{where} belongs to the device configuration {name!r}, which the model does not have"
            if name in seen:
                yield f"{where} has two entries for the device configuration {name!r}"
            seen.add(name)
            if entry.HasField("pipeline_stage") and entry.pipeline_stage < 0:
                yield f"{where}: pipeline stage {entry.pipeline_stage} is below 0"
            for spec in entry.sharding_spec:
                yield from _check_sharding(where, node, spec, devices.get(name, 0))


def _check_sharding(where: str, node: onnx.NodeProto, spec: onnx.ShardingSpecProto, devices: int) -> Iterator[str]:
    if spec.tensor_name not in {*node.input, *node.output}:
        yield f"{where}: sharding of {spec.tensor_name!r}, which it neither reads nor writes"
    groups = {entry.key: entry.value for entry in spec.index_to_device_group_map}
    for device in spec.device:
        if device < 0 and device not in groups:
            yield f"{where}: sharding of {spec.tensor_name!r} names the device group {device}, which is not defined"
        elif device >= devices:
            yield f"{where}: sharding of {spec.tensor_name!r} names device {device} of {devices}"
    for dim in spec.sharded_dim:
        for simple in dim.simple_sharding:
            if simple.num_shards < 1:
                yield f"{where}: sharding of {spec.tensor_name!r} along axis {dim.axis} has no shards"


def _check_stages(model: onnx.ModelProto) -> Iterator[str]:
    """Violations of the order of stages: a tensor may only be read in its own or a later stage."""
    for configuration in model.configuration:
        written: dict[str, int] = {}
        for node in model.graph.node:
            stage = next(
                (
                    entry.pipeline_stage
                    for entry in node.device_configurations
                    if entry.configuration_id == configuration.name and entry.HasField("pipeline_stage")
                ),
                None,
            )
            if stage is not None:
                written.update(dict.fromkeys(node.output, stage))
        for node in model.graph.node:
            for entry in node.device_configurations:
                if entry.configuration_id != configuration.name or not entry.HasField("pipeline_stage"):
                    continue
                for name in node.input:
                    if written.get(name, entry.pipeline_stage) > entry.pipeline_stage:
                        yield (
                            f"op {node.name!r} of pipeline stage {entry.pipeline_stage} reads {name!r}, "
                            f"which the later stage {written[name]} writes"
                        )
