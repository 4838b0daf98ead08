"""Costs measured where the model can run.

The model is profiled in a process of its own, at the optimisation level that runs it fastest, with the threads its
stages will have. Ops are given unique names there, so that ONNX Runtime's events find their way back; kernels that
the optimiser renamed are found by the tensor they write, and what it inserted is charged to the next known kernel.
The time of a fused kernel goes to the op in it that has the most work.
One run without optimisation shows every tensor's shape. It does not show types: for an op whose half-precision kernel
is missing, ONNX Runtime runs the float32 kernel between casts, and its profile shows float32. Types that shape
inference does not find come from a session that has these tensors as outputs, since it reports their true types.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec

from onnxsplit.cost import OpCosts
from onnxsplit.cost.analytic import analytic_costs
from onnxsplit.custom_ops import Library
from onnxsplit.errors import InputError, ModelError, ModelRefused
from onnxsplit.model.ends import defaults
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.inputs import dimension_choices, guesses
from onnxsplit.model.opening import ModelFile, runnable
from onnxsplit.model.precision import distance, is_discrete
from onnxsplit.model.shapes import Shapes, bind, infer_shapes, with_formulas
from onnxsplit.npz import load_npz, save_npz
from onnxsplit.plan import Level, TensorSpec
from onnxsplit.session import quiet_environment
from onnxsplit.tensors import TRAVELLING_TYPES, Array
from onnxsplit.timed import TimedModel, median_ns

CANDIDATE_LEVELS: tuple[Level, ...] = ("all", "extended", "basic")
"""Optimisation levels worth trying, the usual best first."""

_ANY_RANK = frozenset(["If", "Loop", "Reshape", "Scan", "SequenceAt", "OptionalGetElement", "Squeeze"])
"""Ops of which the rank of an output may depend on what they are given."""

_LEVEL_SECONDS = 0.3  # of runs per level when choosing one
_PROFILE_SECONDS = 0.6
_CLEARLY = 0.97  # another level must be this much faster to be preferred over the usual best


LOWEST_LEVEL: Level = "basic"
"""The level that others are held against: it keeps the model's ops, and so its answers."""

MOST_MOVED = 0.5
"""What optimisation may move an answer, over its scale: roundings move none as far."""


@dataclass(frozen=True)
class LevelChoice:
    """An optimisation level.

    Attributes:
        level: the level.
        time_ns: what a run takes at it.
        moved: how far the answers at the levels that may be chosen are from the lowest level's, over their scale.
    """

    level: Level
    time_ns: int
    moved: float


@dataclass(frozen=True)
class Example:
    """Inputs the model was seen to run on, and the sizes of its free dimensions in them."""

    inputs: Mapping[str, Array]
    dims: Mapping[str, int]


class ProfileRequest(msgspec.Struct, frozen=True):
    """What the profiling process is told.

    Attributes:
        model: the model file.
        inputs: an ``.npz`` with its inputs.
        threads: threads of the session.
        level: optimisation level; the shapes of tensors are noted at ``disabled`` alone.
        provider: execution provider.
        seconds: how long to run; 0 for a single run.
        untyped: tensors whose types are wanted.
    """

    model: str
    inputs: str
    threads: int
    level: Level
    provider: str
    seconds: float
    untyped: tuple[str, ...] = ()
    data_folder: str | None = None
    custom_ops: tuple[Library, ...] = ()


class Profile(msgspec.Struct, frozen=True):
    """What the profiling process answers.

    Attributes:
        op_ns: by op of the graph, median over the runs.
        sizes: tensor -> shape, only at the level ``disabled``.
        types: tensor -> type, of those tensors of unknown type that are tensors in ONNX Runtime's eyes.
        error: why there is no profile.
    """

    op_ns: list[int] = []
    sizes: dict[str, tuple[int, ...]] = {}
    types: dict[str, str] = {}
    error: str | None = None


def find_example(
    graph: OpGraph,
    specs: Mapping[str, TensorSpec],
    fixed: Mapping[str, int],
    *,
    threads: int,
    provider: str,
    say: Callable[[str], None],
    custom_ops: Sequence[Library] = (),
) -> Example:
    """Make up inputs until the model runs on them; those that have a default are that.

    Raises:
        InputError: it ran on none; carries the first failure.
        ModelError: ONNX Runtime refuses the model.
    """
    failures: list[str] = []
    kept = defaults(graph.source)
    with runnable(graph.source) as source, tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        file = Path(folder) / "inputs.npz"
        model: TimedModel | None = None
        try:
            for dims in dimension_choices(specs, fixed):
                say("trying inputs" + (f" with {_dims_text(dims)}" if dims else ""))
                for inputs in guesses(graph, specs, bind(specs, dims), kept):
                    save_npz(file, inputs)
                    if model is None:
                        model = TimedModel(
                            source.path,
                            file,
                            threads=threads,
                            level="basic",
                            provider=provider,
                            data_folder=source.data_folder,
                            custom_ops=custom_ops,
                        ).__enter__()
                    else:
                        model.feed(file)
                    try:
                        model.run(0.0)
                        return Example(inputs, with_formulas(specs, dims))
                    except ModelError as error:
                        failures.append(f"with {_dims_text(dims)}: {error}")
        finally:
            if model is not None:
                model.__exit__(None, None, None)
    raise InputError(
        f"the model ran on none of {len(failures)} made-up inputs; {failures[0]}. "
        "Give an example with --inputs FILE.npz, or sizes with --dim NAME=N"
    )


def _dims_text(dims: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in dims.items()) or "its fixed dimensions"


def best_level(
    model: Path,
    inputs: Path,
    *,
    threads: int,
    provider: str,
    data_folder: Path | None = None,
    custom_ops: Sequence[Library] = (),
) -> LevelChoice:
    """The optimisation level at which a model file runs fastest.

    The usual best (``all``) is kept unless another is clearly faster. Two kinds of levels are left out: those at which
    ONNX Runtime refuses the model, since it cannot optimise some models again that its own optimiser saved; and those
    at which its answers have nothing to do with those of the lowest level: some fused kernels are wrong.

    Raises:
        ModelRefused: it refuses the model at every level.
    """
    found: dict[Level, int] = {}
    refused: list[ModelRefused] = []
    answers: dict[Level, dict[str, Array]] = {}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-"))) / "out.npz"
        timed: TimedModel | None = None
        for level in CANDIDATE_LEVELS:
            try:
                if timed is None:
                    one = TimedModel(
                        model,
                        inputs,
                        threads=threads,
                        level=level,
                        provider=provider,
                        data_folder=data_folder,
                        custom_ops=custom_ops,
                    )
                    timed = stack.enter_context(one)
                else:
                    timed.reload(level)
            except ModelRefused as error:
                refused.append(error)
                continue
            timed.run(0.0)
            timed.save_outputs(file)
            answers[level] = load_npz(file)
            found[level] = median_ns(timed.run(_LEVEL_SECONDS, least=3))
        if not found:
            raise refused[0]
        assert timed is not None
        timed.save_outputs(file)
        again = load_npz(file)
    *_, lowest = answers
    moved = dict.fromkeys(found, MOST_MOVED)
    if answers_apart(again, answers[lowest]) == 0:  # it gives the same answers each time
        moved = {level: answers_apart(answers[level], again) for level in found}
        found = {level: time_ns for level, time_ns in found.items() if moved[level] <= MOST_MOVED}
    usual = next(iter(found))
    fastest = min(found, key=lambda level: found[level])
    chosen = fastest if found[fastest] < _CLEARLY * found[usual] else usual
    return LevelChoice(chosen, found[chosen], max(moved[level] for level in found))


def answers_apart(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """How far two answers are apart; whole numbers and texts are not looked at."""
    return max((distance(one[name], other[name]) for name, array in one.items() if not is_discrete(array)), default=0.0)


def measured_costs(
    graph: OpGraph,
    shapes: Shapes,
    inputs: Mapping[str, Array],
    *,
    threads: int,
    provider: str,
    say: Callable[[str], None],
    custom_ops: Sequence[Library] = (),
) -> OpCosts:
    """Profile the model on example inputs.

    Raises:
        ModelError: it does not run on them.
    """
    with runnable(graph.source) as source, tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        file = Path(folder) / "inputs.npz"
        save_npz(file, inputs)
        say("observing shapes")
        untyped = tuple(name for name in graph.producer if name not in shapes.specs)
        seen = _profile(
            source,
            file,
            threads=threads,
            level="disabled",
            provider=provider,
            seconds=0.0,
            untyped=untyped,
            custom_ops=custom_ops,
        )
        say("timing optimisation levels")
        chosen = best_level(
            source.path,
            file,
            threads=threads,
            provider=provider,
            data_folder=source.data_folder,
            custom_ops=custom_ops,
        )
        level, whole_ns = chosen.level, chosen.time_ns
        say(f"profiling ops at level {level}")
        profile = _profile(
            source,
            file,
            threads=threads,
            level=level,
            provider=provider,
            seconds=_PROFILE_SECONDS,
            custom_ops=custom_ops,
        )
    known = _ranks(graph, shapes, seen)
    if known:
        shapes = infer_shapes(graph, {name: array.shape for name, array in inputs.items()}, known)
    shapes = shapes.observed(seen.sizes, seen.types)
    total = sum(profile.op_ns) or 1
    # The profiler's own cost is spread evenly over its events; what a run takes without it is the truth.
    fused = _where_the_work_is(graph, shapes, profile.op_ns)
    times = tuple(time_ns * whole_ns // total for time_ns in fused)
    return OpCosts(time_ns=times, whole_ns=whole_ns, level=level, source="measured", shapes=shapes, moved=chosen.moved)


def _ranks(graph: OpGraph, shapes: Shapes, seen: Profile) -> dict[str, TensorSpec]:
    """Types and ranks that a run showed behind ops that inference has no rule for, such as trees and custom ops.

    The rank of what :data:`_ANY_RANK` write may be another one in the next run, so it stays unknown.
    """
    found = {}
    for name, size in seen.sizes.items():
        spec, op = shapes.specs.get(name), graph.ops[graph.producer[name]]
        dtype = spec.dtype if spec is not None else seen.types.get(name)
        if dtype in TRAVELLING_TYPES and (spec is None or spec.shape is None) and op.op_type not in _ANY_RANK:
            found[name] = TensorSpec(dtype=dtype, shape=("?",) * len(size))
    return found


def _where_the_work_is(graph: OpGraph, shapes: Shapes, op_ns: Sequence[int]) -> list[int]:
    """Move the time of every fused kernel to the op of the heaviest work in it.

    A kernel is known by the tensor it writes, so its time is that of the last of its ops: the activation after a
    convolution. Ops without a kernel of their own, all of whose readers belong to one kernel, are fused into it.
    """
    work = analytic_costs(graph, shapes).time_ns
    kernel: list[int | None] = [None] * len(graph.ops)
    heaviest = list(range(len(graph.ops)))
    for op in reversed(graph.ops):
        if op_ns[op.index]:
            kernel[op.index] = op.index
            continue
        found = {kernel[reader] for name in op.outputs for reader in graph.readers.get(name, ())}
        if len(found) == 1 and op.index not in graph.constant_ops and (one := found.pop()) is not None:
            kernel[op.index] = one
            if work[op.index] > work[heaviest[one]]:
                heaviest[one] = op.index
    times = [0] * len(graph.ops)
    for op_index, time_ns in enumerate(op_ns):
        times[heaviest[op_index]] += time_ns
    return times


def _profile(
    source: ModelFile,
    inputs: Path,
    *,
    threads: int,
    level: Level,
    provider: str,
    seconds: float,
    untyped: tuple[str, ...] = (),
    custom_ops: Sequence[Library] = (),
) -> Profile:
    folder = None if source.data_folder is None else str(source.data_folder)
    request = ProfileRequest(
        str(source.path), str(inputs), threads, level, provider, seconds, untyped, folder, tuple(custom_ops)
    )
    done = subprocess.run(
        [sys.executable, "-P", "-m", "onnxsplit.cost.profiler"],
        input=msgspec.json.encode(request),
        capture_output=True,
        env=quiet_environment(),
        check=False,
    )
    try:
        profile = msgspec.json.decode(done.stdout, type=Profile)
    except msgspec.DecodeError as error:
        tail = done.stderr[-500:].decode(errors="replace").strip()
        raise ModelError(f"profiling {source.path}: the process ended with {done.returncode}: {tail}") from error
    if profile.error is not None:
        raise ModelError(f"profiling {source.path}: {profile.error}")
    return profile


def shapes_of_run(
    graph: OpGraph, inputs: Mapping[str, Array], *, custom_ops: Sequence[Library] = ()
) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors have in one run on the CPU.

    Raises:
        ModelError: the model does not run on these inputs.
    """
    with runnable(graph.source) as source, tempfile.TemporaryDirectory(prefix="onnxsplit-") as folder:
        file = Path(folder) / "inputs.npz"
        save_npz(file, inputs)
        return _profile(
            source,
            file,
            threads=1,
            level="disabled",
            provider="cpu",
            seconds=0.0,
            custom_ops=custom_ops,
        ).sizes
