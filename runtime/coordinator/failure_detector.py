"""Which nodes are dead although their processes are there. Pure: what was heard and when in, verdicts out.

    silent   it said nothing for ``silence_s``: stopped, cut off, or its interpreter is stuck; while it loads its stage,
             which may hold up its interpreter, for ``loading_silence_s``
    stuck    it answers, but one run lasts longer than ``stall_s`` and than ``stall_factor`` times what such a request
             ever took there, or was predicted to take

ZeroMQ's own heartbeats would not do: a thread of its library answers them whatever becomes of the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.balance.policies import UNIT_COST
from runtime.timings import Timings
from runtime.wire.messages.control import NodeBeat


@dataclass(slots=True)
class _Node:
    heard_ns: int
    predicted_ns: int
    serves: bool = False
    closed: bool = False


class FailureDetector:
    """Watches nodes from the moment they get a stage.

    Args:
        timings: when to give up on one.
    """

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._nodes: dict[int, _Node] = {}

    def begin(self, node: int, predicted_ns: int, now_ns: int) -> None:
        """Watch a node that begins to load; an ordinary request is predicted to take so long there."""
        self._nodes.setdefault(node, _Node(now_ns, predicted_ns))

    def serves(self, node: int) -> None:
        """The node is ready: from now on it has ``silence_s``."""
        if node in self._nodes:
            self._nodes[node].serves = True

    def closed(self, node: int, now_ns: int) -> None:
        """There is no link to the node now.

        The link of a process that ended is closed while it was heard of lately; that of one that was stopped is given
        up by ZeroMQ much later, which says nothing new.
        """
        found = self._nodes.get(node)
        if found is not None and now_ns - found.heard_ns < self._timings.silence_s * 1e9:
            found.closed = True

    def excuse(self, absent_ns: int) -> None:
        """The watcher itself did not run for so long, so silence in that time says nothing about the nodes."""
        for node in self._nodes.values():
            node.heard_ns += absent_ns

    def end(self, node: int) -> None:
        """Mind it no longer."""
        self._nodes.pop(node, None)

    def heard(self, node: int, beat: NodeBeat, now_ns: int) -> str | None:
        """It gave a sign of life.

        Returns:
            Why it is taken for dead, if it is.
        """
        found = self._nodes.get(node)
        if found is None:
            return None
        found.heard_ns, found.closed = now_ns, False
        longest_ns = max(found.predicted_ns, beat.longest_ns)
        usual = longest_ns * max(beat.cost, UNIT_COST) / UNIT_COST
        if beat.running_ns > max(self._timings.stall_s * 1e9, self._timings.stall_factor * usual):
            return (
                f"is stuck: a request has been running for {beat.running_ns / 1e9:.1f} s, "
                f"and an ordinary one takes {longest_ns / 1e6:.3g} ms at most"
            )
        return None

    def heard_lately(self, now_ns: int) -> frozenset[int]:
        """The nodes that gave a sign of life not long ago."""
        patience_ns = max(1.0, 4 * self._timings.beat_s) * 1e9
        return frozenset(number for number, node in self._nodes.items() if now_ns - node.heard_ns < patience_ns)

    def silent(self, now_ns: int) -> dict[int, str]:
        """The nodes that have said nothing for too long, and why they are taken for dead."""
        found = {}
        for number, node in self._nodes.items():
            seconds = (now_ns - node.heard_ns) / 1e9
            hurried = node.serves or node.closed
            if seconds > (self._timings.silence_s if hurried else self._timings.loading_silence_s):
                when = "" if node.serves else " before it was ready"
                found[number] = f"has been silent for {seconds:.1f} s{when}: stopped, cut off or stuck"
        return found
