"""Narrow borders in a plan: the tensors that cross between stages in fewer bits than the model computes in."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from onnxsplit.plan_base import Count, PlanStruct, Rate, StageIndex

Form = Literal["float32", "float16", "int8"]
"""How a float32 tensor crosses: as it is, cast to float16, or as 8-bit integers with a scale for each block."""

BorderChoice = Literal["float32", "float16", "int8", "auto"]
"""The form that a user asks for; ``auto`` leaves it to the budget of error."""

DEFAULT_TOLERANCE = 1e-3
"""The budget of error, relative to the scale of each output, unless another one is given."""

UNUSABLE = 1e6
"""The error that stands for answers whose infinities and NaNs are elsewhere than the whole model's."""


class Border(PlanStruct, frozen=True, kw_only=True):
    """A tensor that crosses in a narrower form.

    Attributes:
        tensor: its name in the source model. The stage that writes it also has it under this name, in full.
        form: the form in which it crosses: ``float16`` or ``int8``.
        wire: the names of the tensors that cross instead; of ``int8``, the numbers and their scales.
        bytes_before: its bytes, at the sizes that the plan was made for.
        bytes_after: the bytes of the tensors that cross instead.
        error: the error of the model's outputs if this tensor alone is narrowed; None if nothing was run.
        compressed: the stages to which the numbers of ``int8`` go compressed with Zstandard, if they are on another
            host and both hosts have the library.
    """

    tensor: str
    form: Form
    wire: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=2)]
    bytes_before: Count
    bytes_after: Count
    error: Rate | None = None
    compressed: tuple[StageIndex, ...] = ()


class NarrowBorders(PlanStruct, frozen=True, kw_only=True):
    """The narrow borders of a plan, and what they do to the model's outputs.

    An error is the largest difference of an output from that of stages with full borders, relative to the largest
    magnitude in the output; for whole numbers, booleans and text, the share of elements that differ.

    Attributes:
        asked: the form that was asked for.
        tolerance: the budget of error.
        error: the error of the outputs with all these borders; None if nothing was run.
        inputs: the number of example inputs that were compared.
        tensors: the narrowed tensors.
    """

    asked: BorderChoice
    tolerance: Rate
    error: Rate | None = None
    inputs: Count = 0
    tensors: tuple[Border, ...] = ()

    @property
    def within(self) -> bool:
        """Whether the error is known and within the budget; also if no tensor is narrowed."""
        return not self.tensors or (self.error is not None and self.error <= self.tolerance)

    @property
    def wire(self) -> frozenset[str]:
        """The names of all tensors that cross instead of others."""
        return frozenset(name for border in self.tensors for name in border.wire)
