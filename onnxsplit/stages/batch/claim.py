"""A claim about batches, from the structure of a model: the batch axis of each tensor, or why there is none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from onnxsplit.errors import shown
from onnxsplit.model.dimensions import free_dimensions
from onnxsplit.model.graph import OpGraph
from onnxsplit.model.shapes import annotated
from onnxsplit.plan import TensorSpec
from onnxsplit.stages.batch.facts import SAME, Dependence, Fact, Sizes, rows
from onnxsplit.stages.batch.refine import refined
from onnxsplit.stages.batch.trials import Axes
from onnxsplit.stages.batch.walk import Learned, Walk, graph_sizes

_BATCH_NAME = re.compile(r"batch|^n$|^b$", re.IGNORECASE)
_MOST_CANDIDATES = 8
_MOST_ROUNDS = 10  # rounds of a walk and then shape inference; each gets at least one op further


@dataclass(frozen=True)
class Claim:
    """What the structure proves for one choice of the inputs' batch axes.

    Attributes:
        axes: the batch axis of each input, output and inner tensor for which it is proven; empty if an output fails.
        why_not: why the claim does not hold; empty if it holds.
    """

    axes: Axes
    why_not: str = ""


def candidates(specs: Mapping[str, TensorSpec]) -> list[Axes]:
    """Choices of the inputs' batch axes, the most likely first.

    They are: all free leading axes; each dimension whose name suggests a batch; all free leading axes, with the second
    axes of inputs that have no free leading axis (recurrent states); and each other dimension.
    """
    free = free_dimensions(specs)
    leading = {owner: 0 for where in free.values() for owner, axis in where if axis == 0}
    second = {owner: 1 for where in free.values() for owner, axis in where if axis == 1 and owner not in leading}
    choices: list[Axes] = [leading] if leading else []
    by_name = sorted(free.items(), key=lambda item: min(axis for _, axis in item[1]))
    choices += [dict(where) for name, where in by_name if _BATCH_NAME.search(name)]
    if leading and second:
        choices.append({**second, **leading})
    choices += [dict(where) for _, where in by_name]
    return [axes for place, axes in enumerate(choices) if axes not in choices[:place]][:_MOST_CANDIDATES]


class Structure:
    """A model's structure at one binding of its free dimensions.

    Args:
        graph: the model.
        inputs: shapes of the inputs by name.
        seen: shapes of other tensors by name, as a run showed them.
    """

    def __init__(self, graph: OpGraph, inputs: Sizes, seen: Sizes) -> None:
        self._graph = graph
        self._inputs = inputs
        self._seen = {**seen, **inputs}
        self._model = annotated(graph, inputs)

    def claim(self, axes: Axes) -> Claim:
        """Prove the batch axes of all tensors, if the inputs carry rows along these axes."""
        batch = {self._inputs[name][axis] for name, axis in axes.items()}
        if len(batch) != 1:
            return Claim({}, "the inputs have unequal numbers of rows")
        given = {name: rows(axes[name]) if name in axes else SAME for name in self._inputs}
        model, count = onnx.ModelProto(), batch.pop()
        model.CopyFrom(self._model)
        for _ in range(_MOST_ROUNDS):
            facts, learned = self._walk(model, given, count)
            why = next(self._failures(facts), "")
            if not why:
                return Claim({n: f.axis for n, f in facts.items() if _one_a_row(f)})
            better = refined(model, learned)
            if better is None:
                break
            model = better
        return Claim({}, why)

    def _walk(self, model: onnx.ModelProto, given: Mapping[str, Fact], count: int) -> tuple[dict[str, Fact], Learned]:
        opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
        walk, graph = Walk(opsets=opsets, batch=count), model.graph
        return walk.over(graph, graph.node, given, {**graph_sizes(graph), **self._seen}), walk.learned

    def _failures(self, facts: Mapping[str, Fact]) -> Iterator[str]:
        for name in self._graph.outputs:
            fact = facts.get(name, SAME)
            if fact.kind is Dependence.MIXED:
                yield fact.why
            elif fact.kind is not Dependence.ROWS:
                yield f"the output {shown(name)} does not carry the rows: {fact.kind.value}"
            elif fact.per_row != 1:
                yield f"the output {shown(name)} has {fact.per_row} entries for each row along axis {fact.axis}"


def _one_a_row(fact: Fact) -> bool:
    return fact.kind is Dependence.ROWS and fact.per_row == 1
