"""The coordinator's record of one node: the states of its process, and its data. Pure.

A *slot* is a place for one replica of a stage. A :class:`NodeRecord` is one process in a slot. When the process is
lost, another one is started in the same slot, under a number that no other process of the pipeline has:

    BACKOFF   no process; the next one is started at its due time
    STARTED   a process was started, or is expected, and has not reported yet
    LOADING   the process has reported and loads its stage
    READY     it takes requests
    LEAVING   it takes no new requests and finishes those it has
    OPEN      no process: after many losses in a row it is not restarted for a while (an open circuit breaker)
    GONE      the slot is no longer needed

:data:`TRANSITIONS` lists every change that is allowed; docs/states.md is drawn from it. Any other change is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from msgspec import Struct

from runtime.coordinator.counters import NodeCounters
from runtime.timings import Timings
from runtime.topology import ReplicaKey
from runtime.transition_table import Machine
from runtime.wire.messages.control import Hello


class Phase(Enum):
    """The state of the process in a slot. Users read the values."""

    BACKOFF = "restarts soon"
    OPEN = "circuit open"
    STARTED = "starting"
    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"
    GONE = "gone"


class NodeChange(Enum):
    """What can happen to a process in a slot."""

    START = "start"
    JOIN = "reports"
    PREPARE = "has its links"
    LEAVE = "is to leave"
    LOSE = "is lost"
    TRIP = "is lost once too often"
    END = "is not needed"


_ALIVE = (Phase.STARTED, Phase.LOADING, Phase.READY)

TRANSITIONS: Mapping[tuple[Phase, NodeChange], Phase] = {
    (Phase.BACKOFF, NodeChange.START): Phase.STARTED,
    (Phase.OPEN, NodeChange.START): Phase.STARTED,
    (Phase.STARTED, NodeChange.JOIN): Phase.LOADING,
    (Phase.LOADING, NodeChange.PREPARE): Phase.READY,
    (Phase.READY, NodeChange.PREPARE): Phase.READY,
    (Phase.LEAVING, NodeChange.PREPARE): Phase.LEAVING,
    (Phase.READY, NodeChange.LEAVE): Phase.LEAVING,
    **{(phase, NodeChange.LOSE): Phase.BACKOFF for phase in _ALIVE},
    **{(phase, NodeChange.TRIP): Phase.OPEN for phase in _ALIVE},
    **{(phase, NodeChange.END): Phase.GONE for phase in Phase if phase is not Phase.GONE},
}


@dataclass(eq=False)
class NodeRecord:
    """One process in a slot.

    Attributes:
        slot: its stage and replica.
        counters: what all processes of the slot have done.
        machine: its state, and the changes that led there.
        number: the number under which other processes know it; -1 while there is no process.
        identity: the identity of its control link; empty while it has none.
        hello: its first message; None before it has arrived.
        introduced: whether it was told which other processes exist.
        mapped: the processes whose memory it has mapped.
        readers: the processes that it was told to lend memory to.
        started_ns: when it was started, or when it reported.
        ready_ns: when it became ready.
        requests: answered requests that this process executed.
        failed_in_row: processes of the slot that were lost one after the other, none of which served for long.
        due_ns: when the next process may be started.
        reason: why the last process was lost.
        leaves_at: the first view of the pipeline without it.
        released: whether it was told to end because nothing can reach it any more.
        sequences: the number of sequences whose states it held when it last said so.
        state_bytes: the bytes of those states.
        running_ns: how long its present run had lasted when it last said so; 0 without one, and once it is answered.
        is_tentative: whether it is given up, and not started again, if it does not become ready.
        why_unguided: why no sequence can follow a grammar on it; empty if it can, or has not said.
        left_to_cpu: ops that its provider left to the CPU: their number by op type.
    """

    slot: ReplicaKey
    counters: NodeCounters
    machine: Machine[Phase, NodeChange]
    number: int = -1
    identity: bytes = b""
    hello: Hello | None = None
    introduced: bool = False
    mapped: frozenset[int] = frozenset()
    readers: tuple[int, ...] = ()
    started_ns: int = 0
    ready_ns: int = 0
    requests: int = 0
    failed_in_row: int = 0
    due_ns: int = 0
    reason: str = ""
    leaves_at: int = 0
    released: bool = False
    sequences: int = 0
    state_bytes: int = 0
    running_ns: int = 0
    is_tentative: bool = False
    why_unguided: str = ""
    left_to_cpu: Mapping[str, int] = field(default_factory=dict)

    @property
    def phase(self) -> Phase:
        """The state it is in."""
        return self.machine.state

    @property
    def is_absent(self) -> bool:
        """Whether the slot has no process, and one is to be started at its due time."""
        return self.phase in (Phase.BACKOFF, Phase.OPEN)

    def fail(self, reason: str, now_ns: int, timings: Timings, *, served: bool) -> None:
        """The process was lost: wait a while before the next one, and longer after many losses in a row.

        Args:
            reason: what happened, in words that follow the node's name.
            now_ns: the time.
            timings: when to start it again.
            served: whether it had served for long, so that earlier losses do not count.
        """
        self.counters.restarts += 1
        self.failed_in_row = 1 if served else self.failed_in_row + 1
        self.reason, self.number, self.running_ns = reason, -1, 0
        if self.failed_in_row >= timings.circuit_failures:
            self.machine.go(NodeChange.TRIP)
            wait_s = timings.circuit_s
        else:
            self.machine.go(NodeChange.LOSE)
            again = self.failed_in_row - 2  # the first restart comes at once
            wait_s = min(timings.backoff_s * 2**again, timings.backoff_most_s) if again >= 0 else 0.0
        self.due_ns = now_ns + int(wait_s * 1e9)

    @property
    def called(self) -> str:
        """Its name in messages."""
        stage, replica = self.slot
        where = f", pid {self.hello.pid} on {self.hello.host}" if self.hello is not None else ""
        return f"stage {stage} (node {stage}.{replica}{where})"


class Incident(Struct, frozen=True):
    """A node was lost, or a link died.

    Attributes:
        at_ns: when, by the host's monotonic clock.
        slot: the slot of the node, or of the link's sender.
        story: a description of what happened.
    """

    at_ns: int
    slot: ReplicaKey
    story: str
