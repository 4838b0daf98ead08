"""The plan: the contract between the offline and the online half, and the content of ``plan.json``.

A plan directory holds ``plan.json`` and one ONNX file for each stage, with its external data if there is any. Every
file is listed in ``plan.json`` with its size and SHA-256, and the plan's identity is the SHA-256 of ``plan.json``.
Times are integer nanoseconds, sizes are bytes, types have ONNX's names, and tensors have their names in the source
model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from onnxsplit import plan_summary
from onnxsplit.plan_base import (
    MOST_NODES,
    Axis,
    CopyRate,
    Count,
    FileEntry,
    PlanStruct,
    Rate,
    RequestNs,
    StageIndex,
    Threads,
)
from onnxsplit.plan_borders import NarrowBorders
from onnxsplit.plan_decoder import Decoder
from onnxsplit.plan_target import DeviceNumber, PlanTarget
from onnxsplit.plan_verdict import Verdict

CALLER = -1
"""Stands for the caller where a stage or an atom is expected: it writes the model's inputs."""

FORMAT_VERSION = 1
"""The newest format of ``plan.json`` that this version reads, and the format that it writes."""

PLAN_FILE = "plan.json"

Replicas = Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)]
VersionNumber = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]

Shape = tuple[Count | str, ...]

Level = Literal["disabled", "basic", "extended", "all"]
"""ONNX Runtime's graph optimisation levels, weakest first."""


Objective = Literal["throughput", "latency", "memory"]
"""The value that a plan minimises: time of the slowest stage, time of one request, or largest memory of a stage."""


class TensorSpec(PlanStruct, frozen=True, kw_only=True):
    """A tensor as the model declares it.

    Attributes:
        dtype: ONNX's name of the element type, such as ``float32``.
        shape: a size or a symbolic name for each axis; ``"?"`` for an axis without a name. None if the rank is unknown.
        batch_axis: the axis along which requests can be split and joined; None if none exists or none was proven.
    """

    dtype: str
    shape: Shape | None
    batch_axis: Axis | None = None


class BatchClaim(PlanStruct, frozen=True, kw_only=True):
    """Whether requests can be split along the batch axes of ``tensors``, and joined with other requests.

    Attributes:
        trials: the number of batches that gave the same outputs as a whole and in parts. The structure of the model
            was followed op by op too.
        why_not: why requests cannot be split; then no tensor has a batch axis. Empty if they can.
    """

    trials: Count = 0
    why_not: str = ""


class CustomOps(PlanStruct, frozen=True, kw_only=True):
    """A library of custom ops: the name of its file, or ``onnxruntime-extensions``, and the file's SHA-256."""

    name: str
    sha256: str


class Stage(PlanStruct, frozen=True, kw_only=True):
    """One part of the cut model.

    Attributes:
        index: position of the stage in topological order, from 0.
        file: name of the ONNX file; also the first of ``files``.
        files: the ONNX file and its external data.
        inputs: names of the tensors that the stage reads: inputs of the model or outputs of earlier stages.
        outputs: names of the tensors that the stage writes: cut tensors and outputs of the model.
        weight_bytes: bytes of the constants that the stage holds.
        peak_memory_bytes: estimated memory: weights, their packed copies on a CPU, and the largest sum of live
            activations.
        provider: the execution provider that the plan was made for, as ``--provider`` takes it.
        optimization_level: ONNX Runtime's graph optimisation level: disabled, basic, extended or all.
        threads: threads of the session for which the stage was costed or measured.
        predicted_time_ns: compute time of one request by the cost model, without transfers.
        reference_time_ns: measured (else predicted) time on a device of speed 1; None in plans of older versions.
        measured_time_ns: time of one run of the stage with all stages running at once; None if it was not run.
        replicas: number of nodes that execute the stage.
        device: name of the stage's device in the cluster; None if the plan was made without a cluster.
        devices: names of the devices of all replicas, ``device`` first.
        hosts: the host of each of these devices; ``local`` for a device whose host the cluster does not name.
        device_numbers: the positions of the devices of all replicas in the plan's ``target``, also without a cluster.
        ops: number of ops in the stage.
        custom_ops: names of the plan's libraries of custom ops that the stage needs.
        left_to_cpu: ops of the stage that its provider leaves to the CPU: their number by op type. Empty if the
            provider takes all, or was not on the host that made the plan.
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
    device_numbers: tuple[DeviceNumber, ...] = ()
    ops: Count = 0
    custom_ops: tuple[str, ...] = ()
    left_to_cpu: dict[str, Count] = msgspec.field(default_factory=dict)


class ProviderUse(PlanStruct, frozen=True, kw_only=True):
    """A provider of the plan's stages, as it was found on the host that made the plan.

    Attributes:
        provider: the provider, as ``--provider`` takes it.
        whole_time_ns: time of one run of the whole model on it; None if it does not run the whole model.
        left_to_cpu: ops of the whole model that it leaves to the CPU: their number by op type.
        refused: why it does not run the whole model; None if it does.
    """

    provider: str
    whole_time_ns: Count | None
    left_to_cpu: dict[str, Count] = msgspec.field(default_factory=dict)
    refused: str | None = None


class Cut(PlanStruct, frozen=True, kw_only=True):
    """A tensor that one stage sends to others, with its bytes at the sizes that the plan was made for."""

    tensor: str
    from_stage: StageIndex
    to_stages: tuple[StageIndex, ...]
    bytes: Count


class Passthrough(PlanStruct, frozen=True, kw_only=True):
    """The source of an output that no stage computes: an input of the model, or a file with a constant.

    Exactly one of the two is set. The file is an ``.npz`` with one tensor under the output's name.
    """

    input: str | None = None
    file: FileEntry | None = None


class ModelInfo(PlanStruct, frozen=True, kw_only=True):
    """The source model: its file name, the SHA-256 of the file, and its versions, which the stages keep.

    For a model given in memory, the name is the graph's, and the SHA-256 is that of the model's bytes.
    """

    name: str
    sha256: str
    ir_version: VersionNumber
    opsets: dict[str, VersionNumber]


class CreatedWith(PlanStruct, frozen=True, kw_only=True):
    """The versions with which the plan was made; ``onnxruntime`` is None if none was installed."""

    onnxsplit: str
    onnxruntime: str | None


class Prediction(PlanStruct, frozen=True, kw_only=True):
    """The predicted figures of the plan, and the proof of how good they are.

    Attributes:
        bottleneck_ns: time between two requests: that of the slowest stage with its transfers and the request's
            overhead, divided by its replicas, or what the cores of the caller's host allow.
        throughput_per_s: requests per second with every stage busy.
        latency_ns: time of one request through all stages, with transfers.
        lower_bound_ns: no plan for the same atoms, costs and devices has a smaller bottleneck (for the objective
            ``latency``: a smaller latency); 0 for the objective ``memory``.
        gap: how far the objective's value is above its lower bound, as a share of the bound.
        op_lower_bound_ns: the same bound if every op could be cut from every other; 0 for the objective ``memory``.
        peak_memory_bytes: the largest memory of a stage; for the objective ``memory`` only, else None.
        lower_bound_bytes: no plan has a smaller largest memory; for the objective ``memory`` only, else None.
    """

    bottleneck_ns: Count
    throughput_per_s: Rate
    latency_ns: Count
    lower_bound_ns: Count
    gap: Rate
    op_lower_bound_ns: Count
    peak_memory_bytes: Count | None = None
    lower_bound_bytes: Count | None = None


class HostCosts(PlanStruct, frozen=True, kw_only=True):
    """What requests cost on a host beside the runs of the stages.

    Attributes:
        source: ``measured`` on this host, or ``typical`` figures of another one.
        node_ns: processor time that a request takes at a node beside its run, in nanoseconds.
        caller_ns: processor time that a request takes at the caller, in nanoseconds.
        hop_ns: time until a message arrives in another process that waits for it, in nanoseconds; it occupies neither.
        tensor_ns: processor time that a further tensor takes at each end, in nanoseconds.
        bytes_per_s: the rate at which the bytes of a tensor pass each end.
    """

    source: Literal["measured", "typical"]
    node_ns: RequestNs
    caller_ns: RequestNs
    hop_ns: RequestNs
    tensor_ns: RequestNs
    bytes_per_s: CopyRate


TYPICAL_HOST = HostCosts(
    source="typical", node_ns=240_000, caller_ns=360_000, hop_ns=60_000, tensor_ns=20_000, bytes_per_s=12e9
)
"""Figures of a host with two cores, for hosts on which nothing was measured.

They are rounded up, the tensor's most of all: a cut through many tensors must gain more than they may cost.
"""


class Costs(PlanStruct, frozen=True, kw_only=True):
    """The costs that the plan is based on.

    Attributes:
        source: ``measured`` or ``analytic`` (estimated by arithmetic).
        whole_time_ns: time of one run of the whole model in one session with the threads of one stage.
        whole_weight_bytes: bytes of the constants of the whole model.
        whole_peak_memory_bytes: estimated memory of the whole model, as for a stage.
        whole_optimization_level: the optimisation level at which the whole model ran.
        rounds: the rounds in which the stages were run and the costs corrected.
        note: why costs are analytic although they were not asked for, or the plan whose costs were used; else None.
        interval: the half-width of the 95 % interval of the times, as a share of them; None when nothing was measured.
        disturbed: the share of this host's cores that other processes used while the times were taken.
        moved: how far optimisation moves the answers of the model or of its stages, relative to their scale; 0 when
            nothing was measured. Two cuts of the model may differ by as much.
        host: what requests cost beside the runs; None in plans of older versions.
        ops: an ``.npz`` with the time of each op and the shapes of the tensors; None in plans of older versions.
    """

    source: Literal["measured", "analytic"]
    whole_time_ns: Count
    whole_weight_bytes: Count
    whole_peak_memory_bytes: Count
    whole_optimization_level: Level
    rounds: tuple[CorrectionRound, ...] = ()
    note: str | None = None
    interval: Rate | None = None
    disturbed: Rate = 0.0
    moved: Rate = 0.0
    host: HostCosts | None = None
    ops: FileEntry | None = None


class CorrectionRound(PlanStruct, frozen=True, kw_only=True):
    """One round of measuring: for each stage, its time as predicted and as measured, in nanoseconds."""

    predicted_ns: tuple[Count, ...]
    measured_ns: tuple[Count, ...]


class Plan(PlanStruct, frozen=True, kw_only=True):
    """Everything that a pipeline needs to know about a cut model. ``docs/plan.md`` describes each field."""

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
    verdict: Verdict | None = None
    batch: BatchClaim | None = None
    example_inputs: FileEntry | None = None
    defaults: dict[str, FileEntry] = msgspec.field(default_factory=dict)
    constant_inputs: dict[str, str] = msgspec.field(default_factory=dict)
    dropped_outputs: tuple[str, ...] = ()
    dropped_inputs: tuple[str, ...] = ()
    custom_ops: tuple[CustomOps, ...] = ()
    decoder: Decoder | None = None
    borders: NarrowBorders | None = None
    providers: tuple[ProviderUse, ...] = ()
    target: PlanTarget | None = None
    parent: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None

    def __repr__(self) -> str:
        return plan_summary.one_line(self)

    def _repr_html_(self) -> str:
        return plan_summary.drawing(self)

    def edges(self) -> dict[tuple[int, int], int]:
        """The bytes that one request moves from one stage to another, by their indices."""
        return plan_summary.edges(self)

    def to_json(self) -> bytes:
        """The bytes of ``plan.json``."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def files(self) -> Iterator[FileEntry]:
        """Every file of the plan directory except ``plan.json``."""
        for stage in self.stages:
            yield from stage.files
        for source in self.passthrough.values():
            if source.file is not None:
                yield source.file
        if self.example_inputs is not None:
            yield self.example_inputs
        yield from self.defaults.values()
        if self.decoder is not None:
            yield from self.decoder.text
        if self.costs.ops is not None:
            yield self.costs.ops

    def why_fixed(self) -> str | None:
        """Why the model cannot be cut again from this plan when its devices change their speed; None if it can."""
        if self.costs.ops is None or self.target is None:
            return "was made by a version that did not keep the costs of the ops; partition the model again"
        if self.objective == "memory":
            return "was cut for the objective memory, which the speeds of devices do not change"
        if self.target.cut_at:
            return (
                "was cut at the tensors that its user named (--cut-at); partition the model without --cut-at to let "
                "the cut move"
            )
        if any(not stage.device_numbers for stage in self.stages):
            return "does not say which device each stage is on; partition the model again"
        return None

    def refused_inputs(self) -> dict[str, str]:
        """Why requests cannot give some inputs of the source model, and what to do, by the inputs' names."""
        constants = {
            name: f"input {name!r} became a constant ({value}) when the model was cut; "
            f"cut again with --keep-input {name} to give values"
            for name, value in self.constant_inputs.items()
        }
        left_out = ", ".join(self.dropped_outputs)
        return constants | {
            name: f"input {name!r} is no longer an input: only outputs that were left out of the plan "
            f"need it ({left_out}); leave it out"
            for name in self.dropped_inputs
        }

    def producers(self) -> dict[str, int]:
        """The index of the stage that writes each tensor, by the tensor's name."""
        return {name: position for position, stage in enumerate(self.stages) for name in stage.outputs}

    def stages_for(self, outputs: tuple[str, ...]) -> frozenset[int]:
        """The stages that must run to compute these outputs or cut tensors: their producers and all ancestors."""
        producer = self.producers()
        pending = [producer[name] for name in outputs if name in producer]
        needed: set[int] = set()
        while pending:
            stage = pending.pop()
            if stage not in needed:
                needed.add(stage)
                pending.extend(producer[name] for name in self.stages[stage].inputs if name in producer)
        return frozenset(needed)
