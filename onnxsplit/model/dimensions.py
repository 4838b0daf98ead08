"""Free dimensions of a model's inputs: their names, the sizes chosen for them, and the sizes that formulas give."""

from __future__ import annotations

from collections.abc import Mapping

from onnxsplit.errors import InputError
from onnxsplit.model.formulas import Formula, formulas_among
from onnxsplit.numbers import MOST_SIZE, whole_problem
from onnxsplit.plan import TensorSpec


def free_dimensions(specs: Mapping[str, TensorSpec]) -> dict[str, list[tuple[str, int]]]:
    """Dimensions of the inputs that have no fixed size: name -> the (input, axis) pairs it stands for.

    A dimension without a name is called ``INPUT.AXIS``. Formulas, such as ``past + 1``, are in it under their text.
    """
    free: dict[str, list[tuple[str, int]]] = {}
    for name, spec in specs.items():
        for axis, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, int):
                free.setdefault(f"{name}.{axis}" if dim == "?" else dim, []).append((name, axis))
    return free


def formula_dimensions(specs: Mapping[str, TensorSpec]) -> dict[str, Formula]:
    """Those of the free dimensions whose sizes follow from others, by their text."""
    return formulas_among(free_dimensions(specs))


def sized_dimensions(specs: Mapping[str, TensorSpec]) -> dict[str, list[tuple[str, int]]]:
    """Dimensions that a size can be chosen for: as :func:`free_dimensions`, with formulas replaced by their names.

    A name that stands in formulas alone is at the places of those.
    """
    free, formulas = free_dimensions(specs), formula_dimensions(specs)
    found = {name: where for name, where in free.items() if name not in formulas}
    for text, formula in formulas.items():
        for name in formula.names:
            if name not in free:
                found.setdefault(name, []).extend(free[text])
    return found


def check_dimensions(specs: Mapping[str, TensorSpec], dims: Mapping[str, int]) -> None:
    """Refuse sizes for dimensions that the inputs do not have, or that follow from others, and sizes below 0.

    Raises:
        InputError: naming them and the dimensions there are.
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
    """Sizes of dimensions, and those that follow from them, by the text of their formulas.

    Raises:
        InputError: a formula gives no size: its value is negative, or above what a dimension can have.
    """
    found = dict(dims)
    for text, formula in formula_dimensions(specs).items():
        if not dims.keys() >= set(formula.names):
            continue
        size = formula.value(dims)
        if size is None or size > MOST_SIZE:
            chosen = ", ".join(f"{name}={dims[name]}" for name in formula.names)
            raise InputError(
                f"dimension {text!r} has no size of 0 to {MOST_SIZE} at {chosen}; give other sizes with --dim NAME=N"
            )
        found[text] = size
    return found


def bind(specs: Mapping[str, TensorSpec], dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs with sizes put in for symbolic dimensions.

    Raises:
        InputError: a dimension is not in the model, has no size, or an input's rank is unknown.
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
