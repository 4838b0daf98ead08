"""Which nodes are dead although their processes are there. Pure: what was heard and when in, verdicts out.

    silent   it said nothing for ``silence_s``: stopped, cut off, or its interpreter is stuck; while it loads its stage,
             which may hold up its interpreter, for ``loading_silence_s``
    stuck    it answers, but one run lasts longer than ``stall_s`` and than ``stall_factor`` times what such a request
             ever took there, or was predicted to take

ZeroMQ's own heartbeats would not do: a thread of its library answers them whatever becomes of the interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from onnxsplit.errors import InputError
from onnxsplit.numbers import MOST_SECONDS, real_problem
from runtime.balance.policies import ORDINARY
from runtime.wire.messages import NodeBeat


@dataclass(frozen=True, kw_only=True)
class Timings:
    """When something counts as failed, and when to try again. All in seconds unless said.

    Attributes:
        beat_s: between two signs of life, in either direction.
        silence_s: without one, a node that serves, or the coordinator, is taken for dead.
        loading_silence_s: the same for a node that is not ready yet. One whose link was closed has ``silence_s``.
        stall_s: a run that lasts no longer is never taken for stuck.
        stall_factor: a run is taken for stuck when it lasts so many times what is usual.
        backoff_s: before the second restart in a row of a node; doubled each time. The first comes at once.
        backoff_most_s: between two restarts at most.
        settled_s: a node that served so long has its failures forgotten.
        circuit_failures: failures in a row of one node that open its circuit: it is left alone for a while.
        circuit_s: for so long; then it is tried once more.
        lost_s: an attempt that is under way for longer, and for longer than ``stall_factor`` times the usual, is made
            again: a message was lost.
        drain_s: a node that was told to end waits so long to be relieved of its work.
        unreachable_s: a link between two processes that is not connected for so long is taken for dead.
    """

    beat_s: float = 0.5
    silence_s: float = 5.0
    loading_silence_s: float = 60.0
    stall_s: float = 10.0
    stall_factor: float = 20.0
    backoff_s: float = 0.25
    backoff_most_s: float = 30.0
    settled_s: float = 5.0
    circuit_failures: int = 5
    circuit_s: float = 30.0
    lost_s: float = 30.0
    drain_s: float = 30.0
    unreachable_s: float = 3.0


def timings(changes: Mapping[str, float]) -> Timings:
    """The usual timings, with changes by name.

    Raises:
        InputError: there is no such timing, or it is not a number above 0 and at most 115 days.
    """
    known = {field.name: field.type for field in fields(Timings)}
    for name, value in changes.items():
        if name not in known:
            raise InputError(f"there is no timing {name!r}; there are: {', '.join(known)}")
        problem = real_problem(f"the timing {name}", value, MOST_SECONDS)
        if problem is None and known[name] == "int" and round(value) < 1:
            problem = f"the timing {name} must be at least 1, not {value:g}"
        if problem:
            raise InputError(problem)
    return Timings(**{name: round(value) if known[name] == "int" else value for name, value in changes.items()})  # type: ignore[arg-type]


@dataclass(slots=True)
class _Node:
    heard_ns: int
    predicted_ns: int
    serves: bool = False
    closed: bool = False


class Watch:
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
        usual = longest_ns * max(beat.cost, ORDINARY) / ORDINARY
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
