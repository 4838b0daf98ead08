"""From a model to a plan directory: the offline half, end to end.

    examine -> partition -> stage files -> measure -> correct, and cut again -> plan

A plan directory appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec.structs

import onnxsplit
from onnxsplit.cost.measured import best_level
from onnxsplit.cut_at import assignment_at
from onnxsplit.errors import PartitionError, PlanError
from onnxsplit.examine import Say, Subject, examine, silent
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
from onnxsplit.partitioner import Assignment, Infeasible, Score, fewest_stages, lower_bound, score, slice_orders
from onnxsplit.plan import (
    FORMAT_VERSION,
    PLAN_FILE,
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
from onnxsplit.session import gpu_count, host_cores, providers_by_stage, runtime_version, threads_per_node
from onnxsplit.tensors import Array, load_npz, save_npz
from onnxsplit.timed import TimedModel, median_ns, run_together

EXAMPLE_FILE = "example.npz"
DEFAULT_ROUNDS = 3

_SAY_EVERY_BYTES = 64 << 20
_BALANCED = 1.02  # a bottleneck this close to the mean is not worth another round
_STAGE_SECONDS = 0.8  # of all stages running at once, per round


def partition(
    model: str | Path,
    *,
    stages: int | Literal["auto"] | None = None,
    out: str | Path | None = None,
    cut_at: Sequence[str] = (),
    max_memory: int | None = None,
    costs: str | None = None,
    dims: Mapping[str, int] | None = None,
    inputs: str | Path | Mapping[str, Array] | None = None,
    provider: str = "auto",
    rounds: int = DEFAULT_ROUNDS,
    say: Say = silent,
) -> Plan:
    """Cut a model into cost-balanced stages and write the plan directory.

    Args:
        model: the model file.
        stages: number of stages; ``auto`` for the fewest that fit ``max_memory``; the GPUs found, else 2, when None.
        out: the plan directory; ``MODEL.plan`` in the current folder when None. A plan there is replaced whole.
        cut_at: tensors to cut exactly at, instead of choosing.
        max_memory: bytes that no stage may exceed, by estimate: its weights and its largest sum of live activations.
        costs: ``measured`` or ``analytic``; None measures where the model runs here.
        dims: sizes of free dimensions that costs are taken at; the plan runs at any.
        inputs: example inputs, or an ``.npz`` with them.
        provider: as ``--provider``: one for all, ``auto``, or by stage.
        rounds: how often, at most, the real stages are run and the cut is corrected; 0 for never.
        say: told what is being done.

    Raises:
        PartitionError: the model cannot be cut as asked.
        PlanError: ``out`` is something other than a plan.
        ModelError, InputError, MissingDependency, ProviderError: as :func:`~onnxsplit.examine.examine`.
    """
    target = Path(out) if out is not None else default_target(Path(model))
    check_target(target)
    _check_request(stages, cut_at, max_memory)
    guess = stages if isinstance(stages, int) else gpu_count() or 2
    first = providers_by_stage(provider, guess)[0]
    threads = threads_per_node(guess)
    subject = examine(model, costs=costs, dims=dims, inputs=inputs, threads=threads, provider=first, say=say)
    return write_plan(
        subject, target, stages=stages, cut_at=cut_at, max_memory=max_memory, provider=provider, rounds=rounds, say=say
    )


def write_plan(
    subject: Subject,
    target: Path,
    *,
    stages: int | Literal["auto"] | None = None,
    cut_at: Sequence[str] = (),
    max_memory: int | None = None,
    provider: str = "auto",
    rounds: int = DEFAULT_ROUNDS,
    say: Say = silent,
) -> Plan:
    """Cut a model that was examined. The arguments are those of :func:`partition`."""
    check_target(target)
    _check_request(stages, cut_at, max_memory)
    choose, count = _chooser(subject, stages, cut_at, max_memory)
    providers = providers_by_stage(provider, count)
    with _new_folder(target) as folder:
        plan = _Draft(subject, choose, providers, threads_per_node(count), folder, say).plan(rounds)
        (folder / PLAN_FILE).write_bytes(plan.to_json())
    return plan


Chooser = Callable[[Sequence[int]], Assignment]
"""Times of the ops -> atoms to stages."""


def _check_request(stages: int | str | None, cut_at: Sequence[str], max_memory: int | None) -> None:
    if isinstance(stages, int) and stages < 1:
        raise PartitionError(f"{stages} stages were asked for; at least 1 is needed")
    if stages == "auto" and max_memory is None:
        raise PartitionError("the fewest stages that fit need a limit: give --max-memory SIZE with --stages auto")
    if cut_at and (stages is not None or max_memory is not None):
        raise PartitionError("--cut-at decides the stages; leave out --stages and --max-memory")


def _chooser(
    subject: Subject, stages: int | str | None, cut_at: Sequence[str], max_memory: int | None
) -> tuple[Chooser, int]:
    """How to assign atoms, and the number of stages that comes out."""
    if cut_at:
        fixed = assignment_at(subject, cut_at)
        return (lambda _: fixed), max(fixed) + 1
    largest = len(subject.atoms.ops)
    try:
        count = (
            fewest_stages(subject.problem(subject.costs.time_ns, max_memory))
            if stages == "auto"
            else int(stages)
            if stages is not None
            else min(gpu_count() or 2, largest)
        )
        if count > largest:
            raise PartitionError(
                f"{subject.graph.source.path} cannot be cut into {count} stages: its {len(subject.graph.ops)} ops form "
                f"{largest} parts that can be separated. Ask for {largest} stages or fewer"
            )
        slice_orders(subject.problem(subject.costs.time_ns, max_memory), count)
    except Infeasible:
        raise PartitionError(_too_little_memory(subject, max_memory or 0)) from None
    return (lambda op_ns: slice_orders(subject.problem(op_ns, max_memory), count)), count


def _too_little_memory(subject: Subject, max_memory: int) -> str:
    graph = subject.graph
    problem = subject.problem(subject.costs.time_ns)
    alone = [
        sum(weight.size_bytes for weight in problem.weights if atom in weight.readers)
        for atom in range(len(problem.time_ns))
    ]
    atom = max(range(len(alone)), key=alone.__getitem__)
    name = graph.ops[subject.atoms.ops[atom][0]].name
    try:
        fits = f"The fewest stages that fit are {fewest_stages(subject.problem(subject.costs.time_ns, max_memory))}"
    except Infeasible:
        fits = f"Allow more: op {name!r} alone holds {alone[atom]} bytes of weights, besides its tensors"
    return f"no cut keeps every stage within {max_memory} bytes. {fits}"


def default_target(model: Path) -> Path:
    """Where the plan of a model goes when nothing is said: ``MODEL.plan`` in the current folder."""
    return Path(f"{model.name.removesuffix('.onnx')}.plan")


def check_target(target: Path) -> None:
    """Refuse to write a plan over anything but a plan or an empty folder.

    Raises:
        PlanError: naming what is there.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise PlanError(f"{target} is there and is no folder; choose another place with -o DIR")
    if target.is_dir() and any(target.iterdir()) and not (target / PLAN_FILE).is_file():
        raise PlanError(f"{target} is there and holds no plan; nothing was touched. Choose another place with -o DIR")
    if not target.absolute().parent.is_dir():
        raise PlanError(
            f"the folder {target.absolute().parent} does not exist; create it or choose another with -o DIR"
        )


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the target's place when all went well, and leaves no trace when not."""
    target = target.absolute()
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise PlanError(f"cannot write into {target.parent}: {error.strerror}") from error
    try:
        yield folder
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)
        old = folder.with_suffix(".old")
        if target.is_dir():
            target.rename(old)
        folder.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise PlanError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


class _Draft:
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

    def _contended(self, op_ns: tuple[int, ...]) -> tuple[int, ...]:
        """Times with all stages at work: more threads than this host has cores take turns."""
        on_cpu = sum(self._threads for provider in self._providers if provider == "cpu")
        cores = host_cores()
        return op_ns if on_cpu <= cores else tuple(time_ns * on_cpu // cores for time_ns in op_ns)

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
        """Run all stages at once, each on what the stages before really give, and make the costs agree."""
        threads = self._threads
        with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="onnxsplit-") as scratch:
            feeds = self._feeds(cut, Path(scratch))
            workers = [
                stack.enter_context(
                    TimedModel(model, feed, threads=threads, level=cut.levels[index], provider=self._providers[index])
                )
                for index, (model, feed) in enumerate(feeds)
            ]
            self._say("running all stages at once")
            run_together(workers, _STAGE_SECONDS / 4)
            times = run_together(workers, _STAGE_SECONDS, least=3)
        measured = tuple(median_ns(run) for run in times)
        return replace(cut, measured_ns=measured, op_ns=_corrected(cut, measured))

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


def _corrected(cut: _Cut, measured: Sequence[int]) -> tuple[int, ...]:
    """Scale the ops of every stage so that together they take what the stage took."""
    corrected = list(cut.op_ns)
    for part, predicted, found in zip(cut.parts, cut.score.compute_ns, measured, strict=True):
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
