"""Cutting exactly where the user says."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from onnxsplit.atoms import CALLER
from onnxsplit.errors import PartitionError
from onnxsplit.examine import Subject

_NEAREST = 3


def assignment_at(subject: Subject, tensors: Sequence[str]) -> tuple[int, ...]:
    """Stages that begin where these tensors are read.

    An atom's stage is the largest number of named tensors on a path to it, so tensors one after the other make one
    boundary each, and tensors side by side make one together.

    Raises:
        PartitionError: a tensor cannot be cut; names the nearest ones that can.
    """
    check_cuts(subject, tensors)
    level = [0] * len(subject.atoms.ops)
    for flow in sorted(subject.atoms.flows, key=lambda flow: flow.writer):
        if flow.writer != CALLER:
            after = level[flow.writer] + (flow.tensor in tensors)
            for reader in flow.readers:
                level[reader] = max(level[reader], after)
    return tuple(level)


def check_cuts(subject: Subject, tensors: Sequence[str]) -> None:
    """Refuse tensors that cannot be cut.

    Raises:
        PartitionError: naming the nearest ones that can.
    """
    legal = {flow.tensor for flow in subject.atoms.flows if flow.writer != CALLER and flow.readers}
    refused = [
        f"{name!r} {_why_not(subject, name)}. {_nearest(subject, name, legal)}" for name in tensors if name not in legal
    ]
    if refused:
        raise PartitionError("cannot cut at " + "; ".join(refused))


def _why_not(subject: Subject, name: str) -> str:
    graph = subject.graph
    if name in graph.inputs:
        return "is an input of the model"
    if name in graph.constants:
        return "is a constant"
    if name not in graph.producer:
        return "is no tensor of the model's main graph"
    if graph.producer[name] in subject.atoms.copied:
        return "is copied into every stage that reads it (a constant, or dequantised there)"
    if name not in graph.readers:
        return "is read by no op"
    return "ties ops that must stay together"


def _nearest(subject: Subject, name: str, legal: set[str]) -> str:
    if not legal:
        return "This model cannot be cut at all"
    producer = subject.graph.producer
    if name in producer or name in subject.graph.readers:
        place = producer.get(name, min(subject.graph.readers.get(name, (0,))))
        nearest = sorted(legal, key=lambda other: (abs(producer[other] - place), producer[other], other))[:_NEAREST]
    else:
        nearest = difflib.get_close_matches(name, legal, _NEAREST) or sorted(legal, key=producer.__getitem__)[:_NEAREST]
    return f"The nearest that can: {', '.join(nearest)}"
