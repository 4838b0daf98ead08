"""A plan in the making: stage files written, run, measured, corrected, described."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from onnxsplit.cluster import Device
from onnxsplit.cost.measured import LOWEST_LEVEL, MOST_MOVED, answers_apart, best_level
from onnxsplit.model.precision import computed_types, tolerance
from onnxsplit.npz import load_npz, save_npz
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
from onnxsplit.stages.extract import stage_parts, weight_bytes, write_stage
from onnxsplit.tensors import Array
from onnxsplit.timed import TimedModel, median_ns, run_together

_SAY_EVERY_BYTES = 64 << 20
_GOOD = 1.02  # a cut this close to the best by its own measured times is not worth another round
_SLACK = 2.0  # a stage's answers may move twice as far as optimisation moves the whole model's
_STAGE_SECONDS = 0.8  # of all stages running at once, per round


class _BytesWritten:
    """Says how far writing has come, every so many bytes."""

    def __init__(self, what: str, total: int, say: Say) -> None:
        self._what, self._total, self._say = what, total, say
        self._done, self._said = 0, 0
        say(what)

    def __call__(self, size_bytes: int) -> None:
        """Take note of more bytes."""
        self._done += size_bytes
        if self._done - self._said >= _SAY_EVERY_BYTES:
            self._said = self._done
            self._say(f"{self._what}: {self._done >> 20} of {self._total >> 20} MiB")


class Rounds:
    """A plan in the making: cuts, writes, measures, corrects, and keeps the best cut it has seen.

    Without a folder it writes nothing, and the plan names no files.
    """

    def __init__(self, partitioner: ModelPartitioner, folder: Path | None, say: Say) -> None:
        self._partitioner = partitioner
        self._subject: Subject = partitioner.subject
        self._target = partitioner.target
        self._folder = folder
        self._say = say

    def make(self, rounds: int) -> PlanningResult:
        """Cut, run and correct up to ``rounds`` times, and describe the best cut.

        The stages' optimisation levels are chosen for the first cut and kept: they change what stages take.
        """
        op_ns = self._contended(self._subject.costs.time_ns)
        if self._subject.costs.source != "measured" or not rounds:
            found = self._partitioner(op_ns)
            return self._finished(self._write("round0", found, op_ns), found.bound, ())
        found = self._partitioner(op_ns, quick=True)
        best: CandidateCut | None = None
        history: list[CorrectionRound] = []
        levels: tuple[Level, ...] | None = None
        seen: set[Partition] = set()
        for number in range(rounds):
            seen.add(found.partition)
            cut = self._write(f"round{number}", found, op_ns)
            if levels is None or len(levels) != len(cut.parts):
                levels = self._best_levels(cut)
            cut = self._measure(replace(cut, levels=levels))
            assert cut.measured_ns is not None
            history.append(
                CorrectionRound(predicted_ns=found.score.compute_ns, measured_ns=cut.times_on_devices(self._target))
            )
            op_ns = cut.op_ns
            loser = best if best is None or cut.score.rank < best.score.rank else cut
            best = cut if loser is best else best
            if loser is not None:
                shutil.rmtree(loser.folder)
            found = self._partitioner(op_ns, quick=True)
            if found.partition in seen or cut.score.value <= _GOOD * found.score.value:
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
        return PlanningResult(plan, self._subject, cut.found.partition, cut.op_ns)

    def _contended(self, times_ns: tuple[int, ...]) -> tuple[int, ...]:
        """Times with all devices of this host at work: more threads than it has cores take turns.

        Devices of a cluster are what their speeds say.
        """
        share = host_cores() if self._target.cluster is not None else max(self._cpu_threads, host_cores())
        return tuple(time_ns * share // host_cores() for time_ns in times_ns)

    @property
    def _cpu_threads(self) -> int:
        return sum(device.threads for device in self._target.devices if device.provider == "cpu")

    def _write(self, name: str, found: SearchResult, op_ns: tuple[int, ...]) -> CandidateCut:
        subject = self._subject
        folder = (self._folder or Path()) / name
        if self._folder is not None:
            folder.mkdir()
        parts = stage_parts(subject.graph, subject.atoms, found.partition.stage_of)
        files = []
        for index, part in enumerate(parts if self._folder is not None else ()):
            progress = _BytesWritten(
                f"writing stage {index} of {len(parts)}", weight_bytes(subject.graph, part), self._say
            )
            files.append(write_stage(subject.graph, subject.shapes, part, folder, stage_file(index), wrote=progress))
        return CandidateCut(
            found=found,
            parts=parts,
            files=tuple(files),
            folder=folder,
            op_ns=op_ns,
            score=found.score,
            levels=(subject.costs.level,) * len(parts),
        )

    def _measure(self, cut: CandidateCut) -> CandidateCut:
        """Run all stages at once, each on what the stages before really give, and make the costs agree.

        Where this host has fewer cores than the stages have threads, as many run at once as there are cores for, and
        times are scaled to what taking turns costs: which stage the scheduler favours in a second says nothing.
        """
        devices = [cut.device(self._target, index) for index in range(len(cut.parts))]
        most = max((device.threads for device in devices), default=1)
        crowded = self._target.cluster is not None or self._cpu_threads > host_cores()
        at_once = max(1, host_cores() // most) if crowded else max(1, len(cut.parts))
        with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
            feeds = self._feeds(cut, Path(scratch))
            workers = [
                stack.enter_context(
                    TimedModel(
                        model,
                        feed,
                        threads=devices[index].threads,
                        level=cut.levels[index],
                        provider=self._provider_here(devices[index]),
                        custom_ops=self._subject.libraries(cut.parts[index].ops),
                    )
                )
                for index, (model, feed) in enumerate(feeds)
            ]
            self._say(f"running {at_once} of {len(workers)} stages at once")
            times: list[list[int]] = []
            for first in range(0, len(workers), at_once):
                group = workers[first : first + at_once]
                run_together(group, _STAGE_SECONDS / 4)
                times += run_together(group, _STAGE_SECONDS, least=3)
        measured = self._contended(tuple(median_ns(run) for run in times))
        alone = score(self._subject.problem(cut.op_ns), replace(cut.found.partition, devices=((0,),) * len(times)))
        op_ns = _corrected(cut, alone.compute_ns, measured)
        final = score(self._subject.problem(op_ns, self._target), cut.found.partition)
        return replace(cut, measured_ns=measured, op_ns=op_ns, score=final)

    def _provider_here(self, device: Device) -> str:
        """What a stage is measured on: its device's provider, or the CPU where this host lacks that."""
        return device.provider if self._target.cluster is None else provider_here(device.provider)

    def _best_levels(self, cut: CandidateCut) -> tuple[Level, ...]:
        """The optimisation level at which each stage runs fastest."""
        levels: list[Level] = []
        with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
            for index, (model, feed) in enumerate(self._feeds(cut, Path(scratch))):
                self._say(f"choosing the optimisation level of stage {index} of {len(cut.parts)}")
                device = cut.device(self._target, index)
                chosen = best_level(
                    model,
                    feed,
                    threads=device.threads,
                    provider=self._provider_here(device),
                    custom_ops=self._subject.libraries(cut.parts[index].ops),
                )
                levels.append(chosen.level)
        return tuple(levels)

    def _faithful(self, cut: CandidateCut) -> CandidateCut:
        """The cut at levels at which the model's answers are its own: stages that move them most go to the lowest.

        ONNX Runtime may fuse the ops of a stage in ways in which it does not fuse the whole model, and some fused
        kernels round more. The answers may move twice as far as optimisation moves the whole model's.
        """
        subject, levels = self._subject, list(cut.levels)
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
        """What the stages give for the model's outputs, each at its level."""
        values = dict(self._subject.inputs)
        with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
            feed, outputs = Path(scratch) / "in.npz", Path(scratch) / "out.npz"
            for index, part in enumerate(cut.parts):
                save_npz(feed, {name: values[name] for name in part.inputs})
                device = cut.device(self._target, index)
                with TimedModel(
                    cut.folder / stage_file(index),
                    feed,
                    threads=device.threads,
                    level=levels[index],
                    provider=self._provider_here(device),
                    custom_ops=self._subject.libraries(part.ops),
                ) as model:
                    model.run(0.0)
                    model.save_outputs(outputs)
                values.update(load_npz(outputs))
        return {name: values[name] for name in self._subject.graph.outputs if name in values}

    def _feeds(self, cut: CandidateCut, scratch: Path) -> list[tuple[Path, Path]]:
        """Every stage's file, and its inputs as the stages before it give them."""
        values = dict(self._subject.inputs)
        feeds = []
        for index, part in enumerate(cut.parts):
            model, feed = cut.folder / stage_file(index), scratch / f"{index}.npz"
            save_npz(feed, {name: values[name] for name in part.inputs})
            if set(part.outputs) & {name for later in cut.parts[index + 1 :] for name in later.inputs}:
                outputs = scratch / "outputs.npz"
                with TimedModel(
                    model,
                    feed,
                    threads=cut.device(self._target, index).threads,
                    level="basic",
                    custom_ops=self._subject.libraries(part.ops),
                ) as once:
                    once.run(0.0)
                    once.save_outputs(outputs)
                values.update(load_npz(outputs))
            feeds.append((model, feed))
        return feeds


def _corrected(cut: CandidateCut, expected: Sequence[int], measured: Sequence[int]) -> tuple[int, ...]:
    """Scale the ops of every stage so that together they take what the stage took."""
    corrected = list(cut.op_ns)
    for part, predicted, found in zip(cut.parts, expected, measured, strict=True):
        for op in part.ops if predicted else ():
            corrected[op] = cut.op_ns[op] * found // predicted
    return tuple(corrected)
