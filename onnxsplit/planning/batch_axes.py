"""Which axis of each tensor is its batch: proven by the structure of the model, and tried on batches that differ.

Both must hold. The structure is followed op by op at several sizes of the free dimensions
(:mod:`onnxsplit.stages.batch.claim`); an op that mixes rows, or whose effect cannot be told, ends the claim. Then the
stages run on batches whose rows differ in every input, and on parts of them (:mod:`onnxsplit.stages.batch.trials`).
The parts together must give what the whole batch gives.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec
import numpy as np

from onnxsplit.cost.measured import shapes_of_run
from onnxsplit.custom_ops import Library
from onnxsplit.errors import InputError, OnnxsplitError, one_line, shown
from onnxsplit.model.inputs import table_size
from onnxsplit.model.opening import runnable
from onnxsplit.model.precision import computed_types, tolerance
from onnxsplit.model.shapes import bind, infer_shapes, input_specs, sized_dimensions
from onnxsplit.npz import save_npz
from onnxsplit.plan import BatchClaim, Plan
from onnxsplit.planning.subject import Subject
from onnxsplit.progress import Say
from onnxsplit.providers import provider_here
from onnxsplit.stages.batch.claim import Structure, candidates
from onnxsplit.stages.batch.trials import Axes, apart, equal_rows, trials
from onnxsplit.stages.chain import StageFile, StageProcesses, run_chain
from onnxsplit.tensors import Array
from onnxsplit.timed import TimedModel

_LEAST_TRIALS = 3
_ENOUGH_SECONDS = 20.0  # of trials, once there were the least
_MORE_ROWS = 3  # in the run that observes shapes with more rows alone
_MOST_DIMENSIONS = 6  # changed one by one
_EVEN_ROWS = 4  # in those with other sizes, too: shapes that group rows in twos run with these


def with_batch_axes(plan: Plan, folder: Path, subject: Subject, say: Say) -> Plan:
    """The plan with its claim about rows, and the batch axis of every tensor for which it holds.

    Args:
        plan: whose stage files can run here.
        folder: where they are.
        subject: the model it was cut from.
        say: told what is being done.
    """
    axes, why_not = _by_structure(subject, plan.defaults)
    tried = 0
    if axes:
        say("trying batches and their parts")
        tried, why_not = _by_trials(plan, folder, subject, axes)
    if why_not:
        return msgspec.structs.replace(plan, batch=BatchClaim(why_not=why_not))
    tensors = {name: msgspec.structs.replace(spec, batch_axis=axes.get(name)) for name, spec in plan.tensors.items()}
    return msgspec.structs.replace(plan, tensors=tensors, batch=BatchClaim(trials=tried))


def _by_structure(subject: Subject, defaults: Container[str]) -> tuple[Axes, str]:
    """Axes of all tensors that the structure proves to have one, or what speaks against the likeliest choice.

    An input that has a default carries no rows: the default always has the same size.
    """
    graph = subject.graph
    specs = {name: spec for name, spec in input_specs(graph).items() if name not in defaults}
    choices = [axes for axes in candidates(specs) if all(_has_rows(subject, name, axis) for name, axis in axes.items())]
    if not choices:
        return {}, "no input has a free dimension"
    structure = Structure(graph, {name: a.shape for name, a in subject.inputs.items()}, subject.shapes.sizes)
    reasons = []
    for choice in choices:
        claim = structure.claim(choice)
        if not claim.why_not:
            return _at_other_sizes(subject, choice, claim.axes)
        reasons.append(claim.why_not)
    return {}, reasons[0]


def _has_rows(subject: Subject, name: str, axis: int) -> bool:
    return name in subject.inputs and subject.inputs[name].shape[axis] > 0


def _at_other_sizes(subject: Subject, choice: Axes, proven: Axes) -> tuple[Axes, str]:
    """The same axes, unless the structure says otherwise where the free dimensions have other sizes."""
    with _Runs(subject) as runs:
        more_rows = _resized(subject.inputs, choice, {}, _MORE_ROWS)
        failure = runs.failure(more_rows)
        if failure:
            return {}, f"the model does not run on {_MORE_ROWS} rows: {failure}"
        tried = [more_rows, *_other_inputs(subject, choice, runs)]
    for inputs in tried:
        shapes = {name: array.shape for name, array in inputs.items()}
        seen = shapes_of_run(subject.graph, inputs, custom_ops=subject.custom_ops)
        sizes = {**infer_shapes(subject.graph, shapes).sizes, **seen}
        claim = Structure(subject.graph, shapes, sizes).claim(choice)
        if claim.why_not:
            return {}, f"with inputs of the shapes {_shapes_text(shapes)}: {claim.why_not}"
        proven = {name: axis for name, axis in proven.items() if claim.axes.get(name) == axis}
    return proven, ""


def _other_inputs(subject: Subject, choice: Axes, runs: _Runs) -> list[dict[str, Array]]:
    """Inputs on which the model runs whose other free dimensions have other sizes, too.

    All are changed at once where the model takes that, else each by itself: some may be fixed, whatever is declared.
    Where they can be as large as the batch, they are that as well, so that nothing is broadcast by chance.
    """
    specs = input_specs(subject.graph)
    free = sized_dimensions(specs)
    of_rows = {dim for dim, where in free.items() if any(choice.get(owner) == axis for owner, axis in where)}
    others = [dim for dim in free if dim not in of_rows and dim in subject.dims]
    sizes = {dim: subject.dims[dim] for dim in others} | dict.fromkeys(of_rows, _EVEN_ROWS)
    groups = [others] if others else []
    found: list[dict[str, Array]] = []
    while groups:
        group = groups.pop(0)
        before = len(found)
        for change in (*_CHANGES, _as_the_rows):
            if len(found) > before and change is not _as_the_rows:
                continue
            changed = {**sizes, **{dim: change(sizes[dim]) for dim in group}}
            with suppress(InputError):  # an input without a rank
                inputs = _resized(subject.inputs, choice, bind(specs, changed), _EVEN_ROWS)
                if not runs.failure(inputs):
                    found.append(inputs)
        if len(found) == before and len(group) > 1:
            groups += [[dim] for dim in group[:_MOST_DIMENSIONS]]
    return found


class _Runs:
    """Tells whether a model runs on inputs; a context manager that keeps it loaded."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._stack = ExitStack()
        self._model: TimedModel | None = None

    def __enter__(self) -> _Runs:
        self._file = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="onnxsplit-"))) / "in.npz"
        self._source = self._stack.enter_context(runnable(self._subject.graph.source))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def failure(self, inputs: Mapping[str, Array]) -> str:
        """Why it does not run; empty when it does."""
        save_npz(self._file, inputs)
        try:
            if self._model is None:
                self._model = self._stack.enter_context(
                    TimedModel(
                        self._source.path,
                        self._file,
                        threads=1,
                        level="basic",
                        data_folder=self._source.data_folder,
                        custom_ops=self._subject.custom_ops,
                    )
                )
            else:
                self._model.feed(self._file)
            self._model.run(0.0)
        except OnnxsplitError as error:
            return one_line(error)
        return ""


def _resized(
    example: Mapping[str, Array], choice: Axes, shapes: Mapping[str, tuple[int, ...]], rows: int
) -> dict[str, Array]:
    """Inputs of other shapes, filled with the numbers of the example."""
    found = {}
    for name, array in example.items():
        shape = list(shapes.get(name, array.shape))
        if name in choice:
            shape[choice[name]] = rows
        found[name] = np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)
    return found


_CHANGES: tuple[Callable[[int], int], ...] = (
    lambda size: size - 1 if size > 2 else size + 1,
    lambda size: size // 2 if size > 2 else size + 2,
    lambda size: size * 2 if size > 2 else size + 3,
)
"""What is made of the sizes of dimensions other than the batch; models may take even ones or multiples only."""


def _as_the_rows(_: int) -> int:
    return _EVEN_ROWS


def _by_trials(plan: Plan, folder: Path, subject: Subject, axes: Axes) -> tuple[int, str]:
    """How many trials the claim survived, and what ended it."""
    graph = subject.graph
    of_inputs = {name: axis for name, axis in axes.items() if name in graph.inputs}
    limits = {name: size for name in of_inputs if (size := table_size(graph, name)) is not None}
    allowed = tolerance(computed_types(graph, subject.shapes))
    until = time.monotonic() + _ENOUGH_SECONDS
    count, failure = 0, "the rows of its inputs cannot be made to differ"
    stages = _stage_files(plan, folder, subject.custom_ops)
    with StageProcesses(keep=True) as run_stage:
        for trial in trials(subject.inputs, of_inputs, limits):
            if equal_rows(trial.inputs, of_inputs, limits):
                continue
            try:
                whole, *parts = [
                    run_chain(stages, inputs, plan.outputs, run_stage)
                    for inputs in (trial.inputs, *trial.split(of_inputs))
                ]
            except OnnxsplitError as error:  # it does not take such numbers
                failure = one_line(error)
                continue
            for name in plan.outputs:
                problem = apart(whole[name], [part[name] for part in parts], axes[name], allowed)
                if problem is not None:
                    return (
                        0,
                        f"in a trial ({trial.what}) output {shown(name)} depends on how the batch is split: {problem}",
                    )
            count += 1
            if count >= _LEAST_TRIALS and time.monotonic() > until:
                break
    if count < _LEAST_TRIALS:
        return 0, f"only {count} of at least {_LEAST_TRIALS} trials ran: {failure}"
    return count, ""


def _stage_files(plan: Plan, folder: Path, libraries: Sequence[Library]) -> list[StageFile]:
    """The stages of a plan, on this host."""
    return [
        StageFile(
            path=folder / stage.file,
            inputs=stage.inputs,
            outputs=stage.outputs,
            threads=stage.threads,
            level=stage.optimization_level,
            provider=provider_here(stage.provider),
            custom_ops=tuple(libraries),
        )
        for stage in plan.stages
    ]


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
