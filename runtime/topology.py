"""The stages that send to each stage, and the tensors that they send, derived from the plan alone. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from onnxsplit.plan import CALLER, Plan
from runtime.wire.messages.data import ANY, NOT_NEEDED

ReplicaKey = tuple[int, int]
"""A stage and a replica of it, both counted from 0."""

_REMEMBERED = 1024


def sources(plan: Plan, stage: int) -> frozenset[int]:
    """The stages that send fragments to a stage, and the caller if the stage reads an input of the model.

    A stage that reads nothing is started by a fragment from the caller.
    """
    writers = plan.producers()
    senders = {writers.get(name, CALLER) for name in plan.stages[stage].inputs}
    return frozenset(senders or {CALLER})


def expected_tensors(plan: Plan, stage: int) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
    """The names and the types of the tensors that each source sends to a stage."""
    expected = {}
    for source in sources(plan, stage):
        if source == CALLER:
            names = tuple(name for name in plan.stages[stage].inputs if name in plan.inputs)
        else:
            names = tuple(n for n in plan.stages[source].outputs if n in plan.stages[stage].inputs)
        expected[source] = names, tuple(plan.tensors[name].dtype for name in names)
    return expected


def compressed_tensors(plan: Plan, stage: int) -> dict[int, frozenset[str]]:
    """For each stage to which tensors of a stage go compressed if they go to another host, the names of these."""
    found: dict[int, set[str]] = {}
    for border in plan.borders.tensors if plan.borders is not None else ():
        if border.tensor in plan.stages[stage].outputs:
            for reader in border.compressed:
                found.setdefault(reader, set()).add(border.wire[0])
    return {reader: frozenset(names) for reader, names in found.items()}


class StageGraph:
    """The stages of a plan as a graph, computed once.

    Attributes:
        stages: the indices of the stages, in topological order.
        senders: for each stage, the stages that send to it, and the caller: :func:`sources`.
        joins: the stages with several senders. All fragments of an attempt must meet at one replica of such a stage.
        readers: for each stage, the stages that read from it.
        targets: for each stage, its readers, and the caller where outputs of the model are made; for the caller, the
            stages that it sends to.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.stages = tuple(stage.index for stage in plan.stages)
        self.senders = {stage: sources(plan, stage) for stage in self.stages}
        self.joins = frozenset(stage for stage, senders in self.senders.items() if len(senders) > 1)
        self.readers = {
            s.index: frozenset(o.index for o in plan.stages if set(s.outputs) & set(o.inputs)) for s in plan.stages
        }
        self.targets: dict[int, frozenset[int]] = {
            stage: readers | ({CALLER} if set(plan.stages[stage].outputs) & set(plan.outputs) else set())
            for stage, readers in self.readers.items()
        }
        self.targets[CALLER] = frozenset(stage for stage in self.stages if CALLER in self.senders[stage])
        self._needed: dict[tuple[str, ...], frozenset[int]] = {}
        self._routes: dict[frozenset[int], tuple[int, ...]] = {}

    def needed(self, wanted: tuple[str, ...]) -> frozenset[int]:
        """The stages that must run for some tensors."""
        stages = self._needed.get(wanted)
        if stages is None:
            if len(self._needed) >= _REMEMBERED:
                self._needed.clear()
            stages = self._needed[wanted] = self._plan.stages_for(wanted)
        return stages

    def open_route(self, needed: frozenset[int]) -> tuple[int, ...]:
        """The route through some stages that leaves every choice of a replica open."""
        route = self._routes.get(needed)
        if route is None:
            route = self._routes[needed] = tuple(ANY if stage in needed else NOT_NEEDED for stage in self.stages)
        return route

    def outputs(self, stage: int) -> tuple[str, ...]:
        """The tensors that a stage makes."""
        return self._plan.stages[stage].outputs


class StepGraph:
    """How the steps of a decoder cross the stages of its plan: without states and without controls.

    A stage that needs no tensor of another stage gets the rows of a step from the caller.

    Attributes:
        stages: the stages that run in a step, in topological order.
        sources: for each of them, the stages that send to it, or the caller.
        readers: for each of them, the stages that read from it and the names of what they read.
        tail: the stage that writes the scores.
    """

    def __init__(self, plan: Plan) -> None:
        decoder = plan.decoder
        assert decoder is not None
        writers = plan.producers()
        ends = (decoder.scores, *(state.present for state in decoder.states))
        self.stages = tuple(sorted(plan.stages_for(ends)))
        self.tail = writers[decoder.scores]
        self._plan = plan
        self.sources = {stage: self._sources(stage, writers) for stage in self.stages}
        self.readers = {
            stage: {
                other: names
                for other in self.stages
                if (names := tuple(n for n in plan.stages[stage].outputs if n in plan.stages[other].inputs))
            }
            for stage in self.stages
        }

    def _sources(self, stage: int, writers: Mapping[str, int]) -> frozenset[int]:
        senders = {writers[name] for name in self._plan.stages[stage].inputs if name in writers}
        return frozenset(senders or {CALLER})

    def expected(self, stage: int) -> dict[int, tuple[tuple[str, ...], tuple[str, ...]]]:
        """The names and the types of the tensors that each source of a stage sends to it in a step."""
        found: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        for source in self.sources[stage]:
            names = () if source == CALLER else self.readers[source][stage]
            found[source] = names, tuple(self._plan.tensors[name].dtype for name in names)
        return found
