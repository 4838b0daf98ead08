"""Sends a request's tensors to their readers: chooses the replica of each stage, lends memory and sends fragments.

The coordinator sends inputs this way, and nodes send outputs.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType

from onnxsplit.plan import CALLER
from runtime.balance.router import Router
from runtime.memory.outgoing import Attempt, Outgoing
from runtime.memory.payloads import Payloads
from runtime.wire.links import Outlet
from runtime.wire.messages.data import ANY

COORDINATOR = 0
"""The number of the coordinator's process, which runs no stage."""


class Sender:
    """Sends one process's tensors to the processes that read them.

    Args:
        payloads: this process's side of shared memory.
        router: chooses among replicas, and counts what was sent to each.
        links: to other processes, by number. A process without a link is lost: nothing is sent to it.
        sources: the stages that send to each stage, and the caller.
        compress: for each process, by number, the tensors that are compressed for it.
    """

    def __init__(
        self,
        payloads: Payloads,
        router: Router,
        links: Mapping[int, Outlet],
        sources: Mapping[int, Sequence[int]],
        compress: Mapping[int, Collection[str]] = MappingProxyType({}),
    ) -> None:
        self._payloads = payloads
        self._router = router
        self._links = links
        self._sources = sources
        self._compress = compress

    def readers(
        self, wanted: Iterable[tuple[int, tuple[str, ...]]], attempt: Attempt, outgoing: Outgoing
    ) -> dict[int, tuple[str, ...]]:
        """The processes that get tensors, by number, with the names of the tensors.

        Args:
            wanted: stages, or the caller, with the tensors that each reads. Stages that the attempt does not need are
                left out.
            attempt: names the replica of each stage, or leaves the choice to the router.
            outgoing: the tensors.
        """
        readers = {}
        for stage, names in wanted:
            size = sum([outgoing.arrays[name].nbytes for name in names if name in outgoing.arrays])
            number = self.reader(stage, attempt.route, attempt.cost, size)
            if number is not None:
                readers[number] = names
        return readers

    def reader(self, stage: int, route: Sequence[int], cost: int, size_bytes: int) -> int | None:
        """The process that gets the tensors for a stage, or for the caller; None when there is none.

        Args:
            stage: the stage, or the caller.
            route: names the replica of each stage, or leaves the choice to the router.
            cost: cost of the request.
            size_bytes: size of the tensors.
        """
        number: int | None = COORDINATOR if stage == CALLER else route[stage]
        if number == ANY and stage != CALLER:
            replicas = self._router.nodes(stage)
            if len(replicas) == 1:
                number = replicas[0]
            else:
                number = self._router.choose(stage, self._sources[stage], cost, size_bytes, time.monotonic_ns())
        return number if number in self._links else None

    def readers_of(self, stage: int) -> tuple[int, ...]:
        """The processes that can get the tensors for a stage, or for the caller."""
        return (COORDINATOR,) if stage == CALLER else self._router.nodes(stage)

    def sent(self, number: int, cost: int) -> None:
        """Count a request of this cost that was sent to a process."""
        if number != COORDINATOR:
            self._router.sent(number, cost)

    def send(
        self, readers: Mapping[int, tuple[str, ...]], attempt: Attempt, outgoing: Outgoing, source: int, *, keep: bool
    ) -> None:
        """Send each reader its tensors.

        Args:
            readers: as :meth:`readers` returns them.
            attempt: the attempt to which the tensors belong.
            outgoing: the tensors.
            source: the stage that made them, or the caller.
            keep: this process holds the tensors as well, and may send them again. Without it, their shared memory is
                free as soon as the readers have read it.

        Raises:
            StageFailed: the tensors are too large to be sent.
        """
        if not keep:
            self._payloads.lend(outgoing, readers)
        for number, names in readers.items():
            if keep and not outgoing.places.keys().isdisjoint(names):
                self._payloads.lend_too(outgoing, number)
            compress = self._compress.get(number, ())
            self._payloads.send(self._links[number], number, outgoing, names, attempt, source, compress)
            self.sent(number, attempt.cost)
