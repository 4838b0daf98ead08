"""Whether two plans are cuts of one model, as far as its callers can tell. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from onnxsplit.plan import Plan, TensorSpec
from onnxsplit.plan_decoder import Decoder


def why_another_model(present: Plan, other: Plan) -> str | None:
    """Why requests for one plan could be refused, or answered differently, by another; None if nothing says so.

    Args:
        present: the plan that takes requests.
        other: the plan that is to take them.
    """
    return next(_differences(present, other), None)


def _differences(present: Plan, other: Plan) -> Iterator[str]:
    for kind, names, found in (("inputs", present.inputs, other.inputs), ("outputs", present.outputs, other.outputs)):
        if set(names) != set(found):
            yield f"it has the {kind} {', '.join(found)}, and this pipeline's are {', '.join(names)}"
    for name in (*present.inputs, *present.outputs):
        if name in other.tensors and _spec(present.tensors[name]) != _spec(other.tensors[name]):
            yield f"its {name!r} is {_said(other.tensors[name])}, and this pipeline's is {_said(present.tensors[name])}"
    for name in (*present.inputs, *present.outputs):
        if name in other.tensors and present.tensors[name].batch_axis != other.tensors[name].batch_axis:
            yield (
                f"the batch axis of {name!r} is {other.tensors[name].batch_axis} in it, and "
                f"{present.tensors[name].batch_axis} in the present plan"
            )
    if present.defaults.keys() != other.defaults.keys():
        yield "other inputs have defaults"
    if {one.sha256 for one in present.custom_ops} != {one.sha256 for one in other.custom_ops}:
        yield "it needs other libraries of custom ops"
    if (present.decoder is None) != (other.decoder is None):
        yield f"it has {'no' if other.decoder is None else 'a'} decoder, unlike the present plan"
    if present.decoder is not None and other.decoder is not None and _claim(present.decoder) != _claim(other.decoder):
        yield "its decoder has other states, controls or tokens"


def _spec(spec: TensorSpec) -> tuple[object, ...]:
    return spec.dtype, spec.shape


def _said(spec: TensorSpec) -> str:
    shape = "of any rank" if spec.shape is None else f"[{', '.join(map(str, spec.shape))}]"
    return f"{spec.dtype} {shape}"


def _claim(decoder: Decoder) -> tuple[object, ...]:
    """What the callers of a decoder see, and what does not depend on where the model is cut."""
    states = {(state.past, state.present, state.kind, state.shape, state.capacity) for state in decoder.states}
    return states, set(decoder.controls), decoder.scores, decoder.vocabulary, decoder.max_length, decoder.end_tokens
