"""Rounds of cutting: write the stages of a cut, run them, correct the costs by their times, and cut again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from onnxsplit.cluster import Device
from onnxsplit.cost.levels import LOWEST_LEVEL, MOST_MOVED, answers_apart, best_level
from onnxsplit.model.precision import computed_types, tolerance
from onnxsplit.npz import save_npz
from onnxsplit.partitioner import Partition, SearchResult, score
from onnxsplit.plan import (
    CorrectionRound,
    Level,
)
from onnxsplit.planning.model_partitioner import ModelPartitioner
from onnxsplit.planning.plan_builder import CandidateCut, PlanBuilder, stage_file
from onnxsplit.planning.result import PlanningResult
from onnxsplit.planning.subject import Subject
from onnxsplit.progress import Say
from onnxsplit.providers import provider_here
from onnxsplit.session import host_cores
from onnxsplit.stages.chain import StageFile, StageProcesses, run_chain
from onnxsplit.stages.extract import write_stage
from onnxsplit.stages.parts import stage_parts, weight_bytes
from onnxsplit.tensors import Array
from onnxsplit.timed import median_ns, run_together

_SAY_EVERY_BYTES = 64 << 20
_GOOD = 1.02  # rounds end when a cut is within this factor of the best one by its measured times
_SLACK = 2.0  # optimisation may move the stages' answers this many times further than the whole model's
_STAGE_SECONDS = 0.8  # how long all stages run at once in a round


class _BytesWritten:
    """Reports the progress of writing at regular intervals."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say = what, total, say
        self._done, self._said = 0, 0
        say(what)

    def __call__(self, size_bytes: int) -> None:
        """Count further bytes that were written."""
        self._done += size_bytes
        if self._done - self._said >= _SAY_EVERY_BYTES:
            self._said = self._done
            self._say(f"{self._what}: {self._done >> 20} of {self._total >> 20} MiB")


class Rounds:
    """Makes the plan of a model in rounds: cuts, writes, measures, corrects, and keeps the best cut.

    Args:
        partitioner: partitions the model.
        folder: the plan's folder; None writes nothing, and the plan names no files.
        say: called with each step.
    """

    def __init__(self, partitioner: ModelPartitioner, folder: Path | None, say: Say) -> None:
        self._partitioner = partitioner
        self._subject: Subject = partitioner.subject
        self._target = partitioner.target
        self._folder = folder
        self._say = say

    def make(self, rounds: int) -> PlanningResult:
        """Cut, run and correct up to ``rounds`` times, and build the plan of the best cut.

        The optimisation levels of the stages are chosen for the first cut and kept, because they change the times.

        Raises:
            PartitionError: there is no cut that keeps every limit, or a file cannot be written.
            ModelError: a stage does not run.
        """
        op_ns = self._contended(self._subject.costs.time_ns)
        if self._subject.costs.source != "measured" or not rounds:
            result = self._partitioner(op_ns)
            return self._finished(self._write("round0", result, op_ns), result.bound, ())
        result = self._partitioner(op_ns, quick=True)
        best: CandidateCut | None = None
        history: list[CorrectionRound] = []
        levels: tuple[Level, ...] | None = None
        seen: set[Partition] = set()
        for number in range(rounds):
            seen.add(result.partition)
            cut = self._write(f"round{number}", result, op_ns)
            if levels is None or len(levels) != len(cut.parts):
                levels = self._best_levels(cut)
            cut = self._measure(replace(cut, levels=levels))
            assert cut.measured_ns is not None
            history.append(
                CorrectionRound(predicted_ns=result.score.compute_ns, measured_ns=cut.times_on_devices(self._target))
            )
            op_ns = cut.op_ns
            worse = best if best is None or cut.score.rank < best.score.rank else cut
            best = cut if worse is best else best
            if worse is not None:
                shutil.rmtree(worse.folder)
            result = self._partitioner(op_ns, quick=True)
            if result.partition in seen or cut.score.value <= _GOOD * result.score.value:
                break
        assert best is not None
        best = self._faithful(best)
        return self._finished(best, self._partitioner(best.op_ns).bound, tuple(history))

    def _finished(self, cut: CandidateCut, bound: int, history: tuple[CorrectionRound, ...]) -> PlanningResult:
        if self._folder is not None:
            for file in cut.folder.iterdir():
                file.rename(self._folder / file.name)
            cut.folder.rmdir()
        plan = PlanBuilder(self._partitioner, self._folder).plan(cut, bound, history)
        return PlanningResult(plan, self._subject, cut.result.partition, cut.op_ns)

    def _contended(self, times_ns: tuple[int, ...]) -> tuple[int, ...]:
        """The times if all devices of this host work at once and have more threads than the host has cores.

        Devices of a cluster have their given speeds, so their times stay.
        """
        share = host_cores() if self._target.cluster is not None else max(self._cpu_threads, host_cores())
        return tuple(time_ns * share // host_cores() for time_ns in times_ns)

    @property
    def _cpu_threads(self) -> int:
        return sum(device.threads for device in self._target.devices if device.provider == "cpu")

    def _write(self, name: str, result: SearchResult, op_ns: tuple[int, ...]) -> CandidateCut:
        subject = self._subject
        folder = (self._folder or Path()) / name
        if self._folder is not None:
            folder.mkdir()
        alike = subject.decoding.alike if subject.decoding is not None else {}
        parts = stage_parts(subject.graph, subject.atoms, result.partition.stage_of, alike)
        files = []
        for index, part in enumerate(parts if self._folder is not None else ()):
            progress = _BytesWritten(
                f"writing stage {index} of {len(parts)}", weight_bytes(subject.graph, part), self._say
            )
            files.append(write_stage(subject.graph, subject.shapes, part, folder, stage_file(index), wrote=progress))
        return CandidateCut(
            result=result,
            parts=parts,
            files=tuple(files),
            folder=folder,
            op_ns=op_ns,
            score=result.score,
            levels=(subject.costs.level,) * len(parts),
        )

    def _measure(self, cut: CandidateCut) -> CandidateCut:
        """Run all stages at once on real inputs, and correct the costs by the measured times.

        If this host has fewer cores than the stages have threads, only as many stages run at once as there are cores
        for, and their times are scaled up. Otherwise the scheduler would favour some stages at random.
        """
        most = max((cut.device(self._target, index).threads for index in range(len(cut.parts))), default=1)
        takes_turns = self._target.cluster is not None or self._cpu_threads > host_cores()
        at_once = max(1, host_cores() // most) if takes_turns else max(1, len(cut.parts))
        with ExitStack() as stack:
            workers = [stack.enter_context(stage.timed(feed)) for stage, feed in self._fed(cut, stack)]
            self._say(f"running {at_once} of {len(workers)} stages at once")
            times: list[list[int]] = []
            for first in range(0, len(workers), at_once):
                group = workers[first : first + at_once]
                run_together(group, _STAGE_SECONDS / 4)
                times += run_together(group, _STAGE_SECONDS, least=3)
        measured = self._contended(tuple(median_ns(run) for run in times))
        alone = score(self._subject.problem(cut.op_ns), replace(cut.result.partition, devices=((0,),) * len(times)))
        op_ns = _corrected(cut, alone.compute_ns, measured)
        final = score(self._subject.problem(op_ns, self._target), cut.result.partition)
        return replace(cut, measured_ns=measured, op_ns=op_ns, score=final)

    def _provider_here(self, device: Device) -> str:
        """The provider that a stage is measured on: its device's, or the CPU if this host lacks that."""
        return device.provider if self._target.cluster is None else provider_here(device.provider)

    def _best_levels(self, cut: CandidateCut) -> tuple[Level, ...]:
        """The optimisation level at which each stage runs fastest."""
        levels: list[Level] = []
        with ExitStack() as stack:
            for index, (stage, feed) in enumerate(self._fed(cut, stack)):
                self._say(f"choosing the optimisation level of stage {index} of {len(cut.parts)}")
                fastest = best_level(
                    stage.path,
                    feed,
                    threads=stage.threads,
                    provider=stage.provider,
                    custom_ops=stage.custom_ops,
                    in_place=stage.in_place,
                )
                levels.append(fastest.level)
        return tuple(levels)

    def _faithful(self, cut: CandidateCut) -> CandidateCut:
        """The cut with lower optimisation levels for stages whose optimisation moves the model's answers too far.

        ONNX Runtime may fuse the ops of a stage differently from those of the whole model, and some fused kernels
        round more. The answers may move twice as far as optimisation moves the whole model's.
        """
        subject, levels = self._subject, list(cut.levels)
        if all(level == LOWEST_LEVEL for level in levels):
            return cut
        rounding = tolerance(computed_types(subject.graph, subject.shapes))
        allowed = max(rounding, _SLACK * subject.costs.moved)
        self._say("comparing the answers of the optimised stages")
        plain = self._answers(cut, [LOWEST_LEVEL] * len(levels))
        while allowed < MOST_MOVED and answers_apart(self._answers(cut, levels), plain) > allowed:
            optimised = [index for index, level in enumerate(levels) if level != LOWEST_LEVEL]
            if not optimised:
                break
            alone = {i: [levels[i] if i == j else LOWEST_LEVEL for j in range(len(levels))] for i in optimised}
            worst = max(optimised, key=lambda index: answers_apart(self._answers(cut, alone[index]), plain))
            levels[worst] = LOWEST_LEVEL
        return cut if tuple(levels) == cut.levels else self._measure(replace(cut, levels=tuple(levels)))

    def _answers(self, cut: CandidateCut, levels: Sequence[Level]) -> dict[str, Array]:
        """The model's outputs, computed by the stages at these levels."""
        graph = self._subject.graph
        stages = [replace(stage, level=level) for stage, level in zip(self._stage_files(cut), levels, strict=True)]
        computed = [name for name in graph.outputs if name not in graph.constants]
        with StageProcesses(keep=False) as run_stage:
            return run_chain(stages, self._subject.inputs, computed, run_stage)

    def _fed(self, cut: CandidateCut, stack: ExitStack) -> list[tuple[StageFile, Path]]:
        """Every stage with a file of the inputs that earlier stages computed; the stack removes the files."""
        stages = self._stage_files(cut)
        plain = [replace(stage, level=LOWEST_LEVEL, provider="cpu") for stage in stages]
        borders = {name for stage in stages for name in stage.inputs}
        with StageProcesses(keep=False) as run_stage:
            values = run_chain(plain, self._subject.inputs, borders, run_stage)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-")))
        feeds = [scratch / f"{index}.npz" for index in range(len(stages))]
        for stage, feed in zip(stages, feeds, strict=True):
            save_npz(feed, {name: values[name] for name in stage.inputs})
        return list(zip(stages, feeds, strict=True))

    def _stage_files(self, cut: CandidateCut) -> list[StageFile]:
        """The stage files and how this host opens them for measurements."""
        devices = [cut.device(self._target, index) for index in range(len(cut.parts))]
        decoding = self._subject.decoding
        in_place = decoding.decoder.in_place if decoding is not None and decoding.step.rows else ()
        return [
            StageFile(
                path=cut.folder / stage_file(index),
                inputs=part.inputs,
                outputs=part.outputs,
                threads=device.threads,
                level=level,
                provider=self._provider_here(device),
                custom_ops=self._subject.libraries(part.ops),
                in_place=tuple(pair for pair in in_place if pair[0] in part.outputs),
            )
            for index, (part, device, level) in enumerate(zip(cut.parts, devices, cut.levels, strict=True))
        ]


def _corrected(cut: CandidateCut, expected: Sequence[int], measured: Sequence[int]) -> tuple[int, ...]:
    """Scale the times of the ops of each stage so that their sum is the measured time of the stage."""
    corrected = list(cut.op_ns)
    for part, predicted, actual in zip(cut.parts, expected, measured, strict=True):
        for op in part.ops if predicted else ():
            corrected[op] = cut.op_ns[op] * actual // predicted
    return tuple(corrected)
