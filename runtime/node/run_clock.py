"""Measures the runs of a node's session, and shows peers what runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from runtime.balance.policies import ServiceTime
from runtime.memory.payloads import Payloads
from runtime.wire.messages.data import Step


class RunClock:
    """The clock of one node's session.

    Args:
        payloads: the node's side of shared memory, where its load board and its ledger are.

    Attributes:
        began: when the session began the running request, by the host's monotonic clock in ns, and the request's cost;
            None while no request runs. Thread-safe.
        announce: called with the attempt before each run; None where the coordinator reads the ledger.
    """

    def __init__(self, payloads: Payloads) -> None:
        self.began: tuple[int, int] | None = None
        self.announce: Callable[[int, int], None] | None = None
        self._payloads = payloads
        self._service_time = ServiceTime()

    @property
    def service_ns(self) -> int:
        """The time that a request of unit cost takes here, on average."""
        return self._service_time.service_ns

    @property
    def longest_ns(self) -> int:
        """The longest time that a request of unit cost has taken here. Thread-safe."""
        return self._service_time.longest_ns

    def begin(self, request: int, attempt: int, cost: int) -> int:
        """A run begins; returns the time."""
        if self.announce is not None:
            self.announce(request, attempt)
        self._payloads.record(request, attempt, Step.RUNNING)
        started = time.monotonic_ns()
        self.began = started, cost
        self._payloads.board.began(cost, started)
        return started

    def end(self, started_ns: int, ended_ns: int, cost: int) -> None:
        """A run has ended, with or without success."""
        self.began = None
        self._service_time.ran(ended_ns - started_ns, cost, ended_ns)
        self._payloads.board.ended(self._service_time, ended_ns)

    def done(self, request: int, attempt: int) -> None:
        """The outputs of a run are complete."""
        self._payloads.record(request, attempt, Step.DONE)
