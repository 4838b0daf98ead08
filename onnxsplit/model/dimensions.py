"""Free dimensions of a model's inputs: their names, the sizes chosen for them, and the sizes that formulas give."""

from __future__ import annotations

from collections.abc import Mapping

from onnxsplit.errors import InputError
from onnxsplit.model.formulas import Formula, formulas_among
from onnxsplit.numbers import MOST_SIZE, whole_problem
from onnxsplit.plan import TensorSpec


def free_dimensions(specs: Mapping[str, TensorSpec]) -> dict[str, list[tuple[str, int]]]:
    """Dimensions of the inputs without a fixed size: the (input, axis) pairs where each occurs, by name.

    A dimension without a name is called ``INPUT.AXIS``. A formula, such as ``past + 1``, is listed by its text.
    """
    free: dict[str, list[tuple[str, int]]] = {}
    for name, spec in specs.items():
        for axis, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, int):
                free.setdefault(f"{name}.{axis}" if dim == "?" else dim, []).append((name, axis))
    return free


def formula_dimensions(specs: Mapping[str, TensorSpec]) -> dict[str, Formula]:
    """Free dimensions whose sizes follow from others, by their text."""
    return formulas_among(free_dimensions(specs))


def sized_dimensions(specs: Mapping[str, TensorSpec]) -> dict[str, list[tuple[str, int]]]:
    """Dimensions whose size can be chosen: as :func:`free_dimensions`, but formulas are replaced by the names in them.

    A name that only occurs in formulas is listed with the (input, axis) pairs of these formulas.
    """
    free, formulas = free_dimensions(specs), formula_dimensions(specs)
    sized = {name: where for name, where in free.items() if name not in formulas}
    for text, formula in formulas.items():
        for name in formula.names:
            if name not in free:
                sized.setdefault(name, []).extend(free[text])
    return sized


def check_dimensions(specs: Mapping[str, TensorSpec], dims: Mapping[str, int]) -> None:
    """Refuse sizes of unknown dimensions, sizes of formulas, and sizes out of range.

    Raises:
        InputError: names the dimensions, and those that the model has.
    """
    sized, formulas = sized_dimensions(specs), formula_dimensions(specs)
    unknown = sorted(set(dims) - set(sized))
    if unknown and unknown[0] in formulas:
        names = formulas[unknown[0]].names
        raise InputError(
            f"the size of dimension {unknown[0]!r} follows from {', '.join(map(repr, names))}; "
            f"give {'that' if len(names) == 1 else 'those'} instead: {' '.join(f'--dim {name}=N' for name in names)}"
        )
    if unknown:
        raise InputError(
            f"dimension {', '.join(map(repr, unknown))} is not in the model; "
            f"its free dimensions are: {', '.join(sized) or 'none'}"
        )
    for name, size in dims.items():
        problem = whole_problem(f"dimension {name!r}", size, 0, MOST_SIZE)
        if problem:
            raise InputError(problem)


def with_formulas(specs: Mapping[str, TensorSpec], dims: Mapping[str, int]) -> dict[str, int]:
    """The given sizes of dimensions, and the sizes of formulas that follow from them, by text.

    Raises:
        InputError: the value of a formula is negative, or larger than a dimension can be.
    """
    sizes = dict(dims)
    for text, formula in formula_dimensions(specs).items():
        if not dims.keys() >= set(formula.names):
            continue
        size = formula.value(dims)
        if size is None or size > MOST_SIZE:
            chosen = ", ".join(f"{name}={dims[name]}" for name in formula.names)
            raise InputError(
                f"dimension {text!r} has no size of 0 to {MOST_SIZE} at {chosen}; give other sizes with --dim NAME=N"
            )
        sizes[text] = size
    return sizes


def bind(specs: Mapping[str, TensorSpec], dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs, with sizes in place of symbolic dimensions.

    Raises:
        InputError: a dimension is not in the model or has no size, or an input's rank is unknown.
    """
    check_dimensions(specs, dims)
    missing = [name for name in sized_dimensions(specs) if name not in dims]
    rankless = [name for name, spec in specs.items() if spec.shape is None]
    if missing or rankless:
        what = [f"dimension {name!r} has no size (--dim {name}=N)" for name in missing]
        what += [f"the rank of input {name!r} is unknown (give an example with --inputs FILE.npz)" for name in rankless]
        raise InputError("; ".join(what))
    sizes = with_formulas(specs, dims)
    return {
        name: tuple(
            dim if isinstance(dim, int) else sizes[f"{name}.{axis}" if dim == "?" else dim]
            for axis, dim in enumerate(spec.shape or ())
        )
        for name, spec in specs.items()
    }
