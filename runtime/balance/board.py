"""The load board: numbers in shared memory by which a process publishes its load to its peers.

    service_ns   u64          time of a request of unit cost (EWMA)
    peak_ns      u64          the same as a peak-EWMA
    measured_ns  u64          when they were last measured, by the host's monotonic clock
    running_ns   u64          when the session began the request that runs now; 0 for none
    running      u64          cost of that request
    (free)       3 x u64
    sent         u64 a peer   cost of all work that this process has ever sent to that peer, modulo 2**64
    done         u64 a peer   cost of all work from that peer that this process has ever finished, modulo 2**64

The outstanding work of a process is the cost of all work sent to it, minus the cost of the work it has done. Each
number is written by one process only, so no locks are needed. A peer on another host gets the numbers that concern it
in a :class:`~runtime.wire.messages.data.Receipt`.
"""

from __future__ import annotations

from onnxsplit.plan_base import MOST_NODES
from runtime.balance.policies import ServiceTime

PEERS = MOST_NODES + 1
"""The largest number of processes of a pipeline, the caller's included."""

BOARD_BYTES = 8 * (8 + 2 * PEERS)

_SERVICE, _PEAK, _MEASURED, _RUNNING_SINCE, _RUNNING_COST = range(5)
_SENT = 8
_MASK = (1 << 64) - 1


class LoadBoard:
    """A load board: this process's own, or a peer's, which may only be read.

    Args:
        memory: the board's memory, of :data:`BOARD_BYTES`; new private memory when None.
        peers: number of processes for which new memory has room.
    """

    __slots__ = ("_cells", "_done")

    def __init__(self, memory: memoryview | None = None, *, peers: int = PEERS) -> None:
        self._cells = (memory if memory is not None else memoryview(bytearray(8 * (8 + 2 * peers)))).cast("Q")
        self._done = _SENT + peers

    def release(self) -> None:
        """Release the memory."""
        self._cells.release()

    def began(self, cost: int, now_ns: int) -> None:
        """The session begins to execute a request of this cost."""
        self._cells[_RUNNING_COST] = cost
        self._cells[_RUNNING_SINCE] = now_ns

    def ended(self, service_time: ServiceTime, now_ns: int) -> None:
        """The session has ended, and its time has been measured."""
        self.show(service_time.service_ns, service_time.peak_ns, now_ns)
        self._cells[_RUNNING_SINCE] = 0

    def show(self, service_ns: int, peak_ns: int, now_ns: int) -> None:
        """Publish the service time and its peak."""
        self._cells[_SERVICE] = service_ns
        self._cells[_PEAK] = peak_ns
        self._cells[_MEASURED] = now_ns

    @property
    def times(self) -> tuple[int, int, int, int, int]:
        """The fields service_ns, peak_ns, measured_ns, running_ns and running."""
        cells = self._cells
        return cells[_SERVICE], cells[_PEAK], cells[_MEASURED], cells[_RUNNING_SINCE], cells[_RUNNING_COST]

    def send(self, peer: int, cost: int) -> None:
        """Work of this cost is sent to a peer."""
        cells = self._cells
        cells[_SENT + peer] = (cells[_SENT + peer] + cost) & _MASK

    def finish(self, peer: int, cost: int) -> None:
        """Work of this cost from a peer is finished."""
        cells = self._cells
        cells[self._done + peer] = (cells[self._done + peer] + cost) & _MASK

    def sent(self, peer: int) -> int:
        """The cost of all work ever sent to a peer."""
        return self._cells[_SENT + peer]

    def done(self, peer: int) -> int:
        """The cost of all work from a peer that is finished."""
        return self._cells[self._done + peer]

    def clear(self, peer: int) -> None:
        """Start from 0 for a peer, because its number belongs to a new process."""
        self._cells[_SENT + peer] = 0
        self._cells[self._done + peer] = 0
