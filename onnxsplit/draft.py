"""A plan in the making: stage files written, run, measured, corrected, described."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec.structs

import onnxsplit
from onnxsplit.cost.measured import best_level
from onnxsplit.examine import Say, Subject
from onnxsplit.extract import (
    StageParts,
    file_entry,
    peak_memory_bytes,
    stage_parts,
    weight_bytes,
    whole_parts,
    write_constant,
    write_stage,
)
from onnxsplit.partitioner import Assignment, Score, lower_bound, score
from onnxsplit.plan import (
    FORMAT_VERSION,
    CorrectionRound,
    Costs,
    CreatedWith,
    Cut,
    FileEntry,
    Level,
    ModelInfo,
    Passthrough,
    Plan,
    Prediction,
    Stage,
)
from onnxsplit.providers import runtime_version
from onnxsplit.session import host_cores
from onnxsplit.tensors import load_npz, save_npz
from onnxsplit.timed import TimedModel, median_ns, run_together

EXAMPLE_FILE = "example.npz"

_SAY_EVERY_BYTES = 64 << 20
_BALANCED = 1.02  # a bottleneck this close to the mean is not worth another round
_STAGE_SECONDS = 0.8  # of all stages running at once, per round

Chooser = Callable[[Sequence[int]], Assignment]
"""Times of the ops -> atoms to stages."""


@dataclass(frozen=True)
class _Cut:
    """A cut with its stage files written, and what is known of it.

    Attributes:
        assignment: atoms to stages.
        parts: by stage.
        files: by stage.
        folder: where the files are.
        score: by the costs the cut was made with.
        op_ns: those costs; after measuring, the ones that agree with the measurement.
        levels: optimisation level by stage.
        measured_ns: by stage, all running at once; None when they were not run.
    """

    assignment: Assignment
    parts: tuple[StageParts, ...]
    files: tuple[tuple[FileEntry, ...], ...]
    folder: Path
    score: Score
    op_ns: tuple[int, ...]
    levels: tuple[Level, ...]
    measured_ns: tuple[int, ...] | None = None

    @property
    def bottleneck_ns(self) -> int:
        """The slowest stage with its transfers; of measured times where there are any."""
        compute = self.measured_ns if self.measured_ns is not None else self.score.compute_ns
        return max((c + t for c, t in zip(compute, self.score.transfer_ns, strict=True)), default=0)

    @property
    def balanced(self) -> bool:
        """True when stages were measured and the slowest is close to their mean."""
        times = self.measured_ns or ()
        return bool(times) and max(times) * len(times) <= _BALANCED * sum(times)


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


class Draft:
    """A plan in the making: cuts, writes, measures, corrects, and keeps the best cut it has seen."""

    def __init__(
        self, subject: Subject, choose: Chooser, providers: Sequence[str], threads: int, folder: Path, say: Say
    ) -> None:
        self._subject = subject
        self._choose = choose
        self._providers = tuple(providers)
        self._threads = threads
        self._folder = folder
        self._say = say

    def plan(self, rounds: int) -> Plan:
        """Cut, run and correct up to ``rounds`` times, choose the stages' levels, and describe the best cut."""
        measuring = self._subject.costs.source == "measured" and rounds > 0
        op_ns = self._contended(self._subject.costs.time_ns)
        best: _Cut | None = None
        history: list[CorrectionRound] = []
        seen: set[Assignment] = set()
        for number in range(rounds if measuring else 1):
            assignment = self._choose(op_ns)
            if assignment in seen:
                break
            seen.add(assignment)
            cut = self._write(self._folder / f"round{number}", assignment, op_ns)
            if measuring:
                cut = self._measure(cut)
                assert cut.measured_ns is not None
                history.append(CorrectionRound(predicted_ns=cut.score.compute_ns, measured_ns=cut.measured_ns))
                op_ns = cut.op_ns
            loser = best if best is None or cut.bottleneck_ns < best.bottleneck_ns else cut
            best = cut if loser is best else best
            if loser is not None:
                shutil.rmtree(loser.folder)
            if best is not None and best.balanced:
                break
        assert best is not None
        if measuring:
            best = self._measure(self._with_levels(best))
        for file in best.folder.iterdir():
            file.rename(self._folder / file.name)
        best.folder.rmdir()
        return self._describe(best, tuple(history))

    def _contended(self, times_ns: tuple[int, ...]) -> tuple[int, ...]:
        """Times with all stages at work: more threads than this host has cores take turns."""
        share = max(self._cpu_threads, host_cores())
        return tuple(time_ns * share // host_cores() for time_ns in times_ns)

    @property
    def _cpu_threads(self) -> int:
        return sum(self._threads for provider in self._providers if provider == "cpu")

    def _write(self, folder: Path, assignment: Assignment, op_ns: tuple[int, ...]) -> _Cut:
        folder.mkdir()
        subject = self._subject
        parts = stage_parts(subject.graph, subject.atoms, assignment)
        files = []
        for index, part in enumerate(parts):
            progress = _BytesWritten(
                f"writing stage {index} of {len(parts)}", weight_bytes(subject.graph, part), self._say
            )
            files.append(write_stage(subject.graph, subject.shapes, part, folder, f"stage{index}.onnx", wrote=progress))
        return _Cut(
            assignment=assignment,
            parts=parts,
            files=tuple(files),
            folder=folder,
            score=score(subject.problem(op_ns), assignment),
            op_ns=op_ns,
            levels=(subject.costs.level,) * len(parts),
        )

    def _measure(self, cut: _Cut) -> _Cut:
        """Run all stages at once, each on what the stages before really give, and make the costs agree.

        Where this host has fewer cores than the stages have threads, as many run at once as there are cores for, and
        times are scaled to what taking turns costs: which stage the scheduler favours in a second says nothing.
        """
        threads = self._threads
        at_once = len(cut.parts) if self._cpu_threads <= host_cores() else max(1, host_cores() // threads)
        with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
            feeds = self._feeds(cut, Path(scratch))
            workers = [
                stack.enter_context(
                    TimedModel(model, feed, threads=threads, level=cut.levels[index], provider=self._providers[index])
                )
                for index, (model, feed) in enumerate(feeds)
            ]
            self._say(f"running {at_once} stages at once")
            times: list[list[int]] = []
            for first in range(0, len(workers), at_once):
                group = workers[first : first + at_once]
                run_together(group, _STAGE_SECONDS / 4)
                times += run_together(group, _STAGE_SECONDS, least=3)
        measured = self._contended(tuple(median_ns(run) for run in times))
        expected = score(self._subject.problem(cut.op_ns), cut.assignment).compute_ns
        return replace(cut, measured_ns=measured, op_ns=_corrected(cut, expected, measured))

    def _with_levels(self, cut: _Cut) -> _Cut:
        """Give each stage the optimisation level at which it runs fastest."""
        levels: list[Level] = []
        with tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
            for index, (model, feed) in enumerate(self._feeds(cut, Path(scratch))):
                self._say(f"choosing the optimisation level of stage {index} of {len(cut.parts)}")
                level, _ = best_level(model, feed, threads=self._threads, provider=self._providers[index])
                levels.append(level)
        return replace(cut, levels=tuple(levels))

    def _feeds(self, cut: _Cut, scratch: Path) -> list[tuple[Path, Path]]:
        """Every stage's file, and its inputs as the stages before it give them."""
        values = dict(self._subject.inputs)
        feeds = []
        for index, part in enumerate(cut.parts):
            model, feed = cut.folder / cut.files[index][0].name, scratch / f"{index}.npz"
            save_npz(feed, {name: values[name] for name in part.inputs})
            if set(part.outputs) & {name for later in cut.parts[index + 1 :] for name in later.inputs}:
                outputs = scratch / "outputs.npz"
                with TimedModel(model, feed, threads=self._threads, level="basic") as once:
                    once.run(0.0)
                    once.save_outputs(outputs)
                values.update(load_npz(outputs))
            feeds.append((model, feed))
        return feeds

    def _describe(self, cut: _Cut, history: tuple[CorrectionRound, ...]) -> Plan:
        subject, graph, shapes = self._subject, self._subject.graph, self._subject.shapes
        problem = subject.problem(cut.op_ns)
        final = score(problem, cut.assignment)
        count = len(cut.parts)
        bound = lower_bound(problem.time_ns, count)
        whole = whole_parts(graph)
        save_npz(self._folder / EXAMPLE_FILE, subject.inputs)
        on_border = {name for part in cut.parts for name in (*part.inputs, *part.outputs)}
        source = graph.source.proto
        plan = Plan(
            format_version=FORMAT_VERSION,
            created_with=CreatedWith(onnxsplit=onnxsplit.__version__, onnxruntime=runtime_version()),
            model=ModelInfo(
                name=graph.source.path.name,
                sha256=graph.source.sha256,
                ir_version=source.ir_version,
                opsets={entry.domain: entry.version for entry in source.opset_import},
            ),
            strategy="layer",
            parallel="model",
            objective="throughput",
            dims=dict(subject.dims),
            stages=tuple(self._stage(cut, index) for index in range(count)),
            tensors={n: shapes.specs[n] for n in sorted(on_border | {*graph.inputs, *graph.outputs})},
            cuts=_cuts(cut.parts, subject),
            inputs=graph.inputs,
            outputs=graph.outputs,
            passthrough=self._passthrough(),
            outputs_need={},
            prediction=Prediction(
                bottleneck_ns=final.bottleneck_ns,
                throughput_per_s=1e9 / max(1, final.bottleneck_ns),
                latency_ns=final.latency_ns,
                lower_bound_ns=bound,
                gap=final.bottleneck_ns / max(1, bound) - 1,
                op_lower_bound_ns=lower_bound(cut.op_ns, count),
            ),
            costs=Costs(
                source=subject.costs.source,
                whole_time_ns=subject.costs.whole_ns,
                whole_weight_bytes=weight_bytes(graph, whole),
                whole_peak_memory_bytes=peak_memory_bytes(graph, shapes, whole),
                whole_optimization_level=subject.costs.level,
                rounds=history,
                note=subject.note,
            ),
            example_inputs=file_entry(self._folder / EXAMPLE_FILE),
        )
        needs = {name: tuple(sorted(plan.stages_for((name,)))) for name in plan.outputs}
        plan = msgspec.structs.replace(plan, outputs_need=needs)
        problems = plan.check()
        assert not problems, problems
        return plan

    def _stage(self, cut: _Cut, index: int) -> Stage:
        part, subject = cut.parts[index], self._subject
        return Stage(
            index=index,
            file=cut.files[index][0].name,
            files=cut.files[index],
            inputs=part.inputs,
            outputs=part.outputs,
            weight_bytes=weight_bytes(subject.graph, part),
            peak_memory_bytes=peak_memory_bytes(subject.graph, subject.shapes, part),
            provider=self._providers[index],
            optimization_level=cut.levels[index],
            threads=self._threads,
            predicted_time_ns=cut.score.compute_ns[index],
            measured_time_ns=cut.measured_ns[index] if cut.measured_ns is not None else None,
            ops=len(part.ops),
        )

    def _passthrough(self) -> dict[str, Passthrough]:
        graph = self._subject.graph
        found = {}
        for number, name in enumerate(graph.outputs):
            if name in graph.inputs:
                found[name] = Passthrough(input=name)
            elif name in graph.constants:
                found[name] = Passthrough(file=write_constant(graph, name, self._folder, f"constant{number}.npz"))
        return found


def _corrected(cut: _Cut, expected: Sequence[int], measured: Sequence[int]) -> tuple[int, ...]:
    """Scale the ops of every stage so that together they take what the stage took."""
    corrected = list(cut.op_ns)
    for part, predicted, found in zip(cut.parts, expected, measured, strict=True):
        for op in part.ops if predicted else ():
            corrected[op] = cut.op_ns[op] * found // predicted
    return tuple(corrected)


def _cuts(parts: Sequence[StageParts], subject: Subject) -> tuple[Cut, ...]:
    found = []
    for index, part in enumerate(parts):
        for name in part.outputs:
            to = tuple(other for other, reader in enumerate(parts) if name in reader.inputs)
            if to:
                size = subject.shapes.bytes(name)
                found.append(Cut(tensor=name, from_stage=index, to_stages=to, bytes=size))
    return tuple(found)
