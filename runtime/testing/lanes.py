"""A simulated pipeline in which ordinary fragments go through lanes, and ordinary requests take the straight paths.

A lane is a link of its own, so its entries overtake messages, and messages overtake them. Entries of a process that was
killed can be read until the reader learns that it is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from runtime.balance.policies import UNIT_COST
from runtime.coordinator import events as c
from runtime.node import events as n
from runtime.node.state import NodePhase
from runtime.testing.network import SimulatedLink
from runtime.testing.node import COORDINATOR, SimulatedNode, Tensor
from runtime.testing.pipeline import SimulatedPipeline
from runtime.topology import ReplicaKey, sources
from runtime.wire.messages.control import Peer
from runtime.wire.messages.data import Fragment, Visit

_SHARE = 0.8  # of the ordinary fragments that go through lanes; the others find the ring full, or are the first


class SimulatedLanes(SimulatedPipeline):
    """A simulated pipeline with lanes, driven by hand. The arguments are those of the base class."""

    def submit(self, wanted: tuple[str, ...]) -> int:
        """Submit a request, and return its number."""
        number = self.coordinator.numbers.next()
        self.answers[number] = []
        enter = self.coordinator.enter(number, wanted, UNIT_COST, None, self.now_ns)
        if enter is None:
            self.tell(c.Submitted(number, wanted, UNIT_COST, None, self.now_ns))
        else:
            self.enter(enter)
        return number

    def send_fragment(self, to: int | None, fragment: Fragment, tensors: Mapping[str, Tensor]) -> None:
        """Send a fragment, through a lane or as a message."""
        has_lane = to is not None and fragment.sender in self._known(to)
        if to is not None and has_lane and not fragment.rows and self.choices.random() < _SHARE:
            self.send((fragment.sender, to, "lane"), (fragment, tensors))
        else:
            super().send_fragment(to, fragment, tensors)

    def _known(self, number: int) -> set[int]:
        """The processes whose memory a process has mapped."""
        peers = self._peers if number == COORDINATOR else self.nodes[number].peers
        return {COORDINATOR, *(peer.number for peer in peers)}

    def waiting(self) -> list[SimulatedLink]:
        """The links with something that can be delivered; only nodes that serve look at their lanes."""
        return [link for link in super().waiting() if link[2] != "lane" or self._looks(link[1])]

    def _looks(self, number: int) -> bool:
        node = self.nodes.get(number)
        return node is None or node.state.state in (NodePhase.READY, NodePhase.LEAVING)

    def receive(self, link: SimulatedLink, message: Any) -> None:
        """Handle a message or an entry."""
        node = self.nodes.get(link[1])
        if link[2] != "lane" or node is None:
            super().receive(link, message)
        elif node.alive:
            self._take(node, *message)

    def _take(self, node: SimulatedNode, fragment: Fragment, tensors: Mapping[str, Tensor]) -> None:
        """Run a request at once if it is ordinary; else let the node's state machine have it."""
        joins = len(sources(self.plan, node.slot[0])) > 1
        if joins or not node.state.passes(fragment.request, fragment.attempt, fragment.view):
            self.give(node, n.Arrived(fragment, tensors, self.now_ns))
            return
        leaving = node.state.leaving(fragment)
        key = fragment.request, fragment.attempt
        executed = self._run(node, n.Run(key, fragment.cost, tensors, (fragment,), leaving))
        if executed is not None:
            node.state.executed += 1
            visit = Visit(*node.slot, self.now_ns, self.now_ns, self.now_ns, self.now_ns, 0, 0)
            self._forward(node, n.Forward(fragment, 0, leaving, (*fragment.history, visit)))
        self.node_finished(node, (fragment,))

    def hear(self, sender: int, message: Any) -> None:
        """Handle a message or an entry of a node at the coordinator."""
        requests = self.coordinator.requests
        if not isinstance(message, tuple) or message[0].rows or not self.coordinator.settled:
            super().hear(sender, message)
            return
        fragment, tensors = message
        if requests.attempt(fragment.request) == fragment.attempt:
            self._collected[fragment.request].update(tensors)
            visits = requests.complete(fragment.request, fragment.attempt, tuple(tensors), fragment.history)
            if visits is not None:
                self.resolve(fragment.request, visits)

    # Ends of lanes

    def start_node(self, slot: ReplicaKey, number: int) -> None:
        """Start a process; its rings are new."""
        self._drop_lanes(lambda sender, _: sender == number)
        super().start_node(slot, number)

    def node_connected(self, node: SimulatedNode, connect: n.Connect) -> None:
        """A node has learned which processes exist: it closes the lanes of others."""
        known = {peer.number for peer in connect.peers}
        self._drop_lanes(lambda sender, to: to == node.number and sender not in known)

    def coordinator_met(self, peers: tuple[Peer, ...]) -> None:
        """The coordinator has learned which processes exist: it closes the lanes of others."""
        known = {peer.number for peer in peers}
        self._drop_lanes(lambda sender, to: to == COORDINATOR and sender not in known)

    def _drop_lanes(self, ends: Callable[[int, int], bool]) -> None:
        for (sender, to, kind), queue in self.links.items():
            if kind == "lane" and ends(sender, to):
                queue.clear()
