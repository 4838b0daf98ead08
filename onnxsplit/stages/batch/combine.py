"""Rules for ops that combine several inputs, and rules built from other rules.

A rule is called only if an input carries rows and no input is mixed. It returns a fact about the outputs (one for all
of them, or one for each), or raises :class:`~onnxsplit.stages.batch.facts.Mixes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxsplit.stages.batch.facts import Call, Dependence, Fact, Mixes, rows

Rule = Callable[[Call], Fact | Sequence[Fact]]
"""Takes an op with the facts of its inputs, and returns the facts of its outputs."""


def elementwise(call: Call) -> Fact:
    """Elementwise ops: each element of the output depends on the elements of all inputs in the same place."""
    return together(call, range(len(call.facts)))


def together(call: Call, indices: Sequence[int]) -> Fact:
    """Inputs at ``indices`` are combined by broadcasting; all other inputs must be the same for every batch."""
    call.others_same(*indices)
    given = [index for index in indices if call.fact(index) is not None]
    if any(call.facts[index].kind is Dependence.SIZE for index in given):  # type: ignore[union-attr]
        raise Mixes("it computes with the number of rows")
    carried = {(fact.axis - call.rank(i), fact.per_row) for i in given if call.carries(i) for fact in [call.require(i)]}
    if len(carried) != 1:
        raise Mixes("it combines rows that lie along different axes")
    back, per_row = carried.pop()
    for index in given:
        if not call.carries(index) and call.rank(index) >= -back and call.shape(index)[back] != 1:
            raise Mixes(f"its input {index} has {call.shape(index)[back]} entries along the axis of the rows")
    return rows(max(call.rank(index) for index in given) + back, per_row)


def first_alone(call: Call) -> Fact:
    """Ops that are elementwise in the first input; the others are parameters that must be the same for every batch."""
    call.others_same(0)
    fact = call.require(0)
    return rows(fact.axis, fact.per_row)


def leading(*carriers: int) -> Rule:
    """Ops whose rows lie along the first axis of the first input, of the other ``carriers``, and of the outputs."""

    def rule(call: Call) -> Fact:
        call.others_same(*carriers)
        first = call.require(0)
        for index in carriers:
            fact = call.fact(index)
            if fact is None:
                continue
            if fact.kind is Dependence.SAME:
                if call.rank(index) and call.shape(index)[0] != 1:
                    raise Mixes(
                        f"its input {index} is the same for every batch, and has {call.shape(index)[0]} entries"
                    )
                continue
            if fact.kind is not Dependence.ROWS or (fact.axis, fact.per_row) != (0, first.per_row):
                raise Mixes("its rows do not lie along the first axis of every input")
        return rows(0, first.per_row)

    return rule


def all_leading(*carriers: int) -> Rule:
    """Like :func:`leading`, but each of the ``carriers`` that is given must carry rows."""

    def rule(call: Call) -> Fact:
        for index in carriers:
            if call.fact(index) is not None:
                call.require(index)
        fact = leading(*carriers)(call)
        assert isinstance(fact, Fact)
        return fact

    return rule


def only_rank(rank: int, rule: Rule) -> Rule:
    """A rule that holds only if the first input has this rank."""

    def checked(call: Call) -> Fact | Sequence[Fact]:
        if call.rank(0) != rank:
            raise Mixes(f"its input has the rank {call.rank(0)}; rows are known to stay apart only for rank {rank}")
        return rule(call)

    return checked


def first_output(rule: Rule) -> Rule:
    """A rule that holds for the first output only; further outputs depend on the whole batch."""

    def checked(call: Call) -> Sequence[Fact]:
        outputs = rule(call)
        first = outputs if isinstance(outputs, Fact) else outputs[0]
        rest = Fact(Dependence.MIXED, why=f"a further output of {call.node.op_type} depends on the whole batch")
        return [first, *[rest] * (len(call.node.output) - 1)]

    return checked
