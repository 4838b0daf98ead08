"""The dead links, and the nodes that requests avoid because of them. Pure.

:mod:`runtime.coordinator.reach` finds the dead links. This module describes them, and finds the nodes to which no
request should be sent.
"""

from __future__ import annotations

from collections.abc import Collection

from onnxsplit.plan import CALLER
from runtime.coordinator.events import LinkChanged
from runtime.coordinator.reach import LinkKey, dead_ends
from runtime.coordinator.roster import Roster
from runtime.topology import StageGraph


class DeadLinks:
    """The links that are dead now.

    Args:
        graph: the stages.
        roster: the nodes.

    Attributes:
        stories: a description of each dead link, by the numbers of its sender and its receiver.
        data_address: where nodes send results.
    """

    def __init__(self, graph: StageGraph, roster: Roster) -> None:
        self.stories: dict[LinkKey, str] = {}
        self.data_address = ""
        self._graph = graph
        self._roster = roster

    @property
    def unreachable(self) -> str | None:
        """The dead links because of which no request can pass although every stage has a node; None when one can."""
        return "; ".join(self.stories.values()) if 0 in self.dead_ends() else None

    def dead_ends(self) -> frozenset[int]:
        """The numbers of the processes from which requests cannot get back to the caller."""
        nodes = {stage: self._roster.takers(stage) for stage in self._graph.stages}
        return dead_ends(self._graph.targets, nodes, self.stories.keys())

    def avoided(self, stage: int) -> frozenset[int]:
        """The nodes of a stage that some of its senders cannot reach."""
        senders = self._graph.senders[stage]
        return frozenset(
            receiver
            for sender, receiver in self.stories
            if self._stage_of(receiver) == stage and self._stage_of(sender) in senders
        )

    def _stage_of(self, number: int) -> int | None:
        return CALLER if number == 0 else self._roster.stage_of(number)

    def on_way(self, stages: Collection[int], links: Collection[LinkKey]) -> list[str]:
        """The descriptions of those of the links that a request through these stages may pass."""
        ends = (*stages, CALLER)
        return [self.stories[link] for link in links if all(self._stage_of(end) in ends for end in link)]

    def update(self, dead: frozenset[LinkKey], now_ns: int) -> tuple[list[LinkKey], list[LinkChanged]]:
        """Record the links that are dead now.

        Returns:
            the links that were not dead before, and the changes to be logged.
        """
        changes = []
        for link in self.stories.keys() - dead:
            del self.stories[link]
            sender, receiver = map(self._roster.name_of, link)
            if self._roster.linked >= set(link):  # else one of the two processes has ended
                changes.append(LinkChanged(f"{sender} reaches {receiver} again", is_dead=False))
        new = sorted(dead - self.stories.keys())
        for link in new:
            sender, receiver = map(self._roster.name_of, link)
            node = self._roster.by_number(link[1])
            at = node.hello.address if node is not None and node.hello is not None else self.data_address
            self.stories[link] = story = f"{sender} cannot reach {receiver} at {at}"
            self._roster.note_link(*link, story, now_ns)
            changes.append(LinkChanged(story, is_dead=True))
        return new, changes
