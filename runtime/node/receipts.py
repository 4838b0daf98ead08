"""The receipts of a node: its load, for senders on other hosts, which cannot read its load board."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from runtime.balance.board import LoadBoard
from runtime.node.compression import Compression
from runtime.wire import codec
from runtime.wire.links import Outlet
from runtime.wire.messages.control import Peer
from runtime.wire.messages.data import Fragment, Receipt
from runtime.wire.sockets import Sockets

_RECEIPT_S = 0.5  # interval of receipts to a sender that does not choose by them
_REPEAT_S = 5.0  # after this time an unchanged receipt is sent again, which shows what was lost on the way
_IDLE_S = 60.0  # longest wait of the main loop when no receipts are due


class Receipts:
    """Counts the unfinished work of all senders, and sends receipts to those on other hosts.

    Args:
        board: this node's load board.
        compression: says whether this node reads compressed tensors.
    """

    def __init__(self, board: LoadBoard, compression: Compression) -> None:
        self._board = board
        self._compression = compression
        self._me = -1
        self._links: dict[int, Outlet] = {}  # to the senders on other hosts
        self._told: dict[int, tuple[Receipt, float]] = {}  # the last receipt to each of them, and when it was sent
        self._urgent: set[int] = set()  # the senders that choose among replicas by the next receipt
        self._has_siblings = False
        self._next_s = 0.0
        self._unfinished: Counter[int] = Counter()  # cost of the unfinished work, by its sender

    @property
    def needed(self) -> bool:
        """Whether any sender needs receipts."""
        return bool(self._links)

    def connect(
        self, me: int, peers: Mapping[int, Peer], senders: Collection[int], sockets: Sockets, *, siblings: bool
    ) -> None:
        """Open a link to each sender that needs receipts.

        Args:
            me: this node's number.
            peers: all present processes.
            senders: the numbers of those that need receipts.
            sockets: opens links.
            siblings: whether senders can choose among several nodes of this stage.
        """
        self._me, self._has_siblings = me, siblings
        for number in self._links.keys() - senders:
            self._links.pop(number).close()
            self._told.pop(number, None)
        for number in senders:
            if number not in self._links:
                self._links[number] = sockets.connect(peers[number].address, key=peers[number].key)
        self._urgent.update(self._links)  # a sender that had no choice before has an old receipt
        for number in self._unfinished.keys() - peers.keys():
            del self._unfinished[number]

    def arrived(self, fragment: Fragment) -> None:
        """Count the work of a fragment that has arrived."""
        self._unfinished[fragment.sender] += fragment.cost

    def settled(self, fragment: Fragment) -> None:
        """Count a fragment's work as finished. A sender that can choose among replicas gets a receipt soon."""
        sender = fragment.sender
        if sender in self._unfinished:  # else the sender has ended
            self._unfinished[sender] -= fragment.cost
        if self._has_siblings and sender in self._links:
            self._urgent.add(sender)

    def due_s(self, now_s: float) -> float:
        """Seconds until the next receipts are due."""
        if not self._links:
            return _IDLE_S
        return 0.0 if self._urgent else max(0.0, self._next_s - now_s)

    def send(self, now_s: float) -> None:
        """Send the receipts that are due. All messages that have arrived must have been received before."""
        beat = now_s >= self._next_s
        if beat:
            self._next_s = now_s + _RECEIPT_S
        for number in list(self._links) if beat else self._urgent & self._links.keys():
            last, at = self._told.get(number, (None, 0.0))
            receipt = self._receipt(number)
            if receipt != last or now_s - at >= _REPEAT_S:
                self._links[number].send(codec.encode(receipt))
                self._told[number] = receipt, now_s
        self._urgent.clear()

    def _receipt(self, sender: int) -> Receipt:
        board, unfinished = self._board, self._unfinished
        service_ns, peak_ns, *_ = board.times
        done, waiting = board.done(sender), unfinished[sender]
        others = max(0, sum(unfinished.values()) - waiting)
        reads = self._compression.decompresses
        return Receipt(self._me, done, done + max(0, waiting), others, service_ns, peak_ns, reads)
