"""The server and its models in the protocol's terms: metadata, configuration, statistics.

A model is announced as an ensemble with one step for each stage, so that clients which know ensembles report each
stage separately. A stage is named ``MODEL.stage0``. Clients can ask about it, but it runs only as part of its model.
The text of a model with a tokenizer is named ``MODEL.text``, and is announced as Triton's backends for language models
announce theirs. A model whose states the user has declared is announced as one that takes sequences, without these
states among its inputs and outputs, and not as an ensemble: Triton's configuration cannot say both.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnxsplit
from onnxsplit.plan import Plan, Stage
from runtime.coordinator.status import NodeStats
from runtime.gateway.models.version import TEXT, Part, Version, stage_name, text_name
from runtime.gateway.protocol.documents import (
    BatchStatistics,
    Duration,
    InferenceStatistics,
    Json,
    ModelMetadata,
    ModelStatistics,
    ServerMetadata,
    TensorMetadata,
)
from runtime.gateway.protocol.inference import DATATYPES
from runtime.gateway.protocol.text import INPUTS, OUTPUTS, TEXT_INPUT

NAME = "onnxsplit"
_INT32_MAX = 2**31 - 1
_SHARED_MEMORY = "system_shared_memory"
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    _SHARED_MEMORY,
    "binary_tensor_data",
    "parameters",
    "statistics",
    "generate",
)


def server(*, shared_memory: bool) -> ServerMetadata:
    """``GET /v2``. ``shared_memory`` says whether clients may register some."""
    extensions = [name for name in EXTENSIONS if shared_memory or name != _SHARED_MEMORY]
    return ServerMetadata(NAME, onnxsplit.__version__, extensions)


def metadata(version: Version, numbers: Sequence[str], stage: Part = None) -> ModelMetadata:
    """``GET /v2/models/M``, of a model or a part of it. ``numbers`` are the versions that are loaded."""
    if stage == TEXT:
        return ModelMetadata(
            name=text_name(version.model),
            versions=list(numbers),
            platform=NAME,
            inputs=[TensorMetadata(name, datatype, [_text_size(name)]) for name, datatype in INPUTS.items()],
            outputs=[TensorMetadata(name, datatype, [1]) for name, datatype in OUTPUTS.items()],
        )
    inputs, outputs = _tensor_names(version, stage)
    whole = NAME if version.states.declared else "ensemble"
    return ModelMetadata(
        name=version.model if stage is None else stage_name(version.model, stage),
        versions=list(numbers),
        platform=whole if stage is None else "onnxruntime_onnx",
        inputs=[_tensor(version.plan, name) for name in inputs],
        outputs=[_tensor(version.plan, name) for name in outputs],
    )


def _tensor_names(version: Version, stage: int | None) -> tuple[list[str], list[str]]:
    plan, hidden = version.plan, version.states.hidden
    if stage is None:
        return [name for name in plan.inputs if name not in hidden], [n for n in plan.outputs if n not in hidden]
    return list(plan.stages[stage].inputs), list(plan.stages[stage].outputs)


def _tensor(plan: Plan, name: str) -> TensorMetadata:
    return TensorMetadata(name, DATATYPES.get(plan.tensors[name].dtype, "INVALID"), dims(plan, name))


def dims(plan: Plan, name: str) -> list[int]:
    """A tensor's shape in the protocol's terms: -1 for a size that may vary, and ``[-1]`` for an unknown rank."""
    shape = plan.tensors[name].shape
    return [-1] if shape is None else [size if isinstance(size, int) else -1 for size in shape]


def config(version: Version, stage: Part = None) -> Json:
    """``GET /v2/models/M/config``, as Triton's ``ModelConfig``."""
    if stage == TEXT:
        return _text_config(version)
    plan = version.plan
    inputs, outputs = _tensor_names(version, stage)
    name = version.model if stage is None else stage_name(version.model, stage)
    document: Json = {
        "name": name,
        "platform": "ensemble" if stage is None else "onnxruntime_onnx",
        "backend": "" if stage is None else "onnxruntime",
        "version_policy": {"specific": {"versions": [int(version.number)]}},
        "max_batch_size": 0,
        "input": [_configured_input(plan, tensor) for tensor in inputs],
        "output": [_configured(plan, tensor) for tensor in outputs],
    }
    if stage is None and version.states.declared:
        document |= {"platform": "", "backend": NAME, "sequence_batching": _sequence_batching(version)}
    elif stage is None:
        document["ensemble_scheduling"] = {"step": [_step(version.model, one) for one in plan.stages]}
    else:
        nodes = [n for n in version.pipeline.stats() if n.stage == stage] if version.pipeline is not None else []
        provider = nodes[0].provider if nodes else plan.stages[stage].provider
        kind = "KIND_GPU" if "cuda" in provider.lower() else "KIND_CPU"
        count = len(nodes) or plan.stages[stage].replicas
        document["instance_group"] = [{"name": name, "kind": kind, "count": count}]
    return document


def _configured(plan: Plan, name: str) -> Json:
    return {"name": name, "data_type": _data_type(plan, name), "dims": dims(plan, name)}


def _data_type(plan: Plan, name: str) -> str:
    datatype = DATATYPES.get(plan.tensors[name].dtype)
    return "TYPE_INVALID" if datatype is None else "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _sequence_batching(version: Version) -> Json:
    """How requests of sequences are executed, in Triton's terms: any of the running sequences may be next."""
    document: Json = {
        "state": [
            {
                "input_name": pair.input,
                "output_name": pair.output,
                "data_type": _data_type(version.plan, pair.input),
                "dims": dims(version.plan, pair.input),
            }
            for pair in version.states.pairs
        ]
    }
    if (sequences := version.sequences) is not None:
        options = sequences.options
        document["oldest"] = {"max_candidate_sequences": min(options.room.most, _INT32_MAX)}
        document["max_sequence_idle_microseconds"] = options.idle_ns // 1000
    return document


def _text_config(version: Version) -> Json:
    def tensor(name: str, datatype: str) -> Json:
        kind = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
        return {"name": name, "data_type": kind, "dims": [_text_size(name)]}

    return {
        "name": text_name(version.model),
        "platform": "",
        "backend": NAME,
        "version_policy": {"specific": {"versions": [int(version.number)]}},
        "max_batch_size": 0,
        "input": [{**tensor(*one), "optional": one[0] != TEXT_INPUT} for one in INPUTS.items()],
        "output": [tensor(*one) for one in OUTPUTS.items()],
        "model_transaction_policy": {"decoupled": True},
    }


def _text_size(name: str) -> int:
    return -1 if name == "stop_words" else 1


def _configured_input(plan: Plan, name: str) -> Json:
    entry = _configured(plan, name)
    return {**entry, "optional": True} if name in plan.defaults else entry


def _step(model: str, stage: Stage) -> Json:
    return {
        "model_name": stage_name(model, stage.index),
        "model_version": -1,
        "input_map": {name: name for name in stage.inputs},
        "output_map": {name: name for name in stage.outputs},
    }


def statistics(version: Version) -> ModelStatistics:
    """``GET /v2/models/M/stats``, of a model as a whole."""
    counters = version.counters
    return ModelStatistics(
        name=version.model,
        version=version.number,
        last_inference=counters.last_ms,
        inference_count=counters.inferences,
        execution_count=counters.executions,
        inference_stats=InferenceStatistics(
            success=counters.success,
            fail=Duration(sum(counters.failures.values()), counters.fail.ns),
            queue=counters.queue,
            compute_input=counters.decode,
            compute_infer=counters.infer,
            compute_output=counters.encode,
            cache_hit=counters.cache_hit,
            cache_miss=counters.cache_miss,
        ),
        batch_stats=[
            BatchStatistics(batch_size=rows, compute_input=Duration(), compute_infer=ran, compute_output=Duration())
            for rows, ran in sorted(counters.batches.items())
        ],
    )


def stage_statistics(version: Version, stage: int, nodes: Sequence[NodeStats]) -> ModelStatistics:
    """``GET /v2/models/M/stats``, of one stage: the work of its nodes.

    Nodes read inputs and write outputs in place, so the times for these are 0.
    """
    nodes = [node for node in nodes if node.stage == stage]
    count = sum(node.requests for node in nodes)
    queue = Duration(count, sum(node.waited_ns for node in nodes))
    infer = Duration(count, sum(node.ran_ns for node in nodes))
    none = Duration(count)
    batch = BatchStatistics(batch_size=1, compute_input=none, compute_infer=infer, compute_output=none)
    return ModelStatistics(
        name=stage_name(version.model, stage),
        version=version.number,
        last_inference=version.counters.last_ms if count else 0,
        inference_count=count,
        execution_count=count,
        inference_stats=InferenceStatistics(
            success=Duration(count, queue.ns + infer.ns),
            fail=Duration(sum(node.failures for node in nodes)),
            queue=queue,
            compute_input=none,
            compute_infer=infer,
            compute_output=none,
            cache_hit=Duration(),
            cache_miss=Duration(),
        ),
        batch_stats=[batch] if count else [],
    )
