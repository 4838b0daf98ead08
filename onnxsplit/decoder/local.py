"""Which ops of a decoder every stage computes for itself, and which ops must share a stage.

*Local* ops read controls, constants, and the shapes of states and tokens only: masks, tables of rotary embeddings,
lengths. Every stage that reads them holds a copy, so that what they compute does not cross.

An op that reads a state and the op that writes it share a stage. So do the writer and the readers of a tensor that
depends on what states hold, and whose size grows with the length of a sequence. So no state crosses, and nothing of its
size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from onnxsplit.decoder.claim import DecoderClaim
from onnxsplit.decoder.constants import Constants
from onnxsplit.decoder.op_slots import attribute
from onnxsplit.model.graph import Op, OpGraph
from onnxsplit.model.op_kinds import is_random
from onnxsplit.model.protobuf import functions_of
from onnxsplit.plan import TensorSpec

_MOST_SHARE = 0.0025  # of the time of the whole model: 1 % of the time of one of four stages
_CHEAP_NS = 50_000  # an op that takes less than a hop between processes is always copied
_MOST_WEIGHT_SHARE = 0.01
_SMALL_BYTES = 4 << 20


def control_ops(graph: OpGraph, claim: DecoderClaim) -> frozenset[int]:
    """The ops whose results follow from controls, constants, and the shapes of states and tokens alone."""
    tokens = {control.input for control in claim.controls if control.role == "tokens"}
    known = {control.input for control in claim.controls} - tokens | graph.constants.keys()
    measured = known | tokens | {state.past for state in claim.states}
    functions = functions_of(graph.source.proto)
    outputs = set(graph.outputs)
    found: set[int] = set()
    for op in graph.ops:
        allowed = measured if _asks_shape(op) else known
        constant = op.index in graph.constant_ops
        exact = constant or not (op.index in graph.custom_ops or is_random(op.node, functions))
        if exact and allowed.issuperset(op.reads) and outputs.isdisjoint(op.outputs):
            known.update(op.outputs)
            measured.update(op.outputs)
            if not constant:
                found.add(op.index)
    return frozenset(found)


def cheap_ops(graph: OpGraph, ops: Collection[int], op_ns: Sequence[int]) -> frozenset[int]:
    """Those of some ops that may be copied into several stages: neither they nor their constants are large.

    Args:
        graph: the model.
        ops: the ops by index.
        op_ns: time of each op of the model in nanoseconds.
    """
    most_ns = max(_CHEAP_NS, int(sum(op_ns) * _MOST_SHARE))
    most_bytes = max(_SMALL_BYTES, int(sum(graph.constants.values()) * _MOST_WEIGHT_SHARE))
    return frozenset(
        op
        for op in ops
        if op_ns[op] <= most_ns and sum(graph.constants.get(name, 0) for name in graph.ops[op].reads) <= most_bytes
    )


def ops_together(
    graph: OpGraph,
    claim: DecoderClaim,
    free: Collection[int],
    sizes: Mapping[str, tuple[int, ...]],
    other_sizes: Mapping[str, tuple[int, ...]],
    alike: Mapping[str, int],
) -> list[list[int]]:
    """Groups of ops that must share a stage.

    Args:
        graph: the model.
        claim: its states and controls.
        free: the ops that :func:`control_ops` finds.
        sizes: shapes of the tensors in a step, by name.
        other_sizes: the same in a step at another length, and else alike.
        alike: what :func:`states_alike` finds.
    """
    groups = []
    held: dict[int, set[int]] = {}
    for state in claim.states:
        ends = [*graph.readers.get(state.past, ()), *graph.readers.get(state.present, ())]
        groups.append([graph.producer[state.present], *ends] if state.present in graph.producer else ends)
        held.setdefault(alike[state.past], set()).update(op for op in groups[-1] if op not in free)
    behind = _behind_states(graph, claim, free)
    growing = {name for name, size in sizes.items() if name in other_sizes and other_sizes[name] != size}
    groups += [
        [op.index, *graph.readers.get(name, ())]
        for op in graph.ops
        if op.index in behind
        for name in op.outputs
        if name in growing
    ]
    groups += [
        [op, near]
        for op, asked in _asking(graph, alike, free).items()
        for number in sorted(asked)
        if (near := _nearest(graph, op, held[number], free)) is not None
    ]
    return [kept for group in groups if len(kept := [op for op in group if op not in free]) > 1]


def _behind_states(graph: OpGraph, claim: DecoderClaim, free: Collection[int]) -> set[int]:
    """The ops whose results depend on what states hold, not only on their shapes."""
    held = {state.past for state in claim.states}
    found: set[int] = set()
    for op in graph.ops:
        if op.index not in free and not _asks_shape(op) and not held.isdisjoint(op.reads):
            found.add(op.index)
            held.update(op.outputs)
    return found


def _asking(graph: OpGraph, alike: Mapping[str, int], free: Collection[int]) -> dict[int, set[int]]:
    """The ops that read what follows from the shapes of states, with the groups of these states.

    A stage with such an op needs a state of each of the groups, whose shape it asks for instead.
    """
    asked: dict[str, set[int]] = {past: {number} for past, number in alike.items()}
    asking: dict[int, set[int]] = {}
    for op in graph.ops:
        if op.index in free:
            numbers = set().union(*(asked.get(name, ()) for name in op.reads))
            asked.update(dict.fromkeys(op.outputs, numbers))
        else:
            numbers = set().union(*(asked.get(name, ()) for name in op.reads if name not in alike))
            if numbers:
                asking[op.index] = numbers
    return asking


def _nearest(graph: OpGraph, op: int, held: Collection[int], free: Collection[int]) -> int | None:
    """The op with a state that is fewest ops away, in either direction; None if there is none."""
    seen, near = {op}, [op]
    while near:
        for one in near:
            if one in held:
                return one
        steps = sorted({n for one in near for n in (*graph.digraph.pred[one], *graph.digraph.succ[one])} - seen)
        near = [one for one in steps if one not in free and one not in graph.constant_ops]
        seen.update(near)
    return None


def states_alike(graph: OpGraph, claim: DecoderClaim, specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """The number of a group for each state; of states of one group, all sizes that ops ask for are the same."""
    numbers: dict[object, int] = {}
    asked = _asked_axes(graph, {state.past: len(state.shape) for state in claim.states})
    return {
        state.past: numbers.setdefault(
            (
                (state.kind, state.batch_axis, state.axis, state.capacity, specs[state.past].dtype, len(state.shape)),
                tuple(size for axis, size in enumerate(state.shape) if axis in asked),
            ),
            len(numbers),
        )
        for state in claim.states
    }


def _asked_axes(graph: OpGraph, ranks: Mapping[str, int]) -> set[int]:
    """The axes whose sizes ops ask for, of some inputs with their ranks."""
    constants = Constants(graph)
    axes: set[int] = set()
    for op in graph.ops:
        rank = next((ranks[name] for name in op.reads if name in ranks), None)
        if rank is None or not _asks_shape(op):
            continue
        places = range(rank)
        if op.op_type == "Shape":
            places = places[slice(attribute(op, "start", 0), attribute(op, "end", rank))]
        picked = [
            constants.numbers(reader.node.input[1])
            if reader.op_type == "Gather" and attribute(reader, "axis", 0) == 0 and reader.node.input[0] in op.outputs
            else None
            for reader in (graph.ops[index] for name in op.outputs for index in graph.readers.get(name, ()))
        ]
        for numbers in picked if op.op_type == "Shape" else [None]:
            inside = range(-len(places), len(places))
            axes.update(places if numbers is None else [places[number] for number in numbers if number in inside])
    return axes


def _asks_shape(op: Op) -> bool:
    return op.domain in ("", "ai.onnx") and op.op_type in ("Shape", "Size")


def names_of(claim: DecoderClaim) -> frozenset[str]:
    """The inputs and outputs that do not cross in a step: states and controls."""
    states: Iterable[str] = (name for state in claim.states for name in (state.past, state.present))
    return frozenset(states) | {control.input for control in claim.controls}
