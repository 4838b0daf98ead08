"""A claim about rows, from the structure of a model: the batch axis of each tensor, or what speaks against it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onnxsplit.batch.facts import SAME, Fact, Kind, Sizes, rows
from onnxsplit.batch.walk import Walk, graph_sizes
from onnxsplit.errors import shown
from onnxsplit.graph import OpGraph
from onnxsplit.plan import TensorSpec
from onnxsplit.shapes import annotated, free_dimensions

Axes = Mapping[str, int]
"""The batch axis of the tensors that have one."""

_BATCH_NAME = re.compile(r"batch|^n$|^b$", re.IGNORECASE)
_MOST_CANDIDATES = 8


@dataclass(frozen=True)
class Claim:
    """What the structure says of one choice of axes of the inputs.

    Attributes:
        axes: of inputs, outputs and tensors between ops, where the structure proves them; empty when an output fails.
        why_not: what ends the claim; empty when it holds.
    """

    axes: Axes
    why_not: str = ""


def candidates(specs: Mapping[str, TensorSpec]) -> list[Axes]:
    """Axes of the inputs that may be the batch, likeliest first.

    All free leading axes at once; every dimension that is called a batch; all free leading axes with the second ones
    of inputs that have none (recurrent states); each other dimension.
    """
    free = free_dimensions(specs)
    leading = {owner: 0 for where in free.values() for owner, axis in where if axis == 0}
    second = {owner: 1 for where in free.values() for owner, axis in where if axis == 1 and owner not in leading}
    found: list[Axes] = [leading] if leading else []
    by_name = sorted(free.items(), key=lambda item: min(axis for _, axis in item[1]))
    found += [dict(where) for name, where in by_name if _BATCH_NAME.search(name)]
    if leading and second:
        found.append({**second, **leading})
    found += [dict(where) for _, where in by_name]
    return [axes for place, axes in enumerate(found) if axes not in found[:place]][:_MOST_CANDIDATES]


class Structure:
    """A model's structure at one binding of its free dimensions.

    Args:
        graph: the model.
        inputs: shapes of the inputs.
        seen: shapes of other tensors, from a run.
    """

    def __init__(self, graph: OpGraph, inputs: Sizes, seen: Sizes) -> None:
        self._graph = graph
        self._inputs = inputs
        self._model = annotated(graph, inputs)
        self._sizes = {**graph_sizes(self._model.graph), **seen, **inputs}

    def claim(self, axes: Axes) -> Claim:
        """What the structure proves when the inputs carry rows along these axes."""
        batch = {self._inputs[name][axis] for name, axis in axes.items()}
        if len(batch) != 1:
            return Claim({}, "the inputs have unequal numbers of rows")
        given = {name: rows(axes[name]) if name in axes else SAME for name in self._inputs}
        opsets = {
            entry.domain.removeprefix("ai.onnx") if entry.domain == "ai.onnx" else entry.domain: entry.version
            for entry in self._model.opset_import
        }
        walk = Walk(opsets=opsets, batch=batch.pop())
        facts = walk.over(self._model.graph, self._model.graph.node, given, self._sizes)
        why = next(self._failures(facts), "")
        return Claim({}, why) if why else Claim({n: f.axis for n, f in facts.items() if _one_a_row(f)})

    def _failures(self, facts: Mapping[str, Fact]) -> Iterator[str]:
        for name in self._graph.outputs:
            fact = facts.get(name, SAME)
            if fact.kind is Kind.MIXED:
                yield fact.why
            elif fact.kind is not Kind.ROWS:
                yield f"the output {shown(name)} is the same for every batch"
            elif fact.per_row != 1:
                yield f"the output {shown(name)} has {fact.per_row} entries for each row along axis {fact.axis}"


def _one_a_row(fact: Fact) -> bool:
    return fact.kind is Kind.ROWS and fact.per_row == 1
