"""Rounds of cutting: write the stages of a cut, run them, correct the costs by their times, and cut again."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from onnxsplit.cluster import Device
from onnxsplit.cost.levels import CANDIDATE_LEVELS, LOWEST_LEVEL, MOST_MOVED, answers_apart, best_level
from onnxsplit.distance import tolerance
from onnxsplit.effort import SLOW_S, TimeBudget
from onnxsplit.errors import ModelRefused
from onnxsplit.model.precision import computed_types
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.partitioner import Partition, SearchResult, score
from onnxsplit.plan import (
    CorrectionRound,
    Level,
)
from onnxsplit.planning.borders import as_chosen, narrowed, rounding_of_borders, without_conversions
from onnxsplit.planning.model_partitioner import ModelPartitioner
from onnxsplit.planning.plan_builder import CandidateCut, PlanBuilder, stage_file
from onnxsplit.planning.result import PlanningResult
from onnxsplit.planning.sampling import take_samples
from onnxsplit.planning.subject import Subject
from onnxsplit.planning.whole_sessions import SessionTimes, WholeSessions
from onnxsplit.progress import Say
from onnxsplit.providers import provider_here, threads_on_cores
from onnxsplit.session import host_cores
from onnxsplit.stages.chain import StageFile, StageProcesses, run_chain
from onnxsplit.stages.extract import write_stage
from onnxsplit.stages.parts import stage_parts, weight_bytes
from onnxsplit.tensors import Array
from onnxsplit.timed import TimedModel

_SAY_EVERY_BYTES = 64 << 20
_GOOD = 1.01  # rounds end when a cut is within this factor of the best one by its measured times
_SLACK = 2.0  # optimisation may move the stages' answers this many times further than the whole model's


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
        self._target = partitioner.target
        self._folder = folder
        self._say = say
        self._plain: Mapping[str, Array] = {}
        self._proof: tuple[tuple[int, ...], int] | None = None  # times of the ops, and what no cut is below with them
        self._proving_s = 0.0

    @property
    def _subject(self) -> Subject:
        """The model, with what is known of narrow borders by now."""
        return self._partitioner.subject

    def make(self, budget: TimeBudget) -> PlanningResult:
        """Cut, run and correct until the time is used up, and build the plan of the best cut.

        The optimisation levels of the stages are chosen for the first cut and kept, because they change the times.

        Raises:
            PartitionError: there is no cut that keeps every limit, or a file cannot be written.
            ModelError: a stage does not run.
        """
        op_ns = self._subject.costs.time_ns
        if self._subject.costs.source != "measured" or not budget.rounds:
            result = self._partitioner(op_ns)
            return self._finished(self._write("round0", result, op_ns), result.bound, (), None)
        with ExitStack() as stack:
            whole = stack.enter_context(WholeSessions(self._subject, self._target.reference, self._say))
            best, history = self._best_of_rounds(whole, budget)
            best = self._faithful(best, whole, budget)
            sessions = whole.times(sum(map(len, best.result.partition.devices)), budget)
        if self._proof is None or self._proof[0] != best.op_ns:
            self._proven(best)
        assert self._proof is not None
        return self._finished(best, self._proof[1], history, sessions)

    def _best_of_rounds(
        self, whole: WholeSessions, budget: TimeBudget
    ) -> tuple[CandidateCut, tuple[CorrectionRound, ...]]:
        op_ns = self._subject.costs.time_ns
        result = self._partitioner(op_ns, quick=True)
        best: CandidateCut | None = None
        history: list[CorrectionRound] = []
        levels: tuple[Level, ...] | None = None
        seen: set[Partition] = set()
        slow = self._subject.costs.whole_ns > SLOW_S * 1e9
        rounds = budget.slow_rounds if slow else budget.rounds
        for number in range(rounds):
            seen.add(result.partition)
            cut = self._write(f"round{number}", result, op_ns)
            if levels is None or len(levels) != len(cut.parts):
                levels = self._levels(cut, budget)
            cut = self._measure(replace(cut, levels=levels), whole, budget)
            assert cut.measured_ns is not None
            history.append(
                CorrectionRound(predicted_ns=result.score.compute_ns, measured_ns=cut.times_on_devices(self._target))
            )
            worse = best if best is None or cut.score.rank < best.score.rank else cut
            best = cut if worse is best else best
            if worse is not None:
                shutil.rmtree(worse.folder)
            better = self._better(cut, seen, budget) if number + 1 < rounds else None
            if better is None:
                break
            result, op_ns = better, cut.op_ns
        assert best is not None
        return best, tuple(history)

    def _better(self, cut: CandidateCut, seen: Collection[Partition], budget: TimeBudget) -> SearchResult | None:
        """A cut to try next, which is better by the times that were measured for this one; None if there is none.

        A short search comes first. If it finds none, a long one looks for one too while it proves the bound.
        """
        for search in (partial(self._partitioner, cut.op_ns, quick=True), partial(self._proven, cut)):
            found = search()
            if found.partition not in seen and cut.score.value > _GOOD * found.score.value:
                return found
            if self._proving_s > budget.search_s / 2:
                break
        return None

    def _proven(self, cut: CandidateCut) -> SearchResult:
        """Search with the times that were measured for a cut, and keep the bound."""
        began = time.monotonic()
        found = self._partitioner(cut.op_ns)
        self._proving_s += time.monotonic() - began
        self._proof = cut.op_ns, found.bound
        return found

    def _finished(
        self, cut: CandidateCut, bound: int, history: tuple[CorrectionRound, ...], sessions: SessionTimes | None
    ) -> PlanningResult:
        if self._folder is not None:
            for file in cut.folder.iterdir():
                file.rename(self._folder / file.name)
            cut.folder.rmdir()
        plan = PlanBuilder(self._partitioner, self._folder).plan(cut, bound, history, sessions)
        return PlanningResult(plan, self._subject, cut.result.partition, cut.op_ns)

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
        cut = CandidateCut(
            result=result,
            parts=parts,
            files=tuple(files),
            folder=folder,
            op_ns=op_ns,
            score=result.score,
            levels=(subject.costs.level,) * len(parts),
        )
        cut, self._partitioner = narrowed(cut, self._partitioner, self._plain_stages(cut), self._say)
        return cut

    def _measure(self, cut: CandidateCut, whole: WholeSessions, budget: TimeBudget) -> CandidateCut:
        """Run all stages at once on real inputs, and correct the costs by the measured times.

        If this host has fewer cores than the stages have threads, only as many stages run at once as there are cores
        for. Otherwise the scheduler would favour some stages at random. The whole model takes turns with them.
        """
        most = max((cut.device(self._target, index).threads for index in range(len(cut.parts))), default=1)
        takes_turns = self._target.cluster is not None or self._cpu_threads > host_cores()
        at_once = max(1, host_cores() // most) if takes_turns else max(1, len(cut.parts))
        with ExitStack() as stack:
            opened = [_opened(stage, feed, stack) for stage, feed in self._fed(cut, stack)]
            workers = [worker for worker, _ in opened]
            cut = replace(cut, levels=tuple(level for _, level in opened))
            self._say(f"running {at_once} of {len(workers)} stages at once")
            groups = [workers[first : first + at_once] for first in range(0, len(workers), at_once)]
            taken = take_samples([*groups, whole.beside_stages()], budget)
            moved = self._moved(cut, workers, stack)
        taken_ns = tuple(time_ns for group in range(len(groups)) for time_ns in taken.typical_ns(group))
        measured = self._on_reference(cut, taken_ns)
        alone = score(self._subject.problem(cut.op_ns), replace(cut.result.partition, devices=((0,),) * len(measured)))
        op_ns = _corrected(cut, alone.compute_ns, without_conversions(cut, self._subject, measured))
        final = score(as_chosen(cut, self._subject).problem(op_ns, self._target), cut.result.partition)
        return replace(
            cut,
            measured_ns=measured,
            op_ns=op_ns,
            score=final,
            interval=taken.interval,
            disturbed=taken.disturbed,
            moved=moved,
        )

    def _moved(self, cut: CandidateCut, workers: Sequence[TimedModel], stack: ExitStack) -> float:
        """How far the answers of these stages are from those of the stages without optimisation, on their provider."""
        stages = self._stage_files(cut)
        if all(level == LOWEST_LEVEL for level in cut.levels):
            return 0.0
        loaded = dict(zip((stage.path for stage in stages), workers, strict=True))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-")))

        def run_stage(stage: StageFile, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            save_npz(scratch / "in.npz", inputs)
            loaded[stage.path].feed(scratch / "in.npz")
            loaded[stage.path].run(0.0)
            loaded[stage.path].save_outputs(scratch / "out.npz")
            return load_npz(scratch / "out.npz")

        answers = run_chain(stages, self._subject.inputs, self._computed, run_stage)
        if any(stage.provider != "cpu" for stage in stages):
            return answers_apart(answers, self._answers(cut, [LOWEST_LEVEL] * len(stages)))
        return answers_apart(answers, self._plain)

    @property
    def _computed(self) -> list[str]:
        """The outputs that an op computes."""
        graph = self._subject.graph
        return [name for name in graph.outputs if name not in graph.constants]

    @property
    def _cpu_threads(self) -> int:
        return sum(threads_on_cores(device.provider, device.threads) for device in self._target.devices)

    def _on_reference(self, cut: CandidateCut, times_ns: Sequence[int]) -> tuple[int, ...]:
        """The times of stages on a device of speed 1: what they took here, times the speed of their provider here."""
        speeds = (self._target.speed_here(stage.provider) for stage in self._stage_files(cut))
        return tuple(round(time_ns * speed) for time_ns, speed in zip(times_ns, speeds, strict=True))

    def _provider_here(self, device: Device) -> str:
        """The provider that a stage is measured on: its device's, or the CPU if this host lacks that."""
        return device.provider if self._target.cluster is None else provider_here(device.provider)

    def _levels(self, cut: CandidateCut, budget: TimeBudget) -> tuple[Level, ...]:
        """The optimisation level of each stage: that of the whole model, or the one at which the stage is fastest."""
        if not budget.stage_levels:
            return (self._subject.costs.level,) * len(cut.parts)
        levels: list[Level] = []
        with ExitStack() as stack:
            for index, (stage, feed) in enumerate(self._fed(cut, stack)):
                self._say(f"choosing the optimisation level of stage {index} of {len(cut.parts)}")
                fastest = best_level(
                    stage.path,
                    feed,
                    threads=stage.threads,
                    provider=stage.provider,
                    budget=budget,
                    custom_ops=stage.custom_ops,
                    in_place=stage.in_place,
                )
                levels.append(fastest.level)
        return tuple(levels)

    def _faithful(self, cut: CandidateCut, whole: WholeSessions, budget: TimeBudget) -> CandidateCut:
        """The cut with lower optimisation levels for stages whose optimisation moves the model's answers too far.

        ONNX Runtime may fuse the ops of a stage differently from those of the whole model, and some fused kernels
        round more. The answers may move twice as far as optimisation moves the whole model's.
        """
        subject, levels = self._subject, list(cut.levels)
        rounding = tolerance(computed_types(subject.graph, subject.shapes))
        allowed = max(rounding, _SLACK * subject.costs.moved, rounding_of_borders(cut, subject))
        if allowed >= MOST_MOVED or cut.moved <= allowed:
            return cut
        self._say("comparing the answers of the optimised stages")
        plain = self._answers(cut, [LOWEST_LEVEL] * len(levels))
        while answers_apart(self._answers(cut, levels), plain) > allowed:
            optimised = [index for index, level in enumerate(levels) if level != LOWEST_LEVEL]
            if not optimised:
                break
            alone = {i: [levels[i] if i == j else LOWEST_LEVEL for j in range(len(levels))] for i in optimised}
            worst = max(optimised, key=lambda index: answers_apart(self._answers(cut, alone[index]), plain))
            levels[worst] = LOWEST_LEVEL
        return cut if tuple(levels) == cut.levels else self._measure(replace(cut, levels=tuple(levels)), whole, budget)

    def _answers(self, cut: CandidateCut, levels: Sequence[Level]) -> dict[str, Array]:
        """The model's outputs, computed by the stages at these levels."""
        stages = [replace(stage, level=level) for stage, level in zip(self._stage_files(cut), levels, strict=True)]
        with StageProcesses(keep=False) as run_stage:
            return run_chain(stages, self._subject.inputs, self._computed, run_stage)

    def _fed(self, cut: CandidateCut, stack: ExitStack) -> list[tuple[StageFile, Path]]:
        """Every stage with a file of the inputs that earlier stages computed; the stack removes the files.

        The stages run without optimisation on the CPU for that, and the answers of the model are kept.
        """
        stages = self._stage_files(cut)
        plain = self._plain_stages(cut)
        borders = {name for stage in stages for name in stage.inputs}
        with StageProcesses(keep=False) as run_stage:
            values = run_chain(plain, self._subject.inputs, borders.union(self._computed), run_stage)
        self._plain = {name: values[name] for name in self._computed}
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-")))
        feeds = [scratch / f"{index}.npz" for index in range(len(stages))]
        for stage, feed in zip(stages, feeds, strict=True):
            save_npz(feed, {name: values[name] for name in stage.inputs})
        return list(zip(stages, feeds, strict=True))

    def _plain_stages(self, cut: CandidateCut) -> list[StageFile]:
        """The stages without optimisation, on the CPU."""
        return [replace(stage, level=LOWEST_LEVEL, provider="cpu") for stage in self._stage_files(cut)]

    def _stage_files(self, cut: CandidateCut) -> list[StageFile]:
        """The stage files and how this host opens them for measurements."""
        devices = [cut.device(self._target, index) for index in range(len(cut.parts))]
        decoding = self._subject.decoding
        in_place = decoding.decoder.in_place if decoding is not None and decoding.step.rows else ()
        return [
            StageFile(
                path=cut.folder / stage_file(index),
                inputs=cut.inputs(index),
                outputs=cut.outputs(index),
                threads=device.threads,
                level=level,
                provider=self._provider_here(device),
                custom_ops=self._subject.libraries(part.ops),
                in_place=tuple(pair for pair in in_place if pair[0] in part.outputs),
            )
            for index, (part, device, level) in enumerate(zip(cut.parts, devices, cut.levels, strict=True))
        ]


def _opened(stage: StageFile, feed: Path, stack: ExitStack) -> tuple[TimedModel, Level]:
    """A stage in a process of its own, at its level or the next lower one at which ONNX Runtime loads it.

    Raises:
        ModelRefused: ONNX Runtime refuses the stage at every level.
    """
    levels = CANDIDATE_LEVELS[CANDIDATE_LEVELS.index(stage.level) :] if stage.level in CANDIDATE_LEVELS else ()
    for level in levels:
        with suppress(ModelRefused):
            return stack.enter_context(replace(stage, level=level).timed(feed)), level
    return stack.enter_context(stage.timed(feed)), stage.level


def _corrected(cut: CandidateCut, expected: Sequence[int], measured: Sequence[int]) -> tuple[int, ...]:
    """Scale the times of the ops of each stage so that their sum is the measured time of the stage."""
    corrected = list(cut.op_ns)
    for part, predicted, actual in zip(cut.parts, expected, measured, strict=True):
        for op in part.ops if predicted else ():
            corrected[op] = cut.op_ns[op] * actual // predicted
    return tuple(corrected)
