"""Inputs of a model as the command line names them: ``NAME=DTYPE[DIMS]``.

image=float32[batch,3,224,224]     three sizes and one free dimension
ids=int64[batch,sequence]          axes with the same name have the same size
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxsplit.errors import ExportError
from onnxsplit.numbers import MOST_SIZE, parse_whole
from onnxsplit.tensors import TRAVELLING_TYPES, Array, numpy_dtype

_FORM = re.compile(r"(?P<name>[^=]+)=(?P<dtype>\w+)(?:\[(?P<dims>[^\[\]]*)\])?")
_SIZES = (
    (2, 5, 7, 11, 13),
    (3, 4, 6, 9, 10),
)  # sizes of free dimensions in two samples; none is 1, which exporters take for a fixed size


@dataclass(frozen=True)
class InputSpec:
    """An input of a model.

    Attributes:
        name: name of the input.
        dtype: ONNX's name of its element type.
        shape: its sizes, and names of free dimensions.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def axes(self) -> dict[int, str]:
        """Names of the free dimensions by axis."""
        return {axis: dim for axis, dim in enumerate(self.shape) if isinstance(dim, str)}


def parse_spec(text: str) -> InputSpec:
    """Parse ``NAME=DTYPE[DIMS]``.

    Raises:
        ExportError: the text does not have this form; the message names the wrong part.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ExportError(f"the input {text!r} is not NAME=DTYPE[DIMS], as in x=float32[batch,3,224,224]")
    if match["dtype"] not in TRAVELLING_TYPES:
        raise ExportError(
            f"the input {text!r}: there is no type {match['dtype']!r}; allowed: {', '.join(sorted(TRAVELLING_TYPES))}"
        )
    shape: list[int | str] = []
    for part in (match["dims"] or "").split(",") if match["dims"] else ():
        part = part.strip()
        if size := parse_whole(part, MOST_SIZE):
            shape.append(size)
        elif part.isidentifier():
            shape.append(part)
        else:
            raise ExportError(
                f"the input {text!r}: {part!r} is neither a size from 1 to {MOST_SIZE} nor the name of a free dimension"
            )
    return InputSpec(match["name"].strip(), match["dtype"], tuple(shape))


def samples(specs: Sequence[InputSpec], *, fixed: Mapping[str, int] | None = None) -> Iterator[dict[str, Array]]:
    """Two sets of random inputs, with different sizes of free dimensions. Integers lie in [0, 10).

    Args:
        specs: the inputs.
        fixed: sizes of free dimensions that both sets have.
    """
    names = list(dict.fromkeys(dim for spec in specs for dim in spec.shape if isinstance(dim, str)))
    for number, choices in enumerate(_SIZES):
        sizes = {name: choices[place % len(choices)] for place, name in enumerate(names)} | dict(fixed or {})
        source = np.random.default_rng(number)
        yield {
            spec.name: _random(source, spec.dtype, tuple(d if isinstance(d, int) else sizes[d] for d in spec.shape))
            for spec in specs
        }


def _random(source: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    if dtype == "string":
        return source.integers(0, 10, shape).astype(str).astype(object)
    kind = numpy_dtype(dtype)
    if kind.kind in "iu":
        return source.integers(0, 10, shape).astype(kind)
    if kind.kind == "b":
        return source.integers(0, 2, shape).astype(kind)
    return source.standard_normal(shape).astype(kind)
