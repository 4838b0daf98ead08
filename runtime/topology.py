"""Which stages send to which, and which tensors cross: read from the plan alone."""

from __future__ import annotations

from onnxsplit.plan import CALLER, Plan

ReplicaKey = tuple[int, int]
"""A stage and a replica of it, both counted from 0."""


def sources(plan: Plan, stage: int) -> frozenset[int]:
    """Who sends a fragment of every request to a stage: stages, and the caller where it reads an input of the model.

    A stage that reads nothing is set going by the caller.
    """
    writers = plan.producers()
    found = {writers.get(name, CALLER) for name in plan.stages[stage].inputs}
    return frozenset(found or {CALLER})


def expected_tensors(plan: Plan, stage: int) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Names and types of what each source sends to a stage."""
    found = {}
    for source in sources(plan, stage):
        if source == CALLER:
            names = tuple(name for name in plan.stages[stage].inputs if name in plan.inputs)
        else:
            names = tuple(n for n in plan.stages[source].outputs if n in plan.stages[stage].inputs)
        found[source] = names, tuple(plan.tensors[name].dtype for name in names)
    return found
