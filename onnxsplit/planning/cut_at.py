"""Cutting at the tensors that the user names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from onnxsplit.errors import PartitionError
from onnxsplit.model.dominant_op import explain_dominant_op
from onnxsplit.plan import CALLER
from onnxsplit.planning.subject import Subject

_NEAREST = 3  # tensors that a message suggests


def assignment_at(subject: Subject, tensors: Sequence[str]) -> tuple[int, ...]:
    """The stage of every atom if stages begin where these tensors are read.

    The stage of an atom is the largest number of named tensors on a path to it. So consecutive tensors make one
    boundary each, and parallel tensors make one boundary together.

    Raises:
        PartitionError: a tensor cannot be cut; names the nearest tensors that can.
    """
    check_cuts(subject, tensors)
    level = [0] * len(subject.atoms.ops)
    for edge in sorted(subject.atoms.edges, key=lambda edge: edge.writer):
        if edge.writer != CALLER:
            after = level[edge.writer] + (edge.tensor in tensors)
            for reader in edge.readers:
                level[reader] = max(level[reader], after)
    return tuple(level)


def check_cuts(subject: Subject, tensors: Sequence[str]) -> None:
    """Refuse tensors that cannot be cut.

    Raises:
        PartitionError: names each of them, the reason, and the nearest tensors that can be cut.
    """
    legal = {edge.tensor for edge in subject.atoms.edges if edge.writer != CALLER and edge.readers}
    refused = [
        f"{name!r}, which {_why_not(subject, name, legal)}{_instead(subject, name, legal)}"
        for name in tensors
        if name not in legal
    ]
    if refused:
        raise PartitionError("cannot cut at " + "; ".join(refused))


def _why_not(subject: Subject, name: str, legal: set[str]) -> str:
    """Why a name that the user gave cannot be cut at."""
    graph = subject.graph
    if name in graph.inputs:
        return "is an input of the model: every stage that reads it takes it from the caller"
    if name in graph.constants:
        return "is a constant of the model: every stage that reads it holds a copy"
    if name not in graph.producer:
        return _not_a_tensor(subject, name, legal)
    if graph.producer[name] in subject.atoms.copied:
        return "is copied into every stage that reads it (a constant, or dequantised there)"
    if name not in graph.readers:
        return "is read by no op" + (": it is an output of the model" if name in graph.outputs else "")
    return "joins ops that must stay together"


def _not_a_tensor(subject: Subject, name: str, legal: set[str]) -> str:
    """Why a name that is not a tensor cannot be cut at, such as the name of an op."""
    named = [op for op in subject.graph.ops if op.name == name or op.op_type == name]
    outputs = [output for op in named for output in op.outputs]
    if not named:
        return "is not a tensor of the model's main graph"
    what = "is the name of an op" if any(op.name == name for op in named) else "is a type of ops"
    possible = [output for output in outputs if output in legal]
    if possible:
        return f"{what}, not of a tensor; name one of its outputs: {_listed(possible)}"
    return f"{what}, not of a tensor, and its outputs ({_listed(outputs)}) cannot be cut either"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NEAREST} more" if len(names) > _NEAREST else ""
    return ", ".join(names[:_NEAREST]) + more


def _instead(subject: Subject, name: str, legal: set[str]) -> str:
    """The end of a message: the nearest tensors that can be cut."""
    if not legal:
        why = explain_dominant_op(subject.graph)
        return f". This model cannot be cut at all: {why}" if why else ". This model cannot be cut at all"
    graph = subject.graph
    producer = graph.producer
    named = [op for op in graph.ops if op.name == name]
    if name in producer or name in graph.readers or named:
        place = producer.get(name, named[0].index if named else min(graph.readers.get(name, (0,))))
        nearest = sorted(legal, key=lambda other: (abs(producer[other] - place), producer[other], other))[:_NEAREST]
    else:
        nearest = difflib.get_close_matches(name, legal, _NEAREST) or sorted(legal, key=producer.__getitem__)[:_NEAREST]
    return f". The nearest that can: {', '.join(nearest)}"
