"""A walk over the ops of a model that follows the rows of a batch by :mod:`onnxsplit.stages.batch.rules`.

The walk proves along which axis each tensor carries rows, or names the op that mixes them. It relies only on the rules
and on the shapes at one binding of the free dimensions; an op without a rule counts as mixing rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from onnxsplit.errors import shown
from onnxsplit.model.protobuf import defined_names, nested_graphs
from onnxsplit.stages.batch.evaluate import evaluate, widened
from onnxsplit.stages.batch.facts import (
    HAVE_AXIS,
    SAME,
    Call,
    Dependence,
    Fact,
    Mixes,
    Sizes,
    known,
    stored,
    without_values,
)
from onnxsplit.stages.batch.linear import MOST_ELEMENTS, Undecided, Values
from onnxsplit.stages.batch.numbered import about_numbers, numbered, numbers_of_rows
from onnxsplit.stages.batch.rules import RULES

Learned = list[tuple[onnx.GraphProto, str, Values | onnx.ValueInfoProto]]
"""Tensors by graph and name, with their numbers, or with the shape that the only branch that runs gives them."""

_DOMAINS = frozenset(["", "ai.onnx", "ai.onnx.ml", "com.microsoft"])
_NOT_BY_NAME = frozenset([("com.microsoft", "Attention")])  # ops that share a name with a different op of ONNX
_RANDOM = frozenset(
    ["RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"]
)


@dataclass(frozen=True)
class Walk:
    """A walk over one graph.

    Attributes:
        opsets: version by domain.
        batch: number of rows in the given shapes.
        learned: filled by the walk with facts that shape inference did not know.
    """

    opsets: Mapping[str, int]
    batch: int
    learned: Learned = field(default_factory=list)

    def over(
        self, graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto], given: Mapping[str, Fact], sizes: Sizes
    ) -> dict[str, Fact]:
        """The facts of all tensors of a graph, by name.

        Args:
            graph: the graph with its stored tensors.
            nodes: its ops in topological order.
            given: facts of its inputs, and of the tensors that its ops capture from outside.
            sizes: shapes of its tensors and of those that it captures.
        """
        facts = dict(given)
        for tensor in graph.initializer:
            numbers = stored(tensor, MOST_ELEMENTS)
            facts[tensor.name] = SAME if numbers is None else known(numbers)
        for sparse in graph.sparse_initializer:
            facts[sparse.values.name] = SAME
        for node in nodes:
            outputs = self._outputs(graph, node, facts, sizes)
            for name, fact in zip(node.output, outputs, strict=True):
                if name:
                    facts[name] = self._checked(name, fact, sizes)
        return facts

    def _outputs(
        self, graph: onnx.GraphProto, node: onnx.NodeProto, facts: Mapping[str, Fact], sizes: Sizes
    ) -> Sequence[Fact]:
        count = len(node.output)
        reads = [facts.get(name, _UNKNOWN) if name else None for name in node.input]
        mixed = next((fact for fact in reads if fact is not None and fact.kind is Dependence.MIXED), None)
        if mixed is not None:
            return [mixed] * count
        try:
            if any(True for _ in nested_graphs(node)):
                return self._with_bodies(graph, node, facts, sizes)
            outputs = self._one(node, reads, sizes)
            self._learn_numbers(graph, node, outputs)
        except Mixes as reason:
            return [_ended(node, str(reason))] * count
        except (
            Undecided,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            AssertionError,
        ):  # an op in a form that no rule knows
            return [_ended(node, "its effect on the rows is not known")] * count
        return [outputs] * count if isinstance(outputs, Fact) else outputs

    def _one(self, node: onnx.NodeProto, reads: Sequence[Fact | None], sizes: Sizes) -> Fact | Sequence[Fact]:
        if node.op_type in _RANDOM or (node.op_type == "Dropout" and not _is_known_false(reads[2:])):
            raise Mixes("it draws random numbers")
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            return _constant(node)
        call = Call(
            node=node,
            opset=self.opsets.get("" if node.domain == "ai.onnx" else node.domain, 1),
            facts=reads,
            shapes=[sizes.get(name) for name in node.input],
        )
        usual = node.domain in _DOMAINS and (node.domain, node.op_type) not in _NOT_BY_NAME
        kinds = {fact.kind for fact in reads if fact is not None}
        numbers = evaluate(call) if usual else None
        if numbers is not None:
            return known(numbers)
        if kinds <= {Dependence.SAME}:
            return SAME
        if not usual or (kinds & HAVE_AXIS and node.op_type not in RULES):
            raise Mixes("it is not known to keep rows apart")
        if about_numbers(reads):
            return numbered(call)
        if Dependence.ROWS not in kinds:
            return numbers_of_rows(call) if node.op_type == "Range" else widened(call)
        return RULES[node.op_type](call)

    def _checked(self, name: str, fact: Fact, sizes: Sizes) -> Fact:
        """The fact, or a mixed one if the tensor's known shape contradicts it."""
        shape = sizes.get(name)
        if fact.kind not in HAVE_AXIS or shape is None:
            return fact
        if fact.axis < len(shape) and shape[fact.axis] == fact.per_row * self.batch:
            return fact
        return Fact(Dependence.MIXED, why=f"the shape of {shown(name)} does not follow the number of rows")

    def _with_bodies(
        self, graph: onnx.GraphProto, node: onnx.NodeProto, facts: Mapping[str, Fact], sizes: Sizes
    ) -> Sequence[Fact]:
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("If", "Loop"):
            raise Mixes("it runs a body for parts of its inputs")
        return self._if(graph, node, facts, sizes) if node.op_type == "If" else self._loop(node, facts, sizes)

    def _if(
        self, graph: onnx.GraphProto, node: onnx.NodeProto, facts: Mapping[str, Fact], sizes: Sizes
    ) -> Sequence[Fact]:
        test = facts.get(node.input[0], _UNKNOWN)
        if test.kind is not Dependence.SAME:
            raise Mixes("which of its branches runs depends on the batch")
        bodies = {a.name: a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}
        if test.values is not None:
            bodies = {name: g for name, g in bodies.items() if (name == "then_branch") == bool(test.values.flat[0])}
        branches = [self._body(body, facts, {}, sizes) for body in bodies.values()]
        if len(bodies) == 1:
            self._learn_shapes(graph, node, next(iter(bodies.values())))
        return [_agreed(outputs) for outputs in zip(*branches, strict=True)]

    def _learn_numbers(self, graph: onnx.GraphProto, node: onnx.NodeProto, outputs: Fact | Sequence[Fact]) -> None:
        if (
            isinstance(outputs, Fact)
            and outputs.kind is Dependence.SAME
            and outputs.values is not None
            and outputs.values.size
        ):
            self.learned.append((graph, node.output[0], outputs.values))

    def _learn_shapes(self, graph: onnx.GraphProto, node: onnx.NodeProto, body: onnx.GraphProto) -> None:
        inside = {value.name: value for value in (*body.input, *body.value_info, *body.output)}
        for name, value in zip(node.output, body.output, strict=True):
            if name and value.name in graph_sizes(body):
                declared = onnx.ValueInfoProto()
                declared.CopyFrom(inside[value.name])
                declared.name = name
                self.learned.append((graph, name, declared))

    def _loop(self, node: onnx.NodeProto, facts: Mapping[str, Fact], sizes: Sizes) -> Sequence[Fact]:
        body = next(a.g for a in node.attribute if a.name == "body")
        for name in node.input[:2]:
            if name and facts.get(name, _UNKNOWN).kind is not Dependence.SAME:
                raise Mixes("how often it runs depends on the batch")
        carried = [without_values(facts.get(name, _UNKNOWN)) for name in node.input[2:]]
        formal = [value.name for value in body.input]
        given = dict(zip(formal, [SAME, SAME, *carried], strict=True))
        outputs = self._body(body, facts, given, sizes)
        if outputs[0].kind is not Dependence.SAME:
            raise Mixes("how often it runs depends on the rows")
        after = [without_values(fact) for fact in outputs[1 : 1 + len(carried)]]
        for before, fact in zip(carried, after, strict=True):
            if fact.kind is Dependence.MIXED:
                return [fact] * len(node.output)
            if fact != before or fact.kind is Dependence.SIZE:
                raise Mixes("a tensor that it carries from one round to the next changes its axis of rows")
        stacked = [replace(f, axis=f.axis + 1) if f.kind is Dependence.ROWS else f for f in outputs[1 + len(carried) :]]
        return [*after, *(without_values(fact) for fact in stacked)]

    def _body(
        self, body: onnx.GraphProto, facts: Mapping[str, Fact], given: Mapping[str, Fact], sizes: Sizes
    ) -> list[Fact]:
        own = defined_names(body)
        outside = {name: size for name, size in sizes.items() if name not in own}
        inside = self.over(body, body.node, {**facts, **given}, {**outside, **graph_sizes(body)})
        return [inside.get(value.name, _UNKNOWN) for value in body.output]


def _is_known_false(flag: Sequence[Fact | None]) -> bool:
    """Whether an optional flag is left out, or known to be false."""
    fact = flag[0] if flag else None
    return fact is None or (fact.values is not None and not any(fact.values.flat))


_UNKNOWN = Fact(Dependence.MIXED, why="it reads a tensor that was not followed")


def _ended(node: onnx.NodeProto, reason: str) -> Fact:
    name = node.name or next((output for output in node.output if output), "")
    return Fact(Dependence.MIXED, why=f"op {shown(name)} ({node.op_type}): {reason}")


def _agreed(outputs: Sequence[Fact]) -> Fact:
    """The fact that holds for all branches."""
    for fact in outputs:
        if fact.kind is Dependence.MIXED:
            return fact
    if len(outputs) == 1:
        return outputs[0]
    if any(fact != outputs[0] or fact.kind is Dependence.SIZE for fact in outputs):
        raise Mixes("its branches treat the rows differently")
    return without_values(outputs[0])


def _constant(node: onnx.NodeProto) -> Fact:
    for attribute in node.attribute:
        if attribute.name == "value":
            numbers = stored(attribute.t, MOST_ELEMENTS)
            return SAME if numbers is None else known(numbers)
        if attribute.name in ("value_int", "value_ints", "value_float", "value_floats"):
            numbers = np.array(onnx.helper.get_attribute_value(attribute), dtype=object)
            return known(numbers) if numbers.size <= MOST_ELEMENTS else SAME
    return SAME


def graph_sizes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """The complete shapes that a graph declares or that inference found in it, by tensor."""
    sizes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        whole = all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in tensor.shape.dim)
        if value.type.WhichOneof("value") == "tensor_type" and tensor.HasField("shape") and whole:
            sizes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return {**{tensor.name: tuple(tensor.dims) for tensor in graph.initializer}, **sizes}
