"""Numbers that would cross in int8 borders of a model, to see how well they can be compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnxsplit.errors import ModelError, PartitionError
from onnxsplit.planning.border_rules import border_forms
from onnxsplit.planning.examine import examine
from onnxsplit.session import open_session
from onnxsplit.stages.borders import numbers
from onnxsplit.stages.extract import stage_model
from onnxsplit.stages.model_file import serialized
from onnxsplit.stages.parts import whole_parts

_MOST_TENSORS = 8
_MOST_BYTES = 512 << 10  # of each tensor
_LEAST_BYTES = 16 << 10  # smaller ones are not compressed


def border_sample(
    model: str | Path, *, dims: Mapping[str, int] | None = None, custom_ops: object = ()
) -> tuple[bytes, ...]:
    """The numbers of some int8 borders that a cut of a model can have, on its example inputs.

    They are those of a few tensors, chosen at random. A regular choice could miss all tensors behind a ReLU.

    Args:
        model: the path of the model's file.
        dims: sizes of free dimensions.
        custom_ops: libraries of custom ops.

    Returns:
        The numbers of each tensor; empty if none can cross as int8 or the model does not run here.
    """
    subject = examine(model, costs="analytic", dims=dims, custom_ops=custom_ops)
    try:
        forms = border_forms(subject, "int8", 1.0)
    except PartitionError:
        return ()
    assert forms is not None
    large = [name for name in forms.forms if forms.bytes(name, "float32") > 4 * _LEAST_BYTES]
    chosen = [large[number] for number in np.random.default_rng(0).permutation(len(large))[:_MOST_TENSORS]]
    if not chosen:
        return ()
    graph = subject.graph
    try:
        proto = stage_model(graph, subject.shapes, replace(whole_parts(graph), outputs=tuple(chosen)))
        session = open_session(
            serialized(proto), threads=1, external_data_folder=graph.source.path.parent, custom_ops=subject.custom_ops
        )
        found = session.run({name: subject.inputs[name] for name, _ in session.inputs})
    except (ModelError, PartitionError):
        return ()
    return tuple(numbers(found[name], forms.rows[name]).tobytes()[:_MOST_BYTES] for name in chosen)
