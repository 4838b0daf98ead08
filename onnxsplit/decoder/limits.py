"""The most positions that a model's tables have rows for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from onnxsplit.decoder.constants import Constants
from onnxsplit.decoder.op_slots import attribute, domain_of, table_slot
from onnxsplit.decoder.traces import Trace
from onnxsplit.model.graph import Op, OpGraph

_SAME_ROWS = frozenset({"Identity", "Cast", "DequantizeLinear", "Slice", "Squeeze", "Unsqueeze", "Reshape"})
_COUNTING = frozenset(  # ops that count positions and move them, and never fold many positions into few
    {"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Slice", "Gather", "Concat", "Where", "Equal"}
    | {"Add", "Sub", "Mul", "CumSum", "Range", "Constant", "ConstantOfShape", "ReduceSum"}
)
_MOST_STEPS = 8
_MOST_OPS = 64


class Tables:
    """The tables of a graph of which positions or tokens pick rows.

    Args:
        graph: the model.
        traces: what tensors are of the model's inputs.
    """

    def __init__(self, graph: OpGraph, traces: Mapping[str, Trace]) -> None:
        self._graph, self._traces = graph, traces
        self._constants = Constants(graph)

    def picked(self) -> dict[str, int]:
        """The number of rows of the smallest table that each input picks rows of, by input."""
        found: dict[str, int] = {}
        for op in self._graph.ops:
            for index, rows in self._lookups(op):
                trace = self._traces.get(index)
                if trace is not None and trace.kind is None and not trace.parts:
                    found[trace.source] = min(rows, found.get(trace.source, rows))
        return found

    def most_positions(self, tokens: str, counted: Collection[str]) -> int | None:
        """The number of rows of the smallest table that has a row for each position; None where there is none.

        Args:
            tokens: the input with the tokens; only its shape says something about positions.
            counted: inputs whose values count positions: masks, positions and lengths.
        """
        limits = []
        for op in self._graph.ops:
            slot = table_slot(op)
            if slot is not None and slot < len(op.node.input):
                limits.append(self._rows(op.node.input[slot], _MOST_STEPS))
            for index, rows in self._lookups(op):
                if self._counts(index, tokens, counted):
                    limits.append(rows - self._offset(index))
        return min((limit for limit in limits if limit is not None), default=None)

    def _lookups(self, op: Op) -> list[tuple[str, int]]:
        """The tensors by which an op picks rows of a constant table, with the number of rows."""
        kind, names = (domain_of(op), op.op_type), op.node.input
        axis = {("", "Gather"): "axis", ("com.microsoft", "GatherBlockQuantized"): "gather_axis"}.get(kind)
        if axis is not None and len(names) > 1:
            found = [(names[1], self._rows(names[0], _MOST_STEPS))] if attribute(op, axis, 0) == 0 else []
        elif kind == ("com.microsoft", "EmbedLayerNormalization") and len(names) > 2:
            found = [(names[0], self._rows(names[2], _MOST_STEPS))]
        else:
            return []
        return [(index, rows) for index, rows in found if rows is not None]

    def _rows(self, name: str, steps: int) -> int | None:
        """The rows of a constant table with two axes; further axes have size 1."""
        shape = self._constants.shape(name)
        if shape is not None:
            sizes = [size for size in shape if size != 1]
            return sizes[0] if len(sizes) == 2 else None
        index = self._graph.producer.get(name)
        op = self._graph.ops[index] if index is not None and steps > 0 else None
        if op is None or op.op_type not in _SAME_ROWS or not op.node.input:
            return None
        return self._rows(op.node.input[0], steps - 1)

    def _offset(self, name: str) -> int:
        """What is added to positions before they pick rows; OPT skips the first two."""
        added = 0
        for _ in range(_MOST_STEPS):
            index = self._graph.producer.get(name)
            op = self._graph.ops[index] if index is not None else None
            if op is None or op.op_type not in _SAME_ROWS | {"Add"} or not op.node.input:
                break
            name = op.node.input[0]
            if op.op_type == "Add" and len(op.node.input) == 2:
                amounts = [self._constants.numbers(one) for one in op.node.input]
                name = op.node.input[1 if amounts[0] is not None else 0]
                amount = next((one for one in amounts if one is not None), None)
                added += amount[0] if amount is not None and len(amount) == 1 else 0
        return max(added, 0)

    def _counts(self, name: str, tokens: str, counted: Collection[str]) -> bool:
        """Whether a tensor counts positions: it depends on shapes and on inputs that do so, by ops that only count."""
        pending, seen, ends = [name], set[str](), 0
        while pending:
            one = pending.pop()
            if one in seen or one == "":
                continue
            seen.add(one)
            if len(seen) > _MOST_OPS or one == tokens:
                return False
            index = self._graph.producer.get(one)
            if index is None:
                if one not in self._graph.constants and one not in counted:
                    return False
                ends += one in counted
                continue
            op = self._graph.ops[index]
            if op.op_type in ("Shape", "Size"):
                ends += 1
            elif op.op_type in _COUNTING and not domain_of(op):
                pending += op.node.input
            else:
                return False
        return ends > 0
