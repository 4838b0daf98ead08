"""From a cut to its plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec.structs

from onnxsplit.cluster import Device
from onnxsplit.partitioner import Score, SearchResult, lower_bound
from onnxsplit.plan import (
    FORMAT_VERSION,
    CorrectionRound,
    Costs,
    Cut,
    Level,
    Plan,
    Prediction,
    Stage,
    TensorSpec,
)
from onnxsplit.plan_base import FileEntry
from onnxsplit.plan_check import plan_problems
from onnxsplit.plan_decoder import Decoder
from onnxsplit.planning.border_forms import Narrowed
from onnxsplit.planning.compressed import with_compression
from onnxsplit.planning.decoder_block import decoder_block
from onnxsplit.planning.model_partitioner import ModelPartitioner
from onnxsplit.planning.origin import Origin, origin_of
from onnxsplit.planning.prediction import prediction
from onnxsplit.planning.subject import Subject
from onnxsplit.planning.target import Target
from onnxsplit.planning.target_block import described
from onnxsplit.planning.verdict import verdict
from onnxsplit.planning.whole_sessions import SessionTimes
from onnxsplit.stages.borders import wire_bytes
from onnxsplit.stages.parts import StageParts, peak_memory_bytes, weight_bytes, whole_parts


@dataclass(frozen=True)
class CandidateCut:
    """A cut that may become the plan: its partition, its stage files, and their measured times.

    Attributes:
        result: the partition, and its figures by the costs that it was made with.
        parts: what each stage is made of.
        files: the files of each stage; empty when nothing is written.
        folder: the folder of the files.
        op_ns: time of each op in nanoseconds; corrected by the measurement once the stages were run.
        score: the figures by these times.
        levels: the optimisation level of each stage.
        measured_ns: time of each stage on a device of speed 1 in nanoseconds, with all stages running at once; None
            when they were not run.
        interval: the half-width of the interval of these times, as a share of each.
        disturbed: the share of the host's cores that other processes used meanwhile.
        moved: how far optimisation moves the answers of the stages, relative to the answers' scale.
        borders: the tensors that cross in a narrower form; None if no such form was asked for.
    """

    result: SearchResult
    parts: tuple[StageParts, ...]
    files: tuple[tuple[FileEntry, ...], ...]
    folder: Path
    op_ns: tuple[int, ...]
    score: Score
    levels: tuple[Level, ...]
    measured_ns: tuple[int, ...] | None = None
    interval: float = 0.0
    disturbed: float = 0.0
    moved: float = 0.0
    borders: Narrowed | None = None

    def inputs(self, stage: int) -> tuple[str, ...]:
        """The tensors that a stage reads; in place of a narrowed tensor, those that cross for it."""
        wire = self.borders.wire if self.borders is not None else {}
        return tuple(name for read in self.parts[stage].inputs for name in wire.get(read, (read,)))

    def outputs(self, stage: int) -> tuple[str, ...]:
        """The tensors that a stage writes: a narrowed tensor also in full, for callers that request it."""
        written = self.parts[stage].outputs
        wire = self.borders.wire if self.borders is not None else {}
        return (*written, *(name for whole in written for name in wire.get(whole, ())))

    def device(self, target: Target, stage: int) -> Device:
        """The device of a stage, or of its first replica."""
        return target.devices[self.result.partition.devices[stage][0]]

    @property
    def reference_ns(self) -> tuple[int, ...]:
        """Time of each stage on a device of speed 1 in nanoseconds: measured, or else by the costs."""
        return self.measured_ns or tuple(sum(self.op_ns[op] for op in part.ops) for part in self.parts)

    def times_on_devices(self, target: Target) -> tuple[int, ...]:
        """The measured time of each stage, scaled to its device, in nanoseconds; empty when nothing was run."""
        return tuple(
            round(time_ns / self.device(target, stage).speed) for stage, time_ns in enumerate(self.measured_ns or ())
        )


def stage_file(index: int) -> str:
    """The file name of a stage."""
    return f"stage{index}.onnx"


class PlanBuilder:
    """Builds plans for the cuts of one model partitioner.

    Args:
        partitioner: the partitioner that made the cuts.
        folder: the plan's folder; None for plans that name no files.
        origin: what plans say of the model; None to find that out, and to write the files that belong to it.
    """

    def __init__(self, partitioner: ModelPartitioner, folder: Path | None, origin: Origin | None = None) -> None:
        self._partitioner, self._folder, self._origin = partitioner, folder, origin
        self._subject, self._target = partitioner.subject, partitioner.target

    def plan(
        self,
        cut: CandidateCut,
        bound: int,
        history: tuple[CorrectionRound, ...],
        sessions: SessionTimes | None = None,
    ) -> Plan:
        """Build the plan of a cut.

        Args:
            cut: the cut.
            bound: a lower bound on the objective of every cut: nanoseconds, or bytes for ``memory``.
            history: the rounds in which stages were run.
            sessions: times of sessions of the whole model; None if they were not measured.
        """
        subject, graph = self._subject, self._subject.graph
        options = self._partitioner.options
        origin = self._origin or origin_of(subject, self._folder)
        plan = Plan(
            format_version=FORMAT_VERSION,
            created_with=origin.created_with,
            model=origin.model,
            strategy=options.strategy,
            parallel=options.parallel,
            objective=options.objective,
            dims=dict(subject.dims),
            stages=tuple(self._stage(cut, index) for index in range(len(cut.parts))),
            tensors=self._tensors(cut),
            cuts=_cuts(cut, subject),
            inputs=graph.inputs,
            outputs=graph.outputs,
            passthrough=dict(origin.passthrough),
            outputs_need={},
            prediction=self._prediction(cut, bound),
            costs=self._costs(cut, history, sessions),
            example_inputs=origin.example_inputs,
            defaults=dict(origin.defaults),
            constant_inputs=dict(origin.constant_inputs),
            dropped_outputs=origin.dropped_outputs,
            dropped_inputs=origin.dropped_inputs,
            custom_ops=origin.custom_ops,
            decoder=self._decoder(cut.parts, origin),
            borders=cut.borders.block(subject.borders) if cut.borders and subject.borders else None,
            target=described(self._target, self._partitioner.stages, options),
        )
        needs = {name: tuple(sorted(plan.stages_for((name,)))) for name in plan.outputs}
        plan = with_compression(msgspec.structs.replace(plan, outputs_need=needs), self._target.cluster)
        plan = msgspec.structs.replace(plan, verdict=verdict(plan, sessions, self._target))
        problems = plan_problems(plan) if self._folder is not None else []
        assert not problems, problems
        return plan

    def _tensors(self, cut: CandidateCut) -> dict[str, TensorSpec]:
        """Types and shapes of the tensors that enter, leave or cross."""
        named = {*self._subject.graph.inputs, *self._subject.graph.outputs}
        for index in range(len(cut.parts)):
            named.update(cut.inputs(index), cut.outputs(index))
        specs = dict(self._subject.shapes.specs)
        for narrow in cut.borders.tensors if cut.borders is not None else ():
            specs |= narrow.wire_specs
        return {name: specs[name] for name in sorted(named)}

    def _costs(self, cut: CandidateCut, history: tuple[CorrectionRound, ...], sessions: SessionTimes | None) -> Costs:
        subject = self._subject
        whole = whole_parts(subject.graph)
        intervals = [cut.interval]
        if sessions is not None:  # a stage that takes longer than the whole model contradicts its time
            beyond = max(cut.reference_ns, default=0) / max(1, sessions.one_ns) - 1
            intervals += [sessions.interval, sessions.drift, beyond]
        return Costs(
            source=subject.costs.source,
            whole_time_ns=sessions.one_ns if sessions is not None else subject.costs.whole_ns,
            whole_weight_bytes=weight_bytes(subject.graph, whole),
            whole_peak_memory_bytes=self._peak_memory_bytes(whole, packed=True),
            whole_optimization_level=subject.costs.level,
            rounds=history,
            note=subject.note,
            interval=max(intervals) if cut.measured_ns is not None else None,
            disturbed=max(cut.disturbed, sessions.disturbed if sessions is not None else 0.0),
            moved=min(1.0, max(cut.moved, subject.costs.moved)),
            host=self._target.host,
        )

    def _prediction(self, cut: CandidateCut, bound: int) -> Prediction:
        atoms = self._subject.problem(cut.op_ns, self._target)
        bound = min(bound, cut.score.value)
        ops = self._subject.as_ops().problem(cut.op_ns, self._target)
        op_bound = bound
        if ops.atoms != atoms.atoms:
            op_bound = min(bound, lower_bound(ops, self._partitioner.lineup(ops)))
        return prediction(cut.score, bound, op_bound)

    def _stage(self, cut: CandidateCut, index: int) -> Stage:
        part, subject = cut.parts[index], self._subject
        device, replicas = cut.device(self._target, index), cut.result.partition.devices[index]
        named = self._target.cluster is not None
        return Stage(
            index=index,
            file=stage_file(index),
            files=cut.files[index] if cut.files else (),
            inputs=cut.inputs(index),
            outputs=cut.outputs(index),
            weight_bytes=weight_bytes(subject.graph, part),
            peak_memory_bytes=self._peak_memory_bytes(part, packed=device.provider == "cpu"),
            provider=device.provider,
            optimization_level=cut.levels[index],
            threads=device.threads,
            predicted_time_ns=cut.result.score.compute_ns[index],
            measured_time_ns=cut.times_on_devices(self._target)[index] if cut.measured_ns is not None else None,
            reference_time_ns=cut.reference_ns[index],
            replicas=len(replicas),
            device=device.name if named else None,
            devices=tuple(self._target.devices[replica].name for replica in replicas) if named else (),
            hosts=tuple(self._target.devices[replica].host for replica in replicas) if named else (),
            device_numbers=replicas,
            ops=len(part.ops),
            custom_ops=tuple(library.name for library in subject.libraries(part.ops)),
        )

    def _peak_memory_bytes(self, part: StageParts, *, packed: bool) -> int:
        """Estimated memory of a stage, with the states of a decoder's sequences."""
        subject = self._subject
        if subject.decoding is None:
            return peak_memory_bytes(subject.graph, subject.shapes, part, packed=packed)
        shapes = subject.decoding.without_states(subject.shapes)
        held = subject.decoding.cache_bytes(subject.graph, frozenset(part.own))
        return peak_memory_bytes(subject.graph, shapes, part, packed=packed) + held

    def _decoder(self, parts: tuple[StageParts, ...], origin: Origin) -> Decoder | None:
        """The description of a decoder."""
        decoding = self._subject.decoding
        return decoder_block(decoding, self._subject.graph, parts, origin.text) if decoding is not None else None


def _cuts(cut: CandidateCut, subject: Subject) -> tuple[Cut, ...]:
    sizes = {name: subject.shapes.bytes(name) for part in cut.parts for name in part.outputs}
    for narrow in cut.borders.tensors if cut.borders is not None else ():
        sizes |= dict(
            zip(narrow.wire, wire_bytes(narrow.form, subject.shapes.sizes[narrow.tensor], narrow.rows), strict=True)
        )
    read = [frozenset(cut.inputs(index)) for index in range(len(cut.parts))]
    return tuple(
        Cut(tensor=name, from_stage=index, to_stages=to, bytes=sizes[name])
        for index in range(len(cut.parts))
        for name in cut.outputs(index)
        if (to := tuple(other for other, names in enumerate(read) if name in names))
    )
