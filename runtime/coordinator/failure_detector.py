"""Finds nodes that are dead although their processes exist. Pure.

The input is the nodes' messages and their times; the output is verdicts, of two kinds:

    silent   the node has said nothing for ``silence_s``: it was stopped, cut off, or its interpreter is stuck. While it
             loads its stage, which may keep the interpreter from running, it has ``loading_silence_s``.
    stuck    the node sends heartbeats, but one run has lasted longer than ``stall_s``, and longer than
             ``stall_factor`` times the longest such run, or the predicted one

ZeroMQ's own heartbeats are not enough: a thread of its library answers them even when the interpreter is stuck.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.balance.policies import UNIT_COST
from runtime.timings import Timings
from runtime.wire.messages.control import NodeBeat


@dataclass(slots=True)
class _WatchedNode:
    heard_ns: int
    predicted_ns: int
    serves: bool = False
    closed: bool = False


class FailureDetector:
    """Watches nodes from the moment they get a stage.

    Args:
        timings: the times after which a node counts as dead.
    """

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._nodes: dict[int, _WatchedNode] = {}

    def begin(self, node: int, predicted_ns: int, now_ns: int) -> None:
        """Watch a node that begins to load. An ordinary request is predicted to take ``predicted_ns`` there."""
        self._nodes.setdefault(node, _WatchedNode(now_ns, predicted_ns))

    def serves(self, node: int) -> None:
        """The node is ready; from now on ``silence_s`` holds."""
        if node in self._nodes:
            self._nodes[node].serves = True

    def closed(self, node: int, now_ns: int) -> None:
        """The link to the node is closed.

        When a process ends, its link is closed at once, while it was heard recently. When a process is stopped, ZeroMQ
        closes the link much later, which says nothing new.
        """
        watched = self._nodes.get(node)
        if watched is not None and now_ns - watched.heard_ns < self._timings.silence_s * 1e9:
            watched.closed = True

    def excuse(self, absent_ns: int) -> None:
        """This process itself did not run for a time, so silence in that time says nothing about the nodes."""
        for node in self._nodes.values():
            node.heard_ns += absent_ns

    def end(self, node: int) -> None:
        """Stop watching the node."""
        self._nodes.pop(node, None)

    def heard(self, node: int, beat: NodeBeat, now_ns: int) -> str | None:
        """The node has sent a heartbeat.

        Returns:
            why the node counts as dead; None when it does not.
        """
        watched = self._nodes.get(node)
        if watched is None:
            return None
        watched.heard_ns, watched.closed = now_ns, False
        longest_ns = max(watched.predicted_ns, beat.longest_ns)
        usual = longest_ns * max(beat.cost, UNIT_COST) / UNIT_COST
        if beat.running_ns > max(self._timings.stall_s * 1e9, self._timings.stall_factor * usual):
            return (
                f"is stuck: a request has been running for {beat.running_ns / 1e9:.1f} s, "
                f"and an ordinary one takes {longest_ns / 1e6:.3g} ms at most"
            )
        return None

    def heard_lately(self, now_ns: int) -> frozenset[int]:
        """The nodes that have sent a heartbeat recently."""
        patience_ns = max(1.0, 4 * self._timings.beat_s) * 1e9
        return frozenset(number for number, node in self._nodes.items() if now_ns - node.heard_ns < patience_ns)

    def silent(self, now_ns: int) -> dict[int, str]:
        """The nodes that have been silent for too long, and why they count as dead."""
        verdicts = {}
        for number, node in self._nodes.items():
            seconds = (now_ns - node.heard_ns) / 1e9
            is_short = node.serves or node.closed
            if seconds > (self._timings.silence_s if is_short else self._timings.loading_silence_s):
                when = "" if node.serves else " before it was ready"
                verdicts[number] = f"has been silent for {seconds:.1f} s{when}: stopped, cut off or stuck"
        return verdicts
