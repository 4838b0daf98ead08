"""Sends the tensors of a request to those who read them: chooses the replica of each stage, lends memory, sends.

The coordinator sends inputs this way, and nodes send outputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from onnxsplit.plan import CALLER
from runtime.balance.router import Router
from runtime.memory.outgoing import Attempt, Outgoing
from runtime.memory.payloads import Payloads
from runtime.wire.links import Outlet
from runtime.wire.messages.data import ANY, NOT_NEEDED

COORDINATOR = 0
"""The number of the coordinator's process, which runs no stage."""


class Sender:
    """One process's way to the processes that read what it has.

    Args:
        payloads: this process's side of shared memory.
        router: chooses among replicas, and counts what was sent to each.
        links: to other processes, by number. A process without a link is lost: nothing is sent to it.
        sources: the stages that send to each stage, and the caller.
    """

    def __init__(
        self,
        payloads: Payloads,
        router: Router,
        links: Mapping[int, Outlet],
        sources: Mapping[int, Sequence[int]],
    ) -> None:
        self._payloads = payloads
        self._router = router
        self._links = links
        self._sources = sources

    def readers(
        self, wanted: Iterable[tuple[int, tuple[str, ...]]], attempt: Attempt, going: Outgoing
    ) -> dict[int, tuple[str, ...]]:
        """The processes that get tensors, by number, with the names of the tensors.

        Args:
            wanted: stages, or the caller, with the tensors that each reads. Stages that the attempt does not need are
                left out.
            attempt: names the replica of each stage, or leaves the choice to the router.
            going: the tensors.
        """
        readers = {}
        for stage, names in wanted:
            number: int | None = COORDINATOR if stage == CALLER else attempt.route[stage]
            if number == NOT_NEEDED:
                continue
            if number == ANY and stage != CALLER:
                number = self._choose(stage, names, attempt.cost, going)
            if number is not None and number in self._links:
                readers[number] = names
        return readers

    def _choose(self, stage: int, names: tuple[str, ...], cost: int, going: Outgoing) -> int | None:
        replicas = self._router.nodes(stage)
        if len(replicas) == 1:
            return replicas[0]
        size = sum([going.arrays[name].nbytes for name in names if name in going.arrays])
        return self._router.choose(stage, self._sources[stage], cost, size, time.monotonic_ns())

    def send(
        self, readers: Mapping[int, tuple[str, ...]], attempt: Attempt, going: Outgoing, source: int, *, keep: bool
    ) -> None:
        """Send each reader its tensors.

        Args:
            readers: as :meth:`readers` returns them.
            attempt: the attempt that the tensors are of.
            going: the tensors.
            source: the stage that made them, or the caller.
            keep: this process holds the tensors as well, and may send them again. Without it, their shared memory is
                free as soon as the readers have read it.

        Raises:
            StageFailed: the tensors are too large to be sent.
        """
        if not keep:
            self._payloads.lend(going, readers)
        for number, names in readers.items():
            if keep and not going.places.keys().isdisjoint(names):
                self._payloads.lend_too(going, number)
            self._payloads.send(self._links[number], number, going, names, attempt, source)
            if number != COORDINATOR:
                self._router.sent(number, attempt.cost)
