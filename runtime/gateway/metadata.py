"""What the server tells of itself, in the protocol's words: metadata, configuration, statistics. Pure.

A model is announced as an ensemble with a step for every stage, so that clients which know ensembles report each
stage by itself. A stage is called ``MODEL.stage0``; it can be asked about, and runs only as part of its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnxsplit
from onnxsplit.plan import Plan, Stage
from runtime.coordinator.status import NodeStats
from runtime.gateway.counters import Counters, Duration
from runtime.gateway.protocol import DATATYPES
from runtime.gateway.repository import Version

NAME = "onnxsplit"
_STAGE_DIGITS = 6
_SHARED_MEMORY = "system_shared_memory"
EXTENSIONS = (
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    _SHARED_MEMORY,
    "binary_tensor_data",
    "parameters",
    "statistics",
)

Json = dict[str, Any]


def server(*, shared_memory: bool) -> Json:
    """``GET /v2``; ``shared_memory``: whether clients may register some."""
    extensions = [name for name in EXTENSIONS if shared_memory or name != _SHARED_MEMORY]
    return {"name": NAME, "version": onnxsplit.__version__, "extensions": extensions}


def stage_name(model: str, stage: int) -> str:
    """What a stage is called among models."""
    return f"{model}.stage{stage}"


def split_name(name: str, models: Iterable[str]) -> tuple[str, int | None]:
    """The model of a name, and the stage when it is a stage's."""
    if name in models:
        return name, None
    model, _, stage = name.rpartition(".stage")
    if len(stage) <= _STAGE_DIGITS and stage.isascii() and stage.isdecimal() and model in models:
        return model, int(stage)
    return name, None


def metadata(version: Version, numbers: Sequence[str], stage: int | None = None) -> Json:
    """``GET /v2/models/M``."""
    inputs, outputs = _ends(version.plan, stage)
    return {
        "name": version.model if stage is None else stage_name(version.model, stage),
        "versions": list(numbers),
        "platform": "ensemble" if stage is None else "onnxruntime_onnx",
        "inputs": [_tensor(version.plan, name) for name in inputs],
        "outputs": [_tensor(version.plan, name) for name in outputs],
    }


def _ends(plan: Plan, stage: int | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if stage is None:
        return plan.inputs, plan.outputs
    return plan.stages[stage].inputs, plan.stages[stage].outputs


def _tensor(plan: Plan, name: str) -> Json:
    return {"name": name, "datatype": DATATYPES.get(plan.tensors[name].dtype, "INVALID"), "shape": dims(plan, name)}


def dims(plan: Plan, name: str) -> list[int]:
    """A tensor's shape as the protocol has it: -1 for what may vary; ``[-1]`` also where the rank is unknown."""
    shape = plan.tensors[name].shape
    return [-1] if shape is None else [size if isinstance(size, int) else -1 for size in shape]


def config(version: Version, stage: int | None = None) -> Json:
    """``GET /v2/models/M/config``, as Triton's ``ModelConfig``."""
    plan = version.plan
    inputs, outputs = _ends(plan, stage)
    said: Json = {
        "name": version.model if stage is None else stage_name(version.model, stage),
        "platform": "ensemble" if stage is None else "onnxruntime_onnx",
        "backend": "" if stage is None else "onnxruntime",
        "version_policy": {"specific": {"versions": [int(version.number)]}},
        "max_batch_size": 0,
        "input": [_configured_input(plan, name) for name in inputs],
        "output": [_configured(plan, name) for name in outputs],
    }
    if stage is None:
        said["ensemble_scheduling"] = {"step": [_step(version.model, one) for one in plan.stages]}
    else:
        nodes = [n for n in version.pipeline.stats() if n.stage == stage] if version.pipeline is not None else []
        provider = nodes[0].provider if nodes else plan.stages[stage].provider
        said["instance_group"] = [
            {
                "name": said["name"],
                "kind": "KIND_GPU" if "cuda" in provider.lower() else "KIND_CPU",
                "count": len(nodes) or plan.stages[stage].replicas,
            }
        ]
    return said


def _configured(plan: Plan, name: str) -> Json:
    datatype = DATATYPES.get(plan.tensors[name].dtype)
    kind = "TYPE_INVALID" if datatype is None else "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    return {"name": name, "data_type": kind, "dims": dims(plan, name)}


def _configured_input(plan: Plan, name: str) -> Json:
    said = _configured(plan, name)
    return {**said, "optional": True} if name in plan.defaults else said


def _step(model: str, stage: Stage) -> Json:
    return {
        "model_name": stage_name(model, stage.index),
        "model_version": -1,
        "input_map": {name: name for name in stage.inputs},
        "output_map": {name: name for name in stage.outputs},
    }


def statistics(version: Version) -> Json:
    """``GET /v2/models/M/stats``: of a model as a whole."""
    counters = version.counters
    failures = Duration(sum(counters.failures.values()), counters.fail.ns)
    return _statistics(
        version.model,
        version.number,
        counters,
        [counters.success, failures, counters.queue, counters.decode, counters.infer, counters.encode],
        [
            {"batch_size": rows, **_parts(compute_infer=ran, compute_input=Duration(), compute_output=Duration())}
            for rows, ran in sorted(counters.batches.items())
        ],
    )


def stage_statistics(version: Version, stage: int, nodes: Sequence[NodeStats]) -> Json:
    """The same of one stage: what its nodes did. What a stage gets and gives lies in place, so that takes no time."""
    mine = [node for node in nodes if node.stage == stage]
    count = sum(node.requests for node in mine)
    queue = Duration(count, sum(node.waited_ns for node in mine))
    infer = Duration(count, sum(node.ran_ns for node in mine))
    failures = Duration(sum(node.failures for node in mine))
    counters = Counters(inferences=count, executions=count, last_ms=version.counters.last_ms if count else 0)
    parts = [Duration(count, queue.ns + infer.ns), failures, queue, Duration(count), infer, Duration(count)]
    batch = {
        "batch_size": 1,
        **_parts(compute_input=Duration(count), compute_infer=infer, compute_output=Duration(count)),
    }
    return _statistics(stage_name(version.model, stage), version.number, counters, parts, [batch] if count else [])


def _statistics(name: str, number: str, counters: Counters, parts: Sequence[Duration], batches: list[Json]) -> Json:
    names = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "name": name,
        "version": number,
        "last_inference": counters.last_ms,
        "inference_count": counters.inferences,
        "execution_count": counters.executions,
        "inference_stats": {
            **_parts(**dict(zip(names, parts, strict=True))),
            **_parts(cache_hit=Duration(), cache_miss=Duration()),
        },
        "batch_stats": batches,
    }


def _parts(**parts: Duration) -> Mapping[str, Json]:
    return {name: {"count": part.count, "ns": part.ns} for name, part in parts.items()}
