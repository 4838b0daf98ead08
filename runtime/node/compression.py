"""The tensors that a node sends compressed: those that the plan names, to peers on other hosts that can read them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from onnxsplit.plan import Plan
from runtime.logs import log_event
from runtime.topology import compressed_tensors
from runtime.wire.compression import can_compress
from runtime.wire.messages.control import Peer
from runtime.wire.messages.data import Receipt

_log = logging.getLogger("runtime.node")


class Compression:
    """What one node compresses. A peer gets compressed tensors once a receipt has said that it reads them.

    Attributes:
        names: for each of these peers, by number, the tensors that are compressed for it.
        decompresses: whether compressed tensors may come to this node, and it reads them.
    """

    def __init__(self) -> None:
        self.names: dict[int, frozenset[str]] = {}
        self.decompresses = False
        self._stage = -1
        self._wanted: dict[int, frozenset[str]] = {}  # by the stage that reads them
        self._far: dict[int, frozenset[str]] = {}  # by peers on other hosts
        self._plain: set[int] = set()  # those that do not read compressed tensors

    def learn(self, plan: Plan, stage: int) -> None:
        """Note what the plan says about a stage, and log if the library is missing."""
        self._stage = stage
        self._wanted = compressed_tensors(plan, stage)
        read = any(stage in compressed_tensors(plan, other.index) for other in plan.stages)
        if not self._wanted and not read:
            return
        self.decompresses = read and can_compress()
        if not can_compress():
            self._wanted = {}
            log_event(_log, logging.WARNING, "no compression: zstandard is not installed here", stage=stage)

    def connect(self, peers: Mapping[int, Peer], mapped: Collection[int]) -> None:
        """Note which peers are on other hosts.

        Args:
            peers: all peers, by number.
            mapped: the numbers of those whose shared memory is mapped.
        """
        self._far = {
            number: self._wanted[peer.stage]
            for number, peer in peers.items()
            if peer.stage in self._wanted and number not in mapped and peer.address.startswith("tcp://")
        }
        for number in self.names.keys() - self._far.keys():
            del self.names[number]
        self._plain &= self._far.keys()

    def told(self, receipt: Receipt) -> None:
        """Note whether a peer reads compressed tensors."""
        number = receipt.sender
        if number not in self._far or number in self.names or number in self._plain:
            return
        if receipt.decompresses:
            self.names[number] = self._far[number]
            log_event(_log, logging.INFO, "compressing tensors", stage=self._stage, to=number)
        else:
            self._plain.add(number)
            log_event(
                _log, logging.WARNING, "no compression: zstandard is not installed at the reader", stage=self._stage,
                to=number,
            )  # fmt: skip
