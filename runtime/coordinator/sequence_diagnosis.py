"""Describes what sequences wait for. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.coordinator.diagnosis import awaited, stage_name
from runtime.coordinator.links import DeadLinks
from runtime.coordinator.roster import Roster
from runtime.coordinator.scheduler import Scheduler
from runtime.coordinator.sequence_limits import SequenceLimits
from runtime.coordinator.sequence_record import SequencePhase, SequenceRecord
from runtime.errors import StageUnavailable
from runtime.topology import StageGraph
from runtime.wire.messages.data import Step


class SequenceDiagnosis:
    """What the sequences of a pipeline wait for, in words.

    Args:
        graph: the stages.
        stages: the stages that run in a step.
        roster: the nodes.
        links: the dead links.
        limits: the limits of sequences.
        scheduler: the chains and the queue.
    """

    def __init__(
        self,
        graph: StageGraph,
        stages: tuple[int, ...],
        roster: Roster,
        links: DeadLinks,
        limits: SequenceLimits,
        scheduler: Scheduler,
    ) -> None:
        self._graph = graph
        self._stages = stages
        self._roster = roster
        self._links = links
        self._limits = limits
        self._scheduler = scheduler

    def crowd(self) -> str:
        """Why there is no room."""
        chains = list(self._scheduler.chains)
        running, most = sum(len(chain.sequences) for chain in chains), self._limits.rows * len(chains)
        return (
            f"there is no room for another sequence: {running} run, at most {most} do, within "
            f"{self._limits.cache_bytes} bytes of caches on each node, and {self._scheduler.waiting} wait"
        )

    def progress(self, steps: Mapping[int, Step]) -> str:
        """What a step is waiting for, and the dead links on its way."""
        blocked = self._links.on_way(self._stages, self._links.stories)
        return "; ".join([awaited(self._graph, self._roster, self._stages, steps), *blocked])

    def unavailable(self) -> StageUnavailable | None:
        """The error of sequences that wait for a stage whose nodes keep failing; None if there is no such stage."""
        for stage in self._stages:
            story = self._roster.broken(stage)
            if story is not None:
                return StageUnavailable(f"stage {stage} has no node: {story}")
        return None

    def delay(self, sequence: SequenceRecord, steps: Mapping[int, Step]) -> str:
        """What a sequence was waiting for when its time ran out."""
        absent = [stage for stage in self._stages if stage not in self._roster.served]
        if sequence.steps:
            return self.progress(steps)
        if sequence.phase is not SequencePhase.WAITING:
            return "its next step had not begun"
        if absent:
            return "it waited for a node of " + ", ".join(stage_name(self._roster, stage) for stage in absent)
        return self.crowd()
