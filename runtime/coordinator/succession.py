"""Hands the nodes of one coordinator on to another one, which runs the next plan.

old coordinator                   new coordinator
begin: Succeed to its nodes       listens at a free port
Succeeded, or SucceedRefused      the successors join and load their stages
drains and closes                 takes requests, and takes over the old one's address
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from runtime.coordinator.node_record import Phase
from runtime.coordinator.roster import Roster
from runtime.errors import LaunchFailed, PipelineError
from runtime.topology import ReplicaKey
from runtime.wire import codec
from runtime.wire.links import AnsweringInlet
from runtime.wire.messages.control import Succeed, Succeeded, SucceedRefused, SuccessorEnded
from runtime.wire.sockets import Sockets

_ANSWER_S = 10.0  # longest wait for nodes to start their successors

Places = Mapping[ReplicaKey, tuple[ReplicaKey, int]]
"""For nodes by their slots: the slot that the successor asks for in the next plan, and the bytes that must be free."""


class Succession:
    """Asks nodes to start their successors. Only the coordinator's thread uses it, unless stated otherwise.

    Args:
        roster: the coordinator's nodes, which are only read here.
        tell: sends a message to the node with an identity; False if its link is broken.
        key: public key of both coordinators; empty where links are not encrypted.

    Attributes:
        lost: the successors that have ended since they were asked for, in words. Any thread may read it.
    """

    def __init__(self, roster: Roster, tell: Callable[[bytes, bytes], bool], key: str) -> None:
        self.lost: tuple[str, ...] = ()
        self._roster = roster
        self._tell = tell
        self._key = key
        self._done: Future[None] | None = None  # None while no answer is awaited
        self._asked: dict[bytes, str] = {}  # the nodes that have not answered, by identity, and what they are called
        self._until_s = 0.0

    def begin(self, address: str, places: Places, background_s: float, done: Future[None]) -> None:
        """Ask nodes to start their successors; see :meth:`runtime.coordinator.loop.Coordinator.succeed`."""
        if self._done is not None:
            done.set_exception(LaunchFailed("nodes are starting successors already; wait until they have"))
            return
        nodes = {slot: self._roster.nodes.get(slot) for slot in places}
        unready = [
            f"stage {slot[0]} (node {slot[0]}.{slot[1]}) is {'not there' if node is None else node.phase.value}"
            for slot, node in nodes.items()
            if node is None or node.phase is not Phase.READY
        ]
        if unready:
            done.set_exception(LaunchFailed(f"only ready nodes can be succeeded: {', '.join(unready)}"))
            return
        self.lost, self._done, self._until_s = (), done, time.monotonic() + _ANSWER_S
        for slot, ((stage, replica), needed_bytes) in places.items():
            node = nodes[slot]
            assert node is not None
            self._asked[node.identity] = node.called
            wish = Succeed(address, stage, replica, needed_bytes, self._key, round(background_s * 1e9))
            self._tell(node.identity, codec.encode(wish))
        self._look_if_done()

    def hear(self, identity: bytes, said: Succeeded | SucceedRefused | SuccessorEnded) -> None:
        """Handle what a node says about its successor."""
        match said:
            case Succeeded():
                if self._asked.pop(identity, None) is not None:
                    self._look_if_done()
            case SucceedRefused(reason):
                if (called := self._asked.get(identity)) is not None:
                    self.fail(LaunchFailed(f"{called} cannot start its successor: {reason}"))
            case SuccessorEnded(pid, story):
                node = self._roster.by_identity(identity)
                if node is not None:
                    self.lost += (f"the successor of {node.called}, process {pid}, {story}",)

    def look(self) -> None:
        """Give up on nodes that were lost, or do not answer; called with each heartbeat."""
        if self._done is None:
            return
        for identity, called in self._asked.items():
            if self._roster.by_identity(identity) is None:
                self.fail(LaunchFailed(f"{called} was lost before it had started its successor"))
                return
        if time.monotonic() > self._until_s:
            silent = ", ".join(self._asked.values())
            self.fail(LaunchFailed(f"not answered within {_ANSWER_S:.0f} s when asked for a successor: {silent}"))

    def fail(self, error: PipelineError) -> None:
        """Give up waiting for answers."""
        done, self._done = self._done, None
        self._asked.clear()
        if done is not None and not done.done():
            done.set_exception(error)

    def _look_if_done(self) -> None:
        if not self._asked and self._done is not None:
            done, self._done = self._done, None
            if not done.done():
                done.set_result(None)


class TakeOver:
    """Listens at further addresses too, as soon as they are free. Only the coordinator's thread uses it.

    Args:
        sockets: the coordinator's sockets.
        inlet: what is to listen there.
    """

    def __init__(self, sockets: Sockets, inlet: AnsweringInlet) -> None:
        self._sockets = sockets
        self._inlet = inlet
        self._wanted: list[tuple[str, Future[None]]] = []

    def begin(self, address: str, done: Future[None]) -> None:
        """Listen at an address; see :meth:`runtime.coordinator.loop.Coordinator.take_over`."""
        self._wanted.append((address, done))
        self.look()

    def look(self) -> None:
        """Try again where an address was in use; called with each heartbeat."""
        self._wanted = [(address, done) for address, done in self._wanted if not self._taken(address, done)]

    def fail(self, error: PipelineError) -> None:
        """Give up."""
        for _, done in self._wanted:
            if not done.done():
                done.set_exception(error)
        self._wanted.clear()

    def _taken(self, address: str, done: Future[None]) -> bool:
        """Whether an address needs no further try."""
        if done.done():  # the caller has cancelled it
            return True
        try:
            if not self._sockets.bind_also(self._inlet, address):
                return False
        except PipelineError as error:
            done.set_exception(error)
        else:
            done.set_result(None)
        return True
