"""The plan: the contract between the offline and the online half, and what ``plan.json`` holds.

A plan directory holds ``plan.json`` and one ONNX file a stage (with its external data, where there is any). Every
file is named in ``plan.json`` with its size and SHA-256; the plan's identity is the SHA-256 of ``plan.json``. Times
are integer nanoseconds, sizes bytes, types ONNX's names, tensor names those of the source model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from onnxsplit.numbers import MOST_FILE_BYTES

CALLER = -1
"""Stands for the caller where a stage or an atom is expected: it writes the model's inputs."""

FORMAT_VERSION = 1
PLAN_FILE = "plan.json"

MOST_NODES = 255
"""Nodes that a plan's stages may have together, replicas included; so also the most stages."""

MOST_THREADS = 1024
"""Threads that one session may have."""

_MOST_RANK = 64
_MOST_INTEGER = 2**53 - 1  # what every reader of JSON keeps exact

Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST_INTEGER)]
"""A time in nanoseconds, a size in bytes, the size of a dimension, or a number of things."""

StageIndex = Annotated[int, msgspec.Meta(ge=0, lt=MOST_NODES)]
Replicas = Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)]
Threads = Annotated[int, msgspec.Meta(ge=1, le=MOST_THREADS)]
Axis = Annotated[int, msgspec.Meta(ge=0, lt=_MOST_RANK)]
FileSize = Annotated[int, msgspec.Meta(ge=0, le=MOST_FILE_BYTES)]
VersionNumber = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e18)]

Shape = tuple[Count | str, ...]

Level = Literal["disabled", "basic", "extended", "all"]
"""ONNX Runtime's graph optimisation levels, weakest first."""


Objective = Literal["throughput", "latency", "memory"]
"""What a plan makes small: the slowest stage, the time of one request, or the largest need of memory."""


class PlanStruct(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything in a plan: immutable, compared by value, unknown JSON fields ignored."""


class TensorSpec(PlanStruct, frozen=True, kw_only=True):
    """A tensor as the model declares it.

    Attributes:
        dtype: ONNX's name of the element type.
        shape: integers and symbolic names; None when the rank is unknown. ``"?"`` is a dimension without a name.
        batch_axis: the axis along which requests can be split; None when there is none, or none was proven.
    """

    dtype: str
    shape: Shape | None
    batch_axis: Axis | None = None


class BatchClaim(PlanStruct, frozen=True, kw_only=True):
    """Whether requests can be split along the batch axes of ``tensors``, and joined with others.

    Attributes:
        trials: batches that gave the same whole and in parts; the model's structure was followed op by op, too.
        why_not: what ended the claim; empty where it holds. Then no tensor has a batch axis.
    """

    trials: Count = 0
    why_not: str = ""


class FileEntry(PlanStruct, frozen=True, kw_only=True):
    """One file of the plan directory: a plain name, its size and its SHA-256 in hexadecimal."""

    name: str
    sha256: str
    size_bytes: FileSize


class CustomOps(PlanStruct, frozen=True, kw_only=True):
    """A library of custom ops: the name of its file, or ``onnxruntime-extensions``, and the file's SHA-256."""

    name: str
    sha256: str


class Stage(PlanStruct, frozen=True, kw_only=True):
    """One part of the cut model.

    Attributes:
        index: position in topological order.
        file: the ONNX file; also the first of ``files``.
        files: the ONNX file and its external data.
        inputs: tensors read: inputs of the model, or outputs of earlier stages.
        outputs: tensors written: cut tensors and outputs of the model.
        weight_bytes: initializers this stage holds.
        peak_memory_bytes: weights, their packed copies on a CPU, and the largest sum of live activations, estimated.
        provider: the provider the plan was made for, as ``--provider`` takes it.
        optimization_level: ONNX Runtime's graph optimisation level: disabled, basic, extended or all.
        threads: threads of the session when it was measured.
        predicted_time_ns: by the cost model, without transfers.
        reference_time_ns: of either, on a device of speed 1; None in plans made before there was this.
        measured_time_ns: of the real stage with all stages running at once; None when it was not run.
        replicas: nodes that execute this stage.
        device: a device of the cluster; None when the plan was made for this host alone.
        devices: the devices of all its replicas, that one first.
        hosts: the host of each of those, ``local`` for one that the cluster does not name.
        ops: number of ops in the stage.
        custom_ops: names of the libraries of custom ops, among the plan's, that it cannot run without.
    """

    index: StageIndex
    file: str
    files: tuple[FileEntry, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: Count
    peak_memory_bytes: Count
    provider: str
    optimization_level: Level
    threads: Threads
    predicted_time_ns: Count
    measured_time_ns: Count | None = None
    reference_time_ns: Count | None = None
    replicas: Replicas = 1
    device: str | None = None
    devices: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    ops: Count = 0
    custom_ops: tuple[str, ...] = ()


class Cut(PlanStruct, frozen=True, kw_only=True):
    """A tensor that crosses from one stage to others, with its bytes at the dimensions the plan was made for."""

    tensor: str
    from_stage: StageIndex
    to_stages: tuple[StageIndex, ...]
    bytes: Count


class Passthrough(PlanStruct, frozen=True, kw_only=True):
    """Where an output comes from that no stage computes: an input of the model, or a file with the constant.

    Exactly one of the two is set. The file is an ``.npz`` with one tensor, under the output's name.
    """

    input: str | None = None
    file: FileEntry | None = None


class ModelInfo(PlanStruct, frozen=True, kw_only=True):
    """The source model: file name, SHA-256 of that file, and the versions its stages keep.

    Of a model given in memory, the name is that of its graph, and the hash that of its bytes.
    """

    name: str
    sha256: str
    ir_version: VersionNumber
    opsets: dict[str, VersionNumber]


class CreatedWith(PlanStruct, frozen=True, kw_only=True):
    """Versions at work when the plan was made; ``onnxruntime`` is None when none was installed."""

    onnxsplit: str
    onnxruntime: str | None


class Prediction(PlanStruct, frozen=True, kw_only=True):
    """What the plan promises.

    Attributes:
        bottleneck_ns: time of the slowest stage with its transfers, by request: replicas share them.
        throughput_per_s: requests a second with every stage busy.
        latency_ns: one request through all stages, transfers included.
        lower_bound_ns: no plan for the same atoms, costs and devices has a smaller bottleneck; with the objective
            ``latency``, a smaller latency; 0 with ``memory``.
        gap: how far the objective's value is above its lower bound, as a share of that.
        op_lower_bound_ns: the same bound when every op could be cut from every other.
        peak_memory_bytes: the largest need of a stage; with the objective ``memory`` only.
        lower_bound_bytes: no plan has a smaller one.
    """

    bottleneck_ns: Count
    throughput_per_s: Rate
    latency_ns: Count
    lower_bound_ns: Count
    gap: Rate
    op_lower_bound_ns: Count
    peak_memory_bytes: Count | None = None
    lower_bound_bytes: Count | None = None


class Costs(PlanStruct, frozen=True, kw_only=True):
    """Where the times come from.

    Attributes:
        source: ``measured`` or ``analytic``.
        whole_time_ns: the whole model in one session with one stage's threads.
        whole_weight_bytes: initializers of the whole model.
        whole_peak_memory_bytes: as for a stage.
        rounds: bottleneck of every measure-and-correct round: predicted and measured.
        note: why costs are analytic when they are.
    """

    source: Literal["measured", "analytic"]
    whole_time_ns: Count
    whole_weight_bytes: Count
    whole_peak_memory_bytes: Count
    whole_optimization_level: Level
    rounds: tuple[CorrectionRound, ...] = ()
    note: str | None = None


class CorrectionRound(PlanStruct, frozen=True, kw_only=True):
    """One round: stage times as predicted before it ran and as measured, in nanoseconds, by stage."""

    predicted_ns: tuple[Count, ...]
    measured_ns: tuple[Count, ...]


class Plan(PlanStruct, frozen=True, kw_only=True):
    """Everything a pipeline needs to know about a cut model. See ``docs/plan.md`` for each field."""

    format_version: Annotated[int, msgspec.Meta(ge=1)]
    created_with: CreatedWith
    model: ModelInfo
    strategy: str
    parallel: str
    objective: str
    dims: dict[str, Count]
    stages: tuple[Stage, ...]
    tensors: dict[str, TensorSpec]
    cuts: tuple[Cut, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    passthrough: dict[str, Passthrough]
    outputs_need: dict[str, tuple[StageIndex, ...]]
    prediction: Prediction
    costs: Costs
    batch: BatchClaim | None = None
    example_inputs: FileEntry | None = None
    defaults: dict[str, FileEntry] = {}
    constant_inputs: dict[str, str] = {}
    dropped_outputs: tuple[str, ...] = ()
    dropped_inputs: tuple[str, ...] = ()
    custom_ops: tuple[CustomOps, ...] = ()

    def to_json(self) -> bytes:
        """The bytes of ``plan.json``."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def files(self) -> Iterator[FileEntry]:
        """Every file of the plan directory but ``plan.json`` itself."""
        for stage in self.stages:
            yield from stage.files
        for source in self.passthrough.values():
            if source.file is not None:
                yield source.file
        if self.example_inputs is not None:
            yield self.example_inputs
        yield from self.defaults.values()

    def refused_inputs(self) -> dict[str, str]:
        """Inputs of the source model that a request cannot give: name -> why, and what to do."""
        constants = {
            name: f"input {name!r} became a constant ({value}) when the model was cut; "
            f"cut again with --keep-input {name} to give values"
            for name, value in self.constant_inputs.items()
        }
        left_out = ", ".join(self.dropped_outputs)
        return constants | {
            name: f"input {name!r} is no longer an input: only outputs that were left out when the model was cut "
            f"need it ({left_out}); leave it out"
            for name in self.dropped_inputs
        }

    def producers(self) -> dict[str, int]:
        """The stage that writes each tensor that a stage writes."""
        return {name: position for position, stage in enumerate(self.stages) for name in stage.outputs}

    def stages_for(self, outputs: tuple[str, ...]) -> frozenset[int]:
        """The stages that must run to give these outputs or cut tensors: their producers and all ancestors."""
        producer = self.producers()
        pending = [producer[name] for name in outputs if name in producer]
        needed: set[int] = set()
        while pending:
            stage = pending.pop()
            if stage not in needed:
                needed.add(stage)
                pending.extend(producer[name] for name in self.stages[stage].inputs if name in producer)
        return frozenset(needed)
