"""The forms in which the tensors of a model may cross between stages, and what each form costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from onnxsplit.partitioner import Way
from onnxsplit.plan_borders import Border, BorderChoice, Form, NarrowBorders
from onnxsplit.stages.borders import NarrowTensor, wire_bytes

# Measured on one core, in bytes of float32 that one side converts in a second. Casts are limited by memory.
_BYTES_PER_S: Mapping[Form, int] = {"float16": 10_000_000_000, "int8": 3_000_000_000}
_OPS_NS = 10_000  # for the ops of a conversion, whatever the size


def convert_ns(form: Form, size_bytes: int) -> int:
    """Nanoseconds that the writer or a reader of a tensor needs to convert it."""
    return _OPS_NS + size_bytes * 1_000_000_000 // _BYTES_PER_S[form] if form in _BYTES_PER_S else 0


@dataclass(frozen=True)
class BorderForms:
    """The forms in which tensors may cross between stages.

    Attributes:
        asked: the form that the user asked for.
        tolerance: the budget of error, relative to the scale of each output.
        forms: the forms in which each tensor may cross; a tensor that is not listed crosses as it is.
        sizes: the shape of each of these tensors.
        rows: for each of them, the number of leading axes that no block may cross.
    """

    asked: BorderChoice
    tolerance: float
    forms: Mapping[str, tuple[Form, ...]]
    sizes: Mapping[str, tuple[int, ...]]
    rows: Mapping[str, int]

    def bytes(self, tensor: str, form: Form) -> int:
        """Bytes of a tensor on a link, in a form."""
        return sum(wire_bytes(form, self.sizes[tensor], self.rows[tensor]))

    def way(self, tensor: str, form: Form) -> Way:
        """What a form costs."""
        return Way(self.bytes(tensor, form), convert_ns(form, self.bytes(tensor, "float32")))

    def ways(self, tensor: str) -> tuple[Way, ...]:
        """What the forms of a tensor cost; empty if it crosses as it is."""
        return tuple(self.way(tensor, form) for form in self.forms.get(tensor, ()))

    def without(self, refused: Collection[tuple[str, Form]]) -> BorderForms:
        """These forms without some that break the budget."""
        kept = {name: tuple(f for f in forms if (name, f) not in refused) for name, forms in self.forms.items()}
        return replace(self, forms=kept)

    def only(self, chosen: Mapping[str, Form]) -> BorderForms:
        """Each tensor in the form that was chosen for it; the others as they are."""
        return replace(self, forms={name: (form,) for name, form in chosen.items()})


@dataclass(frozen=True)
class Narrowed:
    """The narrow borders of one cut.

    Attributes:
        tensors: the tensors that cross in a narrower form.
        alone: the error of the outputs with each of them alone; empty if nothing was run.
        error: the error of the outputs with all of them; None if nothing was run.
        inputs: the number of example inputs that were compared.
    """

    tensors: tuple[NarrowTensor, ...] = ()
    alone: Mapping[str, float] = field(default_factory=dict)
    error: float | None = None
    inputs: int = 0

    @property
    def wire(self) -> dict[str, tuple[str, ...]]:
        """The names that cross, by the tensor that they cross for."""
        return {narrow.tensor: narrow.wire for narrow in self.tensors}

    @property
    def chosen(self) -> dict[str, Form]:
        """The form of each tensor."""
        return {narrow.tensor: narrow.form for narrow in self.tensors}

    def block(self, forms: BorderForms) -> NarrowBorders:
        """What the plan says about them."""
        return NarrowBorders(
            asked=forms.asked,
            tolerance=forms.tolerance,
            error=self.error,
            inputs=self.inputs,
            tensors=tuple(
                Border(
                    tensor=narrow.tensor,
                    form=narrow.form,
                    wire=narrow.wire,
                    bytes_before=forms.bytes(narrow.tensor, "float32"),
                    bytes_after=forms.bytes(narrow.tensor, narrow.form),
                    error=self.alone.get(narrow.tensor),
                )
                for narrow in self.tensors
            ),
        )
