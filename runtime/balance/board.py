"""What a process lets its peers know about its load: numbers in memory that peers read in place.

    service_ns   a request of ordinary cost takes so long here: a mean that forgets
    peak_ns      the same, but it jumps to what took longest and comes down slowly
    measured_ns  when that was last measured, by the host's monotonic clock
    running_ns   when the session began with what runs now; 0 when nothing does
    running      the cost of that
    sent         by peer: the cost of all that this process has sent there, ever
    done         by peer: the cost of all from there that this process is done with, ever

What is on its way to a process or waits in it is what all have sent there less what it has done: sums that nobody has
to agree upon, each written by one process. Peers on other hosts say in messages what of it concerns the reader.
"""

from __future__ import annotations

from onnxsplit.plan import MOST_NODES
from runtime.balance.policies import ServiceTime

PEERS = MOST_NODES + 1
"""Processes of a pipeline at once, its caller among them."""

BOARD_BYTES = 8 * (8 + 2 * PEERS)

_SERVICE, _PEAK, _MEASURED, _RUNNING_SINCE, _RUNNING_COST = range(5)
_SENT = 8
_MASK = (1 << 64) - 1


class LoadBoard:
    """A board in some memory: this process's own, or (to be read only) a peer's.

    Args:
        memory: of :data:`BOARD_BYTES`; new memory when None.
        peers: processes that there may be, where the memory is new.
    """

    __slots__ = ("_cells", "_done")

    def __init__(self, memory: memoryview | None = None, *, peers: int = PEERS) -> None:
        self._cells = (memory if memory is not None else memoryview(bytearray(8 * (8 + 2 * peers)))).cast("Q")
        self._done = _SENT + peers

    def release(self) -> None:
        """Let go of the memory."""
        self._cells.release()

    def began(self, cost: int, now_ns: int) -> None:
        """The session begins with a request."""
        self._cells[_RUNNING_COST] = cost
        self._cells[_RUNNING_SINCE] = now_ns

    def ended(self, gauge: ServiceTime, now_ns: int) -> None:
        """The session ended, and its time was measured."""
        self.show(gauge.service_ns, gauge.peak_ns, now_ns)
        self._cells[_RUNNING_SINCE] = 0

    def show(self, service_ns: int, peak_ns: int, now_ns: int) -> None:
        """Publish times."""
        self._cells[_SERVICE] = service_ns
        self._cells[_PEAK] = peak_ns
        self._cells[_MEASURED] = now_ns

    @property
    def times(self) -> tuple[int, int, int, int, int]:
        """service_ns, peak_ns, measured_ns, running_ns and running."""
        cells = self._cells
        return cells[_SERVICE], cells[_PEAK], cells[_MEASURED], cells[_RUNNING_SINCE], cells[_RUNNING_COST]

    def send(self, peer: int, cost: int) -> None:
        """Work goes to a peer."""
        cells = self._cells
        cells[_SENT + peer] = (cells[_SENT + peer] + cost) & _MASK

    def finish(self, peer: int, cost: int) -> None:
        """Work from a peer is done with."""
        cells = self._cells
        cells[self._done + peer] = (cells[self._done + peer] + cost) & _MASK

    def sent(self, peer: int) -> int:
        """The cost of all that was sent to a peer."""
        return self._cells[_SENT + peer]

    def done(self, peer: int) -> int:
        """The cost of all from a peer that is done with."""
        return self._cells[self._done + peer]

    def clear(self, peer: int) -> None:
        """The number belongs to a new process."""
        self._cells[_SENT + peer] = 0
        self._cells[self._done + peer] = 0
