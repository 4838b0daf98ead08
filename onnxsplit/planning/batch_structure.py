"""The batch axis of each tensor as the structure of the model proves it, at several sizes of the free dimensions.

The walk over the ops is :mod:`onnxsplit.stages.batch.claim`. A claim that holds at the example's sizes is checked again
with more rows, and with other sizes of the other free dimensions, if the model runs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress

import numpy as np

from onnxsplit.cost.profile import shapes_of_runs
from onnxsplit.errors import InputError, OnnxsplitError, one_line
from onnxsplit.model.dimensions import bind, sized_dimensions
from onnxsplit.model.shapes import infer_shapes, input_specs
from onnxsplit.planning.subject import Subject
from onnxsplit.stages.batch.claim import Claim, Structure, candidates
from onnxsplit.stages.batch.trials import Axes
from onnxsplit.tensors import Array

_MORE_ROWS = 3  # rows of the run in which nothing but the number of rows changes
_EVEN_ROWS = 4  # rows of the runs in which other sizes change too; an even number suits shapes that group rows in pairs
_MOST_DIMENSIONS = 6  # free dimensions that are changed one by one


def axes_by_structure(subject: Subject, defaults: Container[str]) -> tuple[Axes, str]:
    """Prove the batch axes of as many tensors as possible.

    Args:
        subject: the model with example inputs.
        defaults: inputs that have a default; they carry no rows, because a default always has the same size.

    Returns:
        The axes by tensor and an empty text; or no axes and why the most likely choice of input axes fails.
    """
    choice, claim = _first_claim(subject, defaults)
    return ({}, claim.why_not) if claim.why_not else _at_other_sizes(subject, choice, claim.axes)


def likely_axes(subject: Subject, defaults: Container[str]) -> Axes:
    """The batch axes that the structure proves at the sizes of the example alone; empty if it proves none."""
    return _first_claim(subject, defaults)[1].axes


def _first_claim(subject: Subject, defaults: Container[str]) -> tuple[Axes, Claim]:
    """The first choice of input axes for which the structure proves all outputs; else one that says why not."""
    graph = subject.graph
    specs = {name: spec for name, spec in input_specs(graph).items() if name not in defaults}
    choices = [axes for axes in candidates(specs) if all(_has_rows(subject, name, axis) for name, axis in axes.items())]
    if not choices:
        return {}, Claim({}, "no input has a free dimension")
    structure = Structure(graph, {name: a.shape for name, a in subject.inputs.items()}, subject.shapes.sizes)
    claims = []
    for choice in choices:
        claims.append(structure.claim(choice))
        if not claims[-1].why_not:
            return choice, claims[-1]
    return choices[0], claims[0]


def _has_rows(subject: Subject, name: str, axis: int) -> bool:
    return name in subject.inputs and subject.inputs[name].shape[axis] > 0


def _at_other_sizes(subject: Subject, choice: Axes, proven: Axes) -> tuple[Axes, str]:
    """Keep the proven axes that the structure also proves at other sizes of the free dimensions.

    Returns:
        The axes by tensor and an empty text; or no axes and the reason.
    """
    first = _resized(subject.inputs, choice, {}, _MORE_ROWS)
    others, changed = _other_sizes(subject, choice)
    groups = [[first], *changed(others)]
    try:
        seen = shapes_of_runs(subject.graph, groups, custom_ops=subject.custom_ops)
        if seen[0].number is None:
            return {}, f"the model does not run on {_MORE_ROWS} rows: {seen[0].error}"
        if len(others) > 1 and all(run.number is None for run in seen[1:]):
            more = [inputs for dim in others[:_MOST_DIMENSIONS] for inputs in changed([dim])]
            groups += more
            seen += shapes_of_runs(subject.graph, more, custom_ops=subject.custom_ops)
    except OnnxsplitError as error:
        return {}, f"the model does not run on {_MORE_ROWS} rows: {one_line(error)}"
    for group, run in zip(groups, seen, strict=True):
        if run.number is None:
            continue
        shapes = {name: array.shape for name, array in group[run.number].items()}
        sizes = {**infer_shapes(subject.graph, shapes).sizes, **run.sizes}
        claim = Structure(subject.graph, shapes, sizes).claim(choice)
        if claim.why_not:
            return {}, f"with inputs of the shapes {_shapes_text(shapes)}: {claim.why_not}"
        proven = {name: axis for name, axis in proven.items() if claim.axes.get(name) == axis}
    return proven, ""


def _other_sizes(
    subject: Subject, choice: Axes
) -> tuple[list[str], Callable[[Sequence[str]], list[list[dict[str, Array]]]]]:
    """The free dimensions that are not the batch, and a function that makes inputs with other sizes of some of them.

    All of these dimensions change at once if the model then runs, else one at a time, because some may be fixed
    although they are declared free. Each is also tried at the size of the batch, so that no op broadcasts by chance.
    """
    specs = input_specs(subject.graph)
    free = sized_dimensions(specs)
    of_rows = {dim for dim, where in free.items() if any(choice.get(owner) == axis for owner, axis in where)}
    others = [dim for dim in free if dim not in of_rows and dim in subject.dims]
    sizes = {dim: subject.dims[dim] for dim in others} | dict.fromkeys(of_rows, _EVEN_ROWS)

    def changed(dims: Sequence[str]) -> list[list[dict[str, Array]]]:
        groups: list[list[dict[str, Array]]] = []
        for changes in (_CHANGES, (_as_the_rows,)):
            groups.append([])
            for change in changes:
                with suppress(InputError):  # an input without a rank
                    bound = bind(specs, {**sizes, **{dim: change(sizes[dim]) for dim in dims}})
                    groups[-1].append(_resized(subject.inputs, choice, bound, _EVEN_ROWS))
        return groups if dims else []

    return others, changed


def _resized(
    example: Mapping[str, Array], choice: Axes, shapes: Mapping[str, tuple[int, ...]], rows: int
) -> dict[str, Array]:
    """Inputs of other shapes, filled with the values of the example."""
    resized = {}
    for name, array in example.items():
        shape = list(shapes.get(name, array.shape))
        if name in choice:
            shape[choice[name]] = rows
        resized[name] = np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)
    return resized


_CHANGES: tuple[Callable[[int], int], ...] = (
    lambda size: size // 2 if size > 2 else size + 2,
    lambda size: size - 1 if size > 2 else size + 1,
    lambda size: size * 2 if size > 2 else size + 3,
)
"""Changes of the size of a dimension, tried in turn: a model may take only even sizes, or only multiples."""


def _as_the_rows(_: int) -> int:
    return _EVEN_ROWS


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
