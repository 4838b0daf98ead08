"""The forms in which each tensor of a model may cross between stages, by its type, its size and the model's opset."""

from __future__ import annotations

from onnxsplit.errors import PartitionError
from onnxsplit.plan import CALLER
from onnxsplit.plan_borders import BorderChoice, Form
from onnxsplit.planning.batch_structure import likely_axes
from onnxsplit.planning.border_forms import BorderForms
from onnxsplit.planning.subject import Subject
from onnxsplit.stages.borders import forms_offered

_LEAST_BYTES = 4096  # a smaller tensor gains less than its conversion and its message cost


def border_forms(subject: Subject, asked: BorderChoice, tolerance: float) -> BorderForms | None:
    """The forms in which each tensor may cross; None if all cross as they are.

    Only float32 tensors of a known size are narrowed, and neither the model's inputs nor states of a decoder.

    Raises:
        PartitionError: the model's opset lacks the ops, or ``auto`` cannot compare answers.
    """
    if asked == "float32":
        return None
    graph, shapes = subject.graph, subject.shapes
    if asked == "auto" and subject.costs.source != "measured":
        why = f" ({subject.note})" if subject.note else ""
        raise PartitionError(
            f"--border auto compares the model's outputs, and the model was not run{why}. Leave out --costs analytic, "
            "or name the form: --border float16"
        )
    opset = next((o.version for o in graph.source.proto.opset_import if o.domain in ("", "ai.onnx")), None)
    if asked != "auto" and asked not in forms_offered(opset, (1, 1), 1):
        raise PartitionError(
            f"--border {asked} needs opset {11 if asked == 'int8' else 6} of ONNX's own ops, and "
            f"{graph.source.path.name} has {'none' if opset is None else opset}; convert the model to a newer opset "
            "(onnx.version_converter), or leave out --border"
        )
    axes = likely_axes(subject, ()) if asked != "float16" else {}
    forms: dict[str, tuple[Form, ...]] = {}
    rows: dict[str, int] = {}
    for edge in subject.crossing:
        name = edge.tensor
        spec, size = shapes.specs.get(name), shapes.sizes.get(name)
        if edge.writer == CALLER or not edge.readers or spec is None or spec.dtype != "float32" or size is None:
            continue
        if shapes.bytes(name) < _LEAST_BYTES:
            continue
        rows[name] = axes.get(name, 0) + 1
        offered = forms_offered(opset, spec.shape, rows[name])
        allowed: tuple[Form, ...] = (
            ("float32", *offered) if asked == "auto" else tuple(f for f in offered if f == asked)
        )
        if allowed:
            forms[name] = allowed
    return BorderForms(asked, tolerance, forms, {name: shapes.sizes[name] for name in forms}, rows)
